"""One seed, one image: a sample's noise is the same in every batch and on every machine."""

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """The initial noise of each seed, (len(seeds), *shape) float32 on the CPU, and its CPU generator, from which a
    stochastic solver draws later. A shape is (channels, height, width)."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return normal(shape, generators), generators


def normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, (len(generators), *shape) float32, on the generators' device: each sample comes from its
    own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=one, device=one.device) for one in generators])
