"""One seed, one image: which class and which noise belong to sample number i, whatever the batch or the machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddt_fast.sampling.engine import normal


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """The starting noise of each seed, and its generator for whatever a stochastic solver draws later.

    Args:
        seeds: one per sample.
        shape: (channels, height, width).

    Returns:
        (len(seeds), *shape) float32 on the CPU, and as many CPU generators.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return normal(shape, generators), generators


def assign_labels(num_images: int, num_classes: int, classes: Sequence[int] | None = None) -> Tensor:
    """(num_images,) int64 labels that go round the given classes (None: all), as evenly as the count allows.

    Raises:
        ValueError: a class out of range.
    """
    wrong = [label for label in classes or () if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"class {wrong[0]} does not exist; allowed: 0 to {num_classes - 1}")
    chosen = torch.tensor(list(classes or range(num_classes)), dtype=torch.int64)
    return chosen[torch.arange(num_images) % len(chosen)]
