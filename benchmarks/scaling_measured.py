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
from benchmarks.timing import interleave, timed
from ddt_fast.config import DDTConfig, SamplingConfig
from ddt_fast.model import FusedDDT
from ddt_fast.model.flops import model_flops
from ddt_fast.sampling import Sampler
from ddt_fast.sampling.fast import fast_settings
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.training.objective import flow_matching_batch, flow_matching_loss
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
    """(name, points, the base first) of each."""
    config = sizes.model
    fused = partial(_model, sizes.dtype, device)

    def forward(model: DDTConfig, pixels: int, batch: int, at: str) -> Work:
        side = pixels // LATENT
        flops = batch * model_flops(model, side, side).total
        return Work(at, flops, batch, lambda: partial(_forward, fused(model), *_inputs(model, side, batch, device)))

    yield "image size", [forward(config, p, sizes.image_batch, f"{p} px") for p in sizes.image_sizes]
    yield "batch", [forward(config, sizes.pixels, batch, str(batch)) for batch in sizes.batches]
    deep = [
        (replace(config, num_blocks=sum(blocks), num_encoder_blocks=blocks[0]), "{} + {}".format(*blocks))
        for blocks in sizes.depths
    ]
    yield "depth", [forward(model, sizes.image_sizes[0], sizes.image_batch, at) for model, at in deep]
    yield "refresh", [_sampling(sizes, fused, device, every) for every in (*sizes.refreshes, None)]
    yield "training batch", [_training(sizes, fused, device, batch) for batch in sizes.training_batches]


def _model(dtype: torch.dtype, device: torch.device, config: DDTConfig) -> FusedDDT:
    return FusedDDT.from_reference(random_model(config)).to(device, dtype)


def _inputs(config: DDTConfig, side: int, batch: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    noise, _ = seeded_noise(range(batch), (config.in_channels, side, side))
    labels = torch.arange(batch, device=device) % config.num_classes
    return noise.to(device), torch.full((batch,), 0.5, device=device), labels


@torch.no_grad()
def _forward(model: FusedDDT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return model(x.to(next(model.parameters()).dtype), t, y)[0]


def sampling_config(sizes: Sizes, every: int | None, device: torch.device) -> SamplingConfig:
    """The encoder at every K-th step, held; None: --fast."""
    config = SamplingConfig(num_steps=sizes.sampling_steps, last_step=None, cuda_graphs=device.type == "cuda")
    return fast_settings(config) if every is None else replace(config, refresh_every=every)


def _sampling(
    sizes: Sizes, fused: Callable[[DDTConfig], FusedDDT], device: torch.device, every: int | None
) -> Work:
    side, batch, config = sizes.pixels // LATENT, sizes.sampling_batch, sampling_config(sizes, every, device)

    def build() -> Run:
        sampler = Sampler(fused(sizes.model), config, batch, side, side)
        noise, _, labels = _inputs(sizes.model, side, batch, device)
        run = partial(sampler, noise, labels)
        setattr(run, "capture_seconds", sampler.capture_seconds)
        return run

    from ddt_fast.sampling import SamplingPlan

    flops = batch * SamplingPlan.from_config(config).flops(sizes.model, side, side)
    return Work("--fast" if every is None else f"K {every}", flops, batch, build)


def _training(sizes: Sizes, fused: Callable[[DDTConfig], FusedDDT], device: torch.device, batch: int) -> Work:
    side = sizes.pixels // LATENT

    def build() -> Run:
        model = fused(sizes.model).train().requires_grad_(True)
        return partial(_training_step, model, _optimizer(model), *_inputs(sizes.model, side, batch, device))

    return Work(str(batch), batch * training_flops(sizes.model, side, side, projector=False), batch, build)
