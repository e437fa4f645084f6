"""Which class belongs to sample number i."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
