"""The embedded data set: scikit-learn's 1,797 hand-written digits, 8x8 grey, 17 levels, 10 classes."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

LEVELS = 16


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) float32 in [-1, 1] and labels (1797,) int64."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / (LEVELS / 2) - 1
    return images, torch.from_numpy(bunch.target).long()
