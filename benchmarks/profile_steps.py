"""Traces one refresh step and one reuse step of sampling: `python -m benchmarks.profile_steps --output-dir DIR`.

Writes traces.zip of refresh_step.trace.json and reuse_step.trace.json (torch.profiler's Chrome traces: chrome://tracing,
Perfetto) and profile.json: {steps: {refresh, reuse: [{name, calls, microseconds}]}}, the time of every kernel on a GPU,
or of every operator on a CPU, without what it calls. A guided step of DDT-XL/2 at 256 px in bf16, batch 32, eager; on a
CPU a tiny model.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_sampling import TINY
from benchmarks.cpu_sampling import StepCosts
from benchmarks.environment import environment
from benchmarks.harness import DEVICE, DTYPE, ON_GPU, timed
from benchmarks.models import PUBLISHED, random_model
from ddt_fast.files import write_json
from ddt_fast.model import FusedDDT
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import Sampler
from ddt_fast.sampling.noise import seeded_noise

PARTS = {"refresh": "encode 2, decode 2", "reuse": "decode 2"}


def trace(run: Callable[[], object], archive: Path, name: str) -> list[dict[str, Any]]:
    """Trace one call into an archive, after two that warm up; the time of each kernel or operator, the longest first.
    On a GPU an operator's device time is that of its kernels, which stand for themselves."""
    for _ in range(2):
        run()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * ON_GPU]) as profiler:
        timed(run)
    with tempfile.TemporaryDirectory() as folder, ZipFile(archive, "a", ZIP_DEFLATED) as traces:
        file = Path(folder) / f"{name}_step.trace.json"
        profiler.export_chrome_trace(str(file))
        traces.write(file, file.name)
    events = [e for e in profiler.key_averages() if not ON_GPU or e.device_type == DeviceType.CUDA]
    times = [(e.self_device_time_total if ON_GPU else e.self_cpu_time_total, e.count, e.key) for e in events]
    names = ("microseconds", "calls", "name")
    return [dict(zip(names, entry, strict=True)) for entry in sorted(times, reverse=True) if entry[0] > 0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    config, side, batch = (PRESETS["xl2_256"].model, 32, 32) if ON_GPU else (TINY, 16, 2)
    model = FusedDDT.from_reference(random_model(config, device=DEVICE).to(DTYPE))
    sampler = Sampler(model, replace(PUBLISHED, refresh_every=6), batch, side, side)
    noise, _ = seeded_noise(range(batch), (4, side, side))
    functions = StepCosts(sampler, noise.to(DEVICE), torch.arange(batch, device=DEVICE)).functions()
    record: dict[str, Any] = {"environment": environment(), "batch_size": batch, "steps": {}}
    archive = folder / "traces.zip"
    archive.unlink(missing_ok=True)
    for name, part in PARTS.items():
        record["steps"][name] = trace(functions[part], archive, name)
        write_json(folder / "profile.json", record)
        print(f"{name} step ({part}):")
        for entry in record["steps"][name][:12]:
            print(f"  {entry['microseconds']:12.1f} µs {entry['calls']:5d} x {entry['name'][:90]}")


if __name__ == "__main__":
    main()
