"""Mean and covariance of features: accumulated in float64, mergeable, and saved under ADM's names."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.evaluation.metrics import require_covariance
from ddt_fast.files import atomic_file
from ddt_fast.wording import one_line, plural


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features.

    Attributes:
        mu: (D,) float64.
        sigma: (D, D) float64, unbiased.
    """

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]


class RunningStatistics:
    """Mean and covariance of rows that come batch by batch, in float64, on the rows' device.

    Batches are combined by the method of Chan, Golub and LeVeque (1979), so that no sum of squares loses its digits;
    the statistics of different rows merge.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of the outer products of centred rows

    def add(self, rows: Tensor) -> None:
        """Add rows (B, D) of any floating dtype; ValueError for another D than before, or numbers that are not
        finite."""
        if rows.ndim != 2:
            raise ValueError(f"features have shape {tuple(rows.shape)}; expected (B, D)")
        if not len(rows):
            return
        rows = rows.double()
        if not rows.isfinite().all():
            raise ValueError("features that are not finite cannot be scored")
        mean = rows.mean(0)
        shift = self._shift_mean(len(rows), mean)
        # One pass over the scatter matrix, which is far larger than the rows.
        updates = torch.cat([rows - mean, shift[None]])
        self.scatter.addmm_(updates.T, updates)

    def merge(self, other: Self) -> None:
        """Add all rows of `other`; ValueError for another D."""
        if other.count:
            shift = self._shift_mean(other.count, other.mean)
            self.scatter.add_(other.scatter.to(shift.device)).addr_(shift, shift)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance; ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance of {plural(self.count, 'row')} does not exist; expected 2 or more")
        return Gaussian(self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy())

    def _shift_mean(self, count: int, mean: Tensor) -> Tensor:
        """Include `count` rows with this mean; return (D,), whose outer product must be added to the scatter."""
        if not self.count:
            self.mean = torch.zeros_like(mean)
            self.scatter = mean.new_zeros(len(mean), len(mean))
        if mean.shape != self.mean.shape:
            raise ValueError(f"features have {plural(len(mean), 'number')}, those before {len(self.mean)}")
        total = self.count + count
        delta = mean.to(self.mean.device) - self.mean
        shift = delta * (self.count * count / total) ** 0.5
        self.mean = self.mean + delta * (count / total)
        self.count = total
        return shift


def save_statistics(path: Path, pool: Gaussian, spatial: Gaussian | None, count: int | None) -> None:
    """Write an npz with ADM's names: mu, sigma (FID), mu_s, sigma_s (sFID, if any); and num_images, if known."""
    arrays: dict[str, NDArray[Any]] = {"mu": pool.mu, "sigma": pool.sigma}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mu, "sigma_s": spatial.sigma}
    if count is not None:
        arrays["num_images"] = np.array(count)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def load_statistics(path: Path) -> tuple[Gaussian | None, Gaussian | None, int | None]:
    """FID's Gaussian, sFID's Gaussian and the number of images in an npz, as far as it holds them. ValueError if the
    file is damaged, a Gaussian is incomplete, or arrays cannot be a mean and a covariance."""
    try:
        if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle
            raise EOFError("it is not an npz, or is truncated")
        with np.load(path, allow_pickle=False) as archive:
            held = [name for name in ("mu", "sigma", "mu_s", "sigma_s", "num_images") if name in archive.files]
            found = {name: _read_array(path, archive, name) for name in held}
    except (OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}; expected an npz with mu and sigma") from error
    count = found.get("num_images")
    if count is not None and (count.shape or not np.issubdtype(count.dtype, np.integer) or count < 2):
        given = f"{count.dtype} {count.shape}" if count.shape or count.dtype.kind != "i" else int(count)
        raise ValueError(f"{path}: num_images is {given}; expected a whole number, 2 or more")
    pool, spatial = _gaussian(path, found, "mu", "sigma"), _gaussian(path, found, "mu_s", "sigma_s")
    return pool, spatial, None if count is None else int(count)


def _read_array(path: Path, archive: Any, name: str) -> NDArray[Any]:
    try:
        return archive[name]
    except ValueError as error:
        # NumPy's message for an array of objects advises to allow pickles.
        objects = "it holds Python objects, which may run code and were not opened"
        problem = objects if "allow_pickle" in str(error) else one_line(error)
        raise ValueError(f"{path}: {name} cannot be read: {problem}; expected an array of numbers") from error


def _gaussian(path: Path, found: dict[str, NDArray[Any]], mu_name: str, sigma_name: str) -> Gaussian | None:
    mu, sigma = found.get(mu_name), found.get(sigma_name)
    if mu is None and sigma is None:
        return None
    if mu is None or sigma is None:
        missing, there = (mu_name, sigma_name) if mu is None else (sigma_name, mu_name)
        raise ValueError(f"{path} holds {there} but no {missing}; expected both")
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        shapes = f"{mu_name} has shape {mu.shape}, {sigma_name} {sigma.shape}"
        raise ValueError(f"{path}: {shapes}; expected (D,) and (D, D) with D of 1 or more")
    for name, array in ((mu_name, mu), (sigma_name, sigma)):
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{path}: {name} is {array.dtype}; expected floating point")
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
    require_covariance(f"{path}: {sigma_name}", sigma)
    return Gaussian(mu.astype(np.float64), sigma.astype(np.float64))
