"""What work takes here as it grows, as ratios to a base case, beside the ratios of the counted FLOPs.

Every point is timed in turn with its sweep's base. Where measured and counted ratios differ, something other than FLOPs
counts: the price of a launch at small sizes, units that are not filled, attention's softmax and memory at large ones.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.cpu_sampling import random_model
from benchmarks.scaling_counts import LATENT, XL2
from benchmarks.timing import interleave
from benchmarks.training_step import Step, Variant, experiment_of, random_batch, states
from ddt_fast.config import DDTConfig, SamplingConfig
from ddt_fast.model import FusedDDT
from ddt_fast.model.flops import model_flops
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.fast import fast_settings
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.training.objective import Objective
from ddt_fast.training.throughput import training_flops

Run = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        model, dtype: of all but depth.
        image_sizes: sides in pixels, the base first, as in all that follow.
        image_batch: of the sweep over image sizes and depth.
        pixels: of all other sweeps.
        batches: of a forward; depths: encoder and decoder blocks; refreshes: K, states held.
        sampling_steps, sampling_batch: of the sampler's runs.
        training_batches: of a training step.
        calls: timings of each.
    """

    model: DDTConfig
    dtype: torch.dtype
    image_sizes: tuple[int, ...]
    image_batch: int
    pixels: int
    batches: tuple[int, ...]
    depths: tuple[tuple[int, int], ...]
    refreshes: tuple[int, ...]
    sampling_steps: int
    sampling_batch: int
    training_batches: tuple[int, ...]
    calls: int


CPU_SIZES = Sizes(
    model=DDTConfig(4, 2, 256, 4, 4, 3, num_classes=1000),
    dtype=torch.float32,
    image_sizes=(256, 128, 512, 1024),
    image_batch=1,
    pixels=128,
    batches=(1, 2, 4, 8, 16, 32, 64),
    depths=((3, 1), (1, 1), (6, 2), (12, 4), (22, 6)),
    refreshes=(1, 2, 3, 4, 6, 12),
    sampling_steps=24,
    sampling_batch=4,
    training_batches=(1, 2, 4, 8, 16, 32),
    calls=5,
)
GPU_SIZES = Sizes(
    model=XL2,
    dtype=torch.bfloat16,
    image_sizes=(256, 128, 512, 1024),
    image_batch=8,
    pixels=256,
    batches=(1, 4, 16, 64, 256),
    depths=((22, 6), (5, 1), (11, 3), (44, 12)),
    refreshes=(1, 2, 3, 4, 6, 10, 16),
    sampling_steps=50,
    sampling_batch=32,
    training_batches=(4, 8, 16, 32, 64, 128, 256),
    calls=5,
)


@dataclass(frozen=True)
class Work:
    """A point of a sweep: where on its axis, what to count, and what makes the function to be timed."""

    at: str
    flops: float
    images: int
    build: Callable[[], Run]


def sweeps(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, list[Work]]]:
    """(name, points, the base first) of each. Training steps want a `process_group`."""
    config, first = sizes.model, sizes.image_sizes[0]
    yield "image size", [_forward(sizes, device, config, p, sizes.image_batch, f"{p} px") for p in sizes.image_sizes]
    yield "batch", [_forward(sizes, device, config, sizes.pixels, batch, str(batch)) for batch in sizes.batches]
    deep = {
        f"{encoder} + {decoder}": replace(config, num_blocks=encoder + decoder, num_encoder_blocks=encoder)
        for encoder, decoder in sizes.depths
    }
    yield "depth", [_forward(sizes, device, model, first, sizes.image_batch, at) for at, model in deep.items()]
    yield "refresh", [_sampling(sizes, device, every) for every in (*sizes.refreshes, None)]
    yield "training batch", [_training(sizes, device, batch) for batch in sizes.training_batches]


def _forward(sizes: Sizes, device: torch.device, config: DDTConfig, pixels: int, batch: int, at: str) -> Work:
    side = pixels // LATENT

    def build() -> Run:
        model, (x, t, y) = _fused(config, sizes.dtype, device), _inputs(config, side, batch, device)
        return partial(_velocity, model, x.to(sizes.dtype), t, y)

    return Work(at, batch * model_flops(config, side, side).total, batch, build)


@torch.no_grad()
def _velocity(model: FusedDDT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return model(x, t, y)[0]


def _fused(config: DDTConfig, dtype: torch.dtype, device: torch.device) -> FusedDDT:
    return FusedDDT.from_reference(random_model(config)).to(device, dtype)


def _inputs(config: DDTConfig, side: int, batch: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    noise, _ = seeded_noise(range(batch), (config.in_channels, side, side))
    labels = torch.arange(batch, device=device) % config.num_classes
    return noise.to(device), torch.full((batch,), 0.5, device=device), labels


def sampling_config(sizes: Sizes, every: int | None, device: torch.device) -> SamplingConfig:
    """The encoder at every K-th step, held; None: --fast."""
    config = SamplingConfig(num_steps=sizes.sampling_steps, last_step=None, cuda_graphs=device.type == "cuda")
    return fast_settings(config) if every is None else replace(config, refresh_every=every)


def _sampling(sizes: Sizes, device: torch.device, every: int | None) -> Work:
    side, batch, config = sizes.pixels // LATENT, sizes.sampling_batch, sampling_config(sizes, every, device)

    def build() -> Run:
        sampler = Sampler(_fused(sizes.model, sizes.dtype, device), config, batch, side, side)
        noise, _, labels = _inputs(sizes.model, side, batch, device)
        return partial(sampler, noise, labels)

    flops = batch * SamplingPlan.from_config(config).flops(sizes.model, side, side)
    return Work("--fast" if every is None else f"K {every}", flops, batch, build)


def _training(sizes: Sizes, device: torch.device, batch: int) -> Work:
    side = sizes.pixels // LATENT
    variant = Variant("", "fused", sizes.dtype)

    def build() -> Run:
        state = states(random_model(sizes.model), False, device)("fused")
        step = Step(variant, state, Objective(experiment_of(sizes.model, batch, False), device, None))
        return partial(step, random_batch(sizes.model, side, batch, False))

    return Work(str(batch), batch * training_flops(sizes.model, side, side, projector=False), batch, build)


def measure(points: list[Work], calls: int) -> list[dict[str, Any]]:
    """A row for every point: seconds, and ratios to the base, the first; or why it is skipped.

    Raises:
        ValueError: the base itself does not fit the memory.
    """
    base = points[0]
    run_base = _prepared(base)
    if isinstance(run_base, str):
        raise ValueError(f"the base case {base.at} {run_base}; take a device with more memory")
    rows: list[dict[str, Any]] = []
    for point in points:
        run = run_base if point is base else _prepared(point)
        if isinstance(run, str):
            rows.append({"at": point.at, "skipped": run})
            continue
        try:
            timings = interleave({"base": run_base} if run is run_base else {"base": run_base, "point": run}, calls)
        except torch.OutOfMemoryError as error:
            rows.append({"at": point.at, "skipped": _out_of_memory(error)})
            continue
        seconds = timings["point" if "point" in timings else "base"]
        measured, counted = seconds.median / timings["base"].median, point.flops / base.flops
        rows.append(
            {
                "at": point.at,
                "images": point.images,
                "seconds": seconds.as_dict(),
                "gflop": point.flops / 1e9,
                "measured_ratio": measured,
                "counted_ratio": counted,
                "measured_over_counted": measured / counted,
                "capture_seconds": getattr(getattr(run, "func", None), "capture_seconds", 0.0),
            }
        )
        del run
    return rows


def _prepared(work: Work) -> Run | str:
    """The function to be timed, after a first call; or why there is none: it takes more memory than there is."""
    try:
        run = work.build()
        run()
    except torch.OutOfMemoryError as error:
        return _out_of_memory(error)
    return run


def _out_of_memory(error: torch.OutOfMemoryError) -> str:
    torch.cuda.empty_cache()
    return f"does not fit the memory: {str(error).split('.')[0]}"


def start_seconds(calls: int) -> float:
    """What a rank's interpreter and imports take: the median of several new processes."""
    command = [sys.executable, "-c", "import ddt_fast.sample"]
    run = partial(subprocess.run, command, check=True, capture_output=True)
    return interleave({"start": run}, calls, warmup=1)["start"].median
