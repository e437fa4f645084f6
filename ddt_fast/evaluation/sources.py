"""What can be scored: an npz of images or statistics, or a folder of images, read a batch at a time."""

import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddt_fast.checks import require_int, require_path
from ddt_fast.data.image_folder import EXTENSIONS, Images, center_crop, find_images
from ddt_fast.evaluation.statistics import Gaussian, load_statistics

_CLASS_IN_NAME = re.compile(r"_class_(\d+)_")


@dataclass(frozen=True)
class ImageSource:
    """Images of one size, in a file or a folder.

    Attributes:
        path: the npz, or the folder.
        count: number of images.
        size: height and width.
        labels: (count,) classes, if known.
        files: the files of a folder, in order; None for an npz.
        crop: side of the centre crop of a folder's images; None takes them whole.
    """

    path: Path
    count: int
    size: tuple[int, int]
    labels: NDArray[np.int64] | None
    files: tuple[Path, ...] | None
    crop: int | None = None

    def batches(self, batch_size: int) -> Iterator[Images]:
        """All images in order, (up to batch_size, H, W, 3) uint8, with one batch in memory at a time; ValueError for
        damaged or truncated data."""
        return self._from_npz(batch_size) if self.files is None else self._from_folder(self.files, batch_size)

    @property
    def sorted_by_class(self) -> bool:
        """Whether there are several classes, one after another."""
        labels = self.labels
        return labels is not None and len(labels) > 1 and bool((np.diff(labels) >= 0).all()) and labels[0] != labels[-1]

    def _from_npz(self, batch_size: int) -> Iterator[Images]:
        shape = (*self.size, 3)
        image_bytes = self.size[0] * self.size[1] * 3
        try:
            # Read as a stream, not mapped: a map's pages count as memory of the process, and the archive's checksum
            # would not be compared.
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                _read_header(stream)
                for start in range(0, self.count, batch_size):
                    count = min(batch_size, self.count - start)
                    data = stream.read(count * image_bytes)
                    if len(data) < count * image_bytes:
                        raise ValueError(f"{self.path}: arr_0 ends at image {start + len(data) // image_bytes}")
                    yield np.frombuffer(data, dtype=np.uint8).reshape(count, *shape)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error

    def _from_folder(self, files: tuple[Path, ...], batch_size: int) -> Iterator[Images]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, self.count, batch_size):
                yield np.stack(list(pool.map(self._read, files[start : start + batch_size])))

    def _read(self, file: Path) -> Images:
        with _opened(file) as image:
            whole = image.convert("RGB")
            return np.asarray(whole if self.crop is None else center_crop(whole, self.crop))


@dataclass(frozen=True)
class Source:
    """Images, statistics, or both.

    Attributes:
        path: the npz, or the folder.
        images: None for a file that holds only statistics.
        pool, spatial: the file's statistics for FID and sFID, if any.
        statistics_count: number of images behind the statistics, if the file says it.
    """

    path: Path
    images: ImageSource | None
    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    statistics_count: int | None = None


def open_source(path: str | Path, crop: int | None = None) -> Source:
    """Open a file or folder. Of a folder's images only the sizes are read, so that different sizes are found before any
    work is done. ValueError if the path is none of these, is damaged, or holds images of different sizes without a
    crop.

    Args:
        path: an npz with arr_0, (N, H, W, 3) uint8 (and optionally their classes: labels, or arr_1 as in ADM), with mu
            and sigma (mu_s, sigma_s), or with all of them, like ADM's reference batches; or a folder of images, with
            its sub-folders.
        crop: side of the centre crop, as in `ddt_fast.cache_latents` and ADM, for the images of a folder; an npz is not
            cropped.
    """
    path = require_path("a source of images", path)
    if crop is not None:
        require_int("center_crop", crop, 1)
    if path.is_dir():
        return Source(path, _open_folder(path, crop))
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected an npz or a folder of images")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an npz, or is truncated; expected an npz or a folder of images")
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            images = _open_npz(path, archive, names) if "arr_0" in names else None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    pool, spatial, count = load_statistics(path)
    if images is None and pool is None:
        held = ", ".join(sorted(names)) or "nothing"
        raise ValueError(f"{path} holds {held}; expected arr_0 (images), or mu and sigma (statistics)")
    return Source(path, images, pool, spatial, count)


def open_sources(paths: Sequence[str | Path | None], crop: int | None) -> list[Source]:
    """Open the paths that are not None; ValueError as `open_source`, or for a crop without a folder to crop."""
    sources = [open_source(path, crop) for path in paths if path is not None]
    if crop is not None and not any(source.path.is_dir() for source in sources):
        raise ValueError(f"center_crop is for folders of images; {sources[-1].path} is not one")
    return sources


def _open_npz(path: Path, archive: zipfile.ZipFile, names: set[str]) -> ImageSource:
    with archive.open("arr_0.npy") as stream:
        shape, fortran_order, dtype = _read_header(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"{path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, 3)")
    if fortran_order:
        raise ValueError(f"{path}: arr_0 is in Fortran order; expected C order")
    labels = _labels(path, archive, shape[0], "labels") if "labels" in names else None
    if labels is None and "arr_1" in names:
        labels = _labels(path, archive, shape[0], "arr_1")
    return ImageSource(path, shape[0], (shape[1], shape[2]), labels, None)


def _labels(path: Path, archive: zipfile.ZipFile, count: int, name: str) -> NDArray[np.int64]:
    with archive.open(f"{name}.npy") as stream:
        labels = np.lib.format.read_array(stream, allow_pickle=False)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: {name} (labels) is {labels.dtype} {labels.shape}; expected integers ({count},)")
    return labels.astype(np.int64)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _open_folder(path: Path, crop: int | None) -> ImageSource:
    files = sorted(folder / name for folder, images, _ in find_images(path) for name in images)
    if not files:
        raise ValueError(f"folder {path} holds no images; allowed: {', '.join(sorted(EXTENSIONS))}")
    matches = [_CLASS_IN_NAME.search(file.name) for file in files]
    labels = np.array([int(match[1]) for match in matches if match], dtype=np.int64)
    size = _common_size(files) if crop is None else (crop, crop)
    known = len(labels) == len(files)
    return ImageSource(path, len(files), size, labels if known else None, tuple(files), crop)


def _common_size(files: list[Path]) -> tuple[int, int]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sizes = pool.map(_image_size, files)
        first = height, width = next(sizes)
        for file, size in zip(files[1:], sizes, strict=True):
            if size != first:
                seen = f"{file} has {size[1]}x{size[0]} pixels, {files[0].name} {width}x{height}"
                raise ValueError(f"{seen}; expected one size; `center_crop` crops a folder's images to one")
    return first


def _image_size(file: Path) -> tuple[int, int]:
    with _opened(file) as image:
        return image.height, image.width


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise ValueError(f"{file} cannot be read: {error}") from error
