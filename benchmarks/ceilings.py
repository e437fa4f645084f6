"""What this machine reaches at best, measured in the run that compares with it: a large GEMM and a large copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.shapes import dtype_name
from benchmarks.timing import Clock, EventClock, Timing, record, timed
from ddt_fast.device import cpu_has_bf16
from ddt_kernels import Cost


@dataclass(frozen=True)
class Ceilings:
    """What the rooflines of a run are made of.

    Attributes:
        gemm: FLOP/s of a square GEMM on random data, by its dtype's name, "float32" without TF32.
        copy: bytes/s of a copy, bytes read plus bytes written.
        sizes: what was measured, in words.
    """

    gemm: dict[str, float]
    copy: float
    sizes: str

    def floor(self, cost: Cost, dtype: torch.dtype) -> tuple[float, str] | None:
        """Seconds below which work of that cost cannot go, and what bounds it, "gemm" or "copy"; None where the GEMM of
        that dtype was not measured."""
        rate = self.gemm.get(dtype_name(dtype))
        if rate is None:
            return None
        compute, memory = cost.flops / rate, cost.bytes_moved / self.copy
        return (compute, "gemm") if compute >= memory else (memory, "copy")

    def as_dict(self) -> dict[str, Any]:
        return {"gemm_flops_per_second": self.gemm, "copy_bytes_per_second": self.copy, "sizes": self.sizes}


def measure_ceilings(device: torch.device) -> Ceilings:
    """Medians of several calls, after warming up; takes about a second."""
    on_gpu = device.type == "cuda"
    clock: Clock = EventClock(hide_launches=False) if on_gpu else timed
    rounds = 20 if on_gpu else 7
    sizes = {torch.float32: 4096, torch.bfloat16: 8192} if on_gpu else {torch.float32: 1536, torch.bfloat16: 1536}
    if not on_gpu and not cpu_has_bf16():
        del sizes[torch.bfloat16]
    generator = torch.Generator(device).manual_seed(0)
    gemm = {}
    for dtype, n in sizes.items():
        a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
        seconds = _median(partial(torch.mm, a, b), rounds, clock)
        gemm[dtype_name(dtype)] = 2 * n**3 / seconds
    size = 2**31 if on_gpu else 2**28
    source = torch.rand(size // 4, generator=generator, device=device)
    seconds = _median(partial(torch.empty_like(source).copy_, source), rounds, clock)
    words = ", ".join(f"{str(dtype).removeprefix('torch.')} GEMM {n}x{n}x{n}" for dtype, n in sizes.items())
    return Ceilings(gemm, 2 * size / seconds, f"{words}; copy of {size >> 20} MiB")


def _median(run: partial[Any], rounds: int, clock: Clock) -> float:
    return Timing.of(record({"": run}, rounds, warmup=2, clock=clock)[""]).median
