"""One seed, one image: the noise of a sample is the same in any batch and on any machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """The starting noise of each seed, and its generator, from which a stochastic solver draws later.

    Args:
        seeds: one per sample.
        shape: (channels, height, width).

    Returns:
        (len(seeds), *shape) float32 on the CPU, and as many CPU generators.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return normal(shape, generators), generators


def normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, (len(generators), *shape) float32, each sample from its own generator; they are on one
    device, and so is the noise."""
    return torch.stack([torch.randn(tuple(shape), generator=one, device=one.device) for one in generators])
