"""How much memory a computation takes: what it leaves allocated, and its peak, on a CPU or a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """Bytes above what was allocated before: what was left when the call returned, its result alive, and the peak."""

    kept: int
    peak: int


def measure_memory(run: Callable[[], object], device: torch.device) -> Memory:
    """Call `run` once and follow PyTorch's allocator, compiled functions' allocations included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        kept, peak = torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before
        del result
        return Memory(kept, peak)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Memory(now, peak)
