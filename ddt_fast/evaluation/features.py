"""From images to the features that metrics need: extractors, and an accumulator that takes images batch by batch."""

import functools
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.checks import require_int
from ddt_fast.data.image_file import Images
from ddt_fast.evaluation.inception import full_float32
from ddt_fast.evaluation.inception_weights import WEIGHTS_FILE, load_inception
from ddt_fast.evaluation.names import Features, check_features
from ddt_fast.evaluation.statistics import Gaussian, RunningStatistics
from ddt_fast.files import atomic_file
from ddt_fast.provenance import device_name
from ddt_fast.weight_files import read_pickle
from ddt_fast.wording import one_line, plural

_MAX_PIXEL_DIM = 4096
_STATE = ("size", "_features", "_feature_indices", "_indices")


class Extractor(Protocol):
    """Features of images.

    Attributes:
        name: their name.
        device: where they are computed.
        description: where they come from, as plain JSON values.
    """

    name: str
    device: torch.device
    description: dict[str, Any]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) uint8 → FID's features (B, D), and sFID's (B, S) or None."""

    def probabilities(self, pool: Tensor) -> Tensor | None:
        """Class probabilities (B, classes) from FID's features, for the Inception Score; None without classes."""


class InceptionExtractor:
    """pool_3 (2048) and mixed_6/conv (2023) of the Inception network, in float32.

    Args:
        weights: the file of its weights; None: from torch's cache, else downloaded (see `load_inception`).
        device: where it runs.
    """

    name = "inception"

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network, self.weights = load_inception(weights, self.device)
        if not self.weights.published:
            warnings.warn(
                f"{self.weights.path} is not {WEIGHTS_FILE}: no published score was computed with it", stacklevel=2
            )
        self.description: dict[str, Any] = {
            "name": self.name,
            "weights": str(self.weights.path),
            "sha256": self.weights.sha256,
            "published_weights": self.weights.published,
            "device": device_name(self.device),
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with full_float32():
            return self.network(images.to(self.device))

    @torch.no_grad()
    def probabilities(self, pool: Tensor) -> Tensor:
        """(B, 1008) float32."""
        with full_float32():
            return torch.cat([self.network.probabilities(part.to(self.device)) for part in pool.split(4096)])


class PixelExtractor:
    """Grey pixels in [-1, 1], the means over the channels, as the features of small images."""

    name = "pixels"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.description: dict[str, Any] = {"name": self.name, "device": device_name(self.device)}

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        if (dims := images.shape[2] * images.shape[3]) > _MAX_PIXEL_DIM:
            raise ValueError(f"pixel features of {plural(dims, 'pixel')} are too many; allowed: up to {_MAX_PIXEL_DIM}")
        return images.to(self.device).float().mean(1).flatten(1) / 127.5 - 1, None

    def probabilities(self, pool: Tensor) -> None:
        """None: pixels have no classes."""


def extractor_maker(features: Features, weights: str | Path | None, device: torch.device) -> Callable[[], Extractor]:
    """A function that makes the extractor, once; ValueError as `check_features`."""
    check_features(features, weights)
    if features == "pixels":
        return lambda: PixelExtractor(device)
    return functools.cache(lambda: InceptionExtractor(weights, device))


@dataclass(frozen=True)
class FeatureSet:
    """What is known of a set of images.

    Attributes:
        source: where it comes from, in words.
        count: number of images; None if a statistics file does not say.
        size: their height and width; None without images.
        pool: FID's Gaussian.
        spatial: sFID's Gaussian.
        features: (N, D) float32 features of FID, in the order of the images; possibly of only some of them.
        probabilities: (N, classes) float32.
        statistics_count: number of images behind `pool`; None if unknown.
        extractor: description of the extractor; None for statistics from a file.
        seconds: time to read the images and compute the features.
    """

    source: str
    count: int | None = None
    size: tuple[int, int] | None = None
    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    features: Tensor | None = None
    probabilities: Tensor | None = None
    statistics_count: int | None = None
    extractor: dict[str, Any] | None = None
    seconds: float | None = None


class FeatureAccumulator:
    """Takes images batch by batch and keeps what metrics need: statistics, and features (8 KiB per image).

    The accumulators of several ranks merge into one; up to rounding, the result does not depend on the batches or on
    which rank had which image.

    Args:
        extractor: turns images into features.
        batch_size: images per call of the extractor.
        keep_features: whether to keep features; FID and sFID need only statistics, whose size is fixed. Or the indices
            of the images whose features to keep.
    """

    def __init__(
        self, extractor: Extractor, batch_size: int = 64, keep_features: bool | Collection[int] = True
    ) -> None:
        require_int("batch_size", batch_size, 1)
        self.extractor, self.batch_size, self.keep_features = extractor, batch_size, keep_features
        self.size: tuple[int, int] | None = None
        self._pool, self._spatial = RunningStatistics(), RunningStatistics()
        self._features: list[Tensor] = []
        self._feature_indices: list[int] = []
        self._indices: list[int] = []

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def indices(self) -> NDArray[np.int64]:
        """(n,) places of the images taken so far, in the order of their arrival."""
        return np.array(self._indices, dtype=np.int64)

    def add(self, images: Images | Tensor, indices: Sequence[int] | None = None) -> None:
        """Add images (B, H, W, 3) uint8, all of one size. ValueError if the shape, dtype or size is wrong, or features
        are not finite.

        Args:
            images: any number of them.
            indices: their places among all images; None continues after the previous ones.
        """
        batch = images if isinstance(images, Tensor) else torch.tensor(images)
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[3] != 3 or 0 in batch.shape[1:]:
            raise ValueError(f"images are {batch.dtype} {tuple(batch.shape)}; expected uint8 (B, H, W, 3)")
        if indices is not None and len(indices) != len(batch):
            raise ValueError(f"{len(indices)} indices for {len(batch)} images")
        self._take_size((batch.shape[1], batch.shape[2]))
        places = list(range(len(self), len(self) + len(batch)) if indices is None else map(int, indices))
        for start in range(0, len(batch), self.batch_size):
            part = slice(start, start + self.batch_size)
            pool, spatial = self.extractor(batch[part].permute(0, 3, 1, 2))
            self._pool.add(pool)
            if spatial is not None:
                self._spatial.add(spatial)
            self._keep(pool, places[part])
        self._indices += places

    def merge(self, other: Self) -> None:
        """Add the content of another accumulator; ValueError if its features or image size are of another kind."""
        if other._kind != self._kind:
            raise ValueError(f"features of {other._kind} cannot be merged with those of {self._kind}")
        if other.size is not None:
            self._take_size(other.size)
        self._pool.merge(other._pool)
        self._spatial.merge(other._spatial)
        self._features += other._features
        self._feature_indices += other._feature_indices
        self._indices += other._indices

    def finish(self, source: str) -> FeatureSet:
        """The result, with features in the order of the indices. ValueError if an index came twice, or a merged
        accumulator did not keep its features."""
        places = np.sort(self.indices)
        if (repeated := places[1:][np.diff(places) == 0]).size:
            raise ValueError(f"image {repeated[0]} was added twice")
        if self.keep_features is True and len(self._feature_indices) < len(self):
            raise ValueError(
                f"{len(self) - len(self._feature_indices)} of {plural(len(self), 'image')} have no features"
            )
        features = None
        if self._features:
            features = torch.cat(self._features)[torch.tensor(self._feature_indices).argsort()]
        return FeatureSet(
            source=source,
            count=len(self),
            size=self.size,
            pool=self._pool.gaussian() if self._pool.count > 1 else None,
            spatial=self._spatial.gaussian() if self._spatial.count > 1 else None,
            features=features,
            statistics_count=len(self),
            extractor=self.extractor.description,
            probabilities=None if features is None else self.extractor.probabilities(features),
        )

    def save(self, path: Path) -> None:
        """Write the content for `load` in another process, whole or not at all."""
        state = {name: value for name, value in vars(self).items() if name in _STATE}
        parts = {"kind": self._kind, "pool": vars(self._pool), "spatial": vars(self._spatial)}
        with atomic_file(path) as temporary:
            torch.save(state | parts, temporary)

    def load(self, path: Path) -> None:
        """Add what `save` wrote; ValueError if the file is damaged, or its features are of another network."""
        part = type(self)(self.extractor, self.batch_size, self.keep_features)
        state = read_pickle("features", path, "a file that FeatureAccumulator.save wrote", self.extractor.device)
        try:
            kind = state["kind"]
            vars(part).update({name: state[name] for name in _STATE})
            vars(part._pool).update(state["pool"])
            vars(part._spatial).update(state["spatial"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
        if kind != self._kind:
            raise ValueError(f"{path} holds features of {kind}; expected {self._kind}")
        self.merge(part)

    @property
    def _kind(self) -> str:
        return kind_of_features(self.extractor.description)

    def _keep(self, pool: Tensor, places: list[int]) -> None:
        kept = self.keep_features
        rows = [row for row, place in enumerate(places) if kept is True or (kept is not False and place in kept)]
        if rows:
            self._features.append(pool if len(rows) == len(pool) else pool[rows])
            self._feature_indices += [places[row] for row in rows]

    def _take_size(self, size: tuple[int, int]) -> None:
        if self.size not in (None, size):
            (height, width), (given_height, given_width) = self.size or size, size
            raise ValueError(f"images of {given_width}x{given_height} pixels after images of {width}x{height}")
        self.size = size


def kind_of_features(description: dict[str, Any]) -> str:
    """What two extractors must have in common for their features to be compared."""
    return str(description.get("sha256", description["name"]))
