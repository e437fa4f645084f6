"""The embedded data set: scikit-learn's 1,797 hand-written digits, 8x8 grey, 17 levels, 10 classes."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

from ddt_fast.config import DataConfig

LEVELS = 16


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) float32 in [-1, 1] and labels (1797,) int64."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / (LEVELS / 2) - 1
    return images, torch.from_numpy(bunch.target).long()


class DigitsDataset:
    """The digits as a `DataSource`: pixels in place of latents."""

    has_flips = False
    feature_shape: tuple[int, int] | None = None
    fingerprint = "digits"

    def __init__(self) -> None:
        images, self.labels = digits()
        self._images = images.numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def described(self, data: DataConfig) -> DataConfig:
        """The settings as they are."""
        return data

    def draw(self, indices: NDArray[np.int64], flips: NDArray[np.bool_], seeds: NDArray[np.uint64]) -> Tensor:
        """(n, 1, 8, 8) float32: the images of these indices, neither flipped nor random."""
        # Indexed by NumPy: torch would start OpenMP threads for each of the loader's threads. With more threads than
        # cores, OpenMP lets all of them sleep between operations, which halves the speed of training on a CPU.
        return torch.from_numpy(self._images[indices])

    def features(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> Tensor:
        """The digits have none."""
        raise ValueError("the digits have no features for REPA")
