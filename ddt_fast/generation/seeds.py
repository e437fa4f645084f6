"""Which class and which seed belong to draw number i, and where in the file of samples it goes.

Draws go round the classes. A file in that order would suit a grid, but scores that split a file into contiguous parts
(ADM's Inception Score) want the classes mixed: a fixed permutation gives every draw its position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]


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


def shuffled_order(count: int) -> IntArray:
    """(count,) int64, a fixed permutation: position p of a shuffled file holds draw number order[p].

    Draws are sorted by a hash of their number, SplitMix64 (Steele, Lea, Flood 2014), which has no two alike: the order
    is the same whatever the machine or the version of a library, and that of fewer draws is the same order with the
    others left out.
    """
    z = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Job:
    """What to generate, in the order of the file of samples.

    Attributes:
        labels, seeds: (N,) int64; sample p is the image of seeds[p] and labels[p].
        order: (N,) int64; sample p is draw number order[p].
    """

    labels: IntArray
    seeds: IntArray
    order: IntArray

    @classmethod
    def of_draws(cls, labels: Tensor, seeds: Sequence[int], *, shuffle: bool) -> Job:
        """The job of draws with these labels (N,) and N seeds: in their order, or in `shuffled_order`."""
        order = shuffled_order(len(labels)) if shuffle else np.arange(len(labels), dtype=np.int64)
        return cls(labels.numpy()[order], np.asarray(seeds, dtype=np.int64)[order], order)

    def __len__(self) -> int:
        return len(self.labels)

    def first_draws(self, count: int) -> IntArray:
        """The positions of the first `count` draws (or all): as class-balanced as so few can be."""
        positions = np.empty(len(self), dtype=np.int64)
        positions[self.order] = np.arange(len(self))
        return positions[:count]
