"""The class and the seed of draw number i, and its position in the file of samples.

Draws cycle through the classes. That order suits a grid, but scores that split a file into contiguous parts (ADM's
Inception Score) need the classes mixed: a fixed permutation gives every draw its position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.class_names import ClassNames
from ddt_fast.generation.settings import Draws
from ddt_fast.splitmix import GOLDEN, mix
from ddt_fast.wording import plural, warn

GRID_IMAGES = 100
"""Images in a job's grid.png."""

IntArray = NDArray[np.int64]


def assign_labels(num_images: int, num_classes: int, classes: Sequence[int] | None = None) -> Tensor:
    """(num_images,) int64 labels that cycle through the given classes (None: all); ValueError for a class out of
    range."""
    wrong = [label for label in classes or () if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"class {wrong[0]} does not exist; allowed: 0 to {num_classes - 1}")
    chosen = torch.tensor(list(classes or range(num_classes)), dtype=torch.int64)
    return chosen[torch.arange(num_images) % len(chosen)]


def shuffled_order(count: int) -> IntArray:
    """(count,) int64, a fixed permutation: position p of a shuffled file holds draw number order[p].

    Draws are sorted by a hash of their number: the order is the same on every machine and with every library version,
    and fewer draws have the same order without the others.
    """
    return np.argsort(mix(np.arange(count, dtype=np.uint64) * GOLDEN), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Assignment:
    """The labels and seeds of a job, in the order of the file of samples.

    Attributes:
        labels, seeds: (N,) int64, of sample p.
        order: (N,) int64; sample p is draw number order[p].
        words: what was asked for, in plain JSON values: part of a job's fingerprint.
        names: label → the class's name, for captions.
    """

    labels: IntArray
    seeds: IntArray
    order: IntArray
    words: dict[str, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of_draws(cls, labels: Tensor, seeds: Sequence[int], *, shuffle: bool, **more: Any) -> Self:
        """Draws with these labels (N,) and N seeds, in this order or in `shuffled_order`; `more`: words and names."""
        order = shuffled_order(len(labels)) if shuffle else np.arange(len(labels), dtype=np.int64)
        return cls(labels.numpy()[order], np.asarray(seeds, dtype=np.int64)[order], order, **more)

    def __len__(self) -> int:
        return len(self.labels)

    def first_draws(self, count: int) -> IntArray:
        """The positions of the first `count` draws, or of all: they are balanced over the classes."""
        return np.argsort(self.order)[:count]


def assign(draws: Draws, names: ClassNames, default_count: int) -> Assignment:
    """The assignment that `draws` asks for, of `default_count` images if it gives no number. ValueError if a class or a
    seed is out of range, or there is not one seed per image."""
    classes = None if draws.classes is None else names.labels(draws.classes)
    for label in classes or ():
        others = [other for other, name in names.id2label.items() if name == str(label) != names.id2label.get(label)]
        if others:
            warn(f"class {label} is label {label}, {names.short(label)!r}; the class named {label} is {others[0]}")
    num_chosen = len(classes or range(names.num_classes))
    seeds = draws.seeds or [seed for seed in draws.class_seeds or () for _ in range(num_chosen)]
    per_class = draws.seeds_per_class
    count = draws.num_images or len(seeds) or (default_count if per_class is None else per_class * num_chosen)
    if seeds and len(seeds) != count:
        raise ValueError(f"`seeds` holds {plural(len(seeds), 'seed')} for {plural(count, 'image')}; give one per image")
    first_seed = draws.first_seed or 0
    for seed in seeds or (first_seed, first_seed + count - 1):
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} does not exist; allowed: 0 to 2^63 - 1")
    labels = assign_labels(count, names.num_classes, classes)
    # Named seeds keep their order, and so do small numbers of images, which are for looking at.
    shuffle = draws.seeds is None and count > GRID_IMAGES
    words: dict[str, Any] = {
        "num_images": count,
        "classes": classes or "all",
        "seeds": list(draws.seeds) if draws.seeds else f"{first_seed} and up",
        "order": "shuffled" if shuffle else "as drawn",
    }
    if draws.class_seeds:
        words["seeds"] = {"of every class": list(draws.class_seeds)}
    seeds = seeds or range(first_seed, first_seed + count)
    captions = {label: names.short(label) for label in names.id2label}
    return Assignment.of_draws(labels, seeds, shuffle=shuffle, words=words, names=captions)
