"""What can be scored: an npz of images or statistics, or a folder of images, read a batch at a time."""

import os
import posixpath
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddt_fast.checks import require_int, require_path
from ddt_fast.data.image_file import Images, UnreadableImageError, check_image
from ddt_fast.data.image_folder import WANTED, ImageFiles, check_source, find_images
from ddt_fast.evaluation.statistics import Gaussian, load_statistics
from ddt_fast.files import read_json
from ddt_fast.wording import plural

_CHECKED_AT_ONCE = 256
_CLASS_IN_NAME = re.compile(r"_class_(\d+)_")
SAMPLES, RECORD = "samples.npz", "generation.json"
"""What `ddt_fast.sample` writes into its folder."""
# Pictures that the commands draw, by what lies beside them.
_GRIDS = {
    r"grid\.png": RECORD,
    r"similarity\.png": "similarity.json",
    r"samples\.png": "recipe.yaml",
    r"curves\.png": "log.jsonl",
    r"\w+_step_\d+\.png": "../recipe.yaml",
}


@dataclass(frozen=True)
class ImageSource:
    """Images of one size, in a file or a folder.

    Attributes:
        path: the npz, or the folder.
        count: number of images.
        size: height and width.
        labels: (count,) classes, if known.
        files: the images of a folder; None for an npz.
        crop: side of the centre crop of a folder's images; None takes them whole.
        unreadable: images of a folder that are left out, and why.
    """

    path: Path
    count: int
    size: tuple[int, int]
    labels: NDArray[np.int64] | None
    files: ImageFiles | None
    crop: int | None = None
    unreadable: tuple[tuple[str, str], ...] = ()

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

    def _from_folder(self, files: ImageFiles, batch_size: int) -> Iterator[Images]:
        def read(name: str) -> Images:
            try:
                return files.read(name, self.crop)
            except UnreadableImageError as error:
                raise ValueError(f"{files.root / name} cannot be read: {error}") from error

        with _threads() as pool:
            for start in range(0, self.count, batch_size):
                yield np.stack(list(pool.map(read, files.names[start : start + batch_size])))


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


def open_source(path: str | Path, crop: int | None = None, skip_unreadable: bool = False) -> Source:
    """Open a file or folder. A folder's images are decoded once, JPEGs at an eighth of their size, so that different
    sizes and damaged files are found before any work is done.

    Args:
        path: an npz with arr_0, (N, H, W, 3) uint8 (and optionally their classes: labels, or arr_1 as in ADM), with mu
            and sigma (mu_s, sigma_s), or with all of them, like ADM's reference batches; or a folder of images, with
            its sub-folders, tars and .npy files, or one of these files. For the folder of `ddt_fast.sample`, its
            samples.npz is opened; grids of samples are not images.
        crop: side of the centre crop, as in `ddt_fast.cache_latents` and ADM, for the images of a folder; an npz is not
            cropped.
        skip_unreadable: leave out images of a folder that cannot be read, with a warning for each.

    Raises:
        ValueError: the path is none of these, is damaged, holds an image that cannot be read, or images of different
            sizes without a crop.
    """
    path = require_path("a source of images", path)
    if crop is not None:
        require_int("center_crop", crop, 1)
    if (path / RECORD).is_file() and (path / SAMPLES).is_file():
        path /= SAMPLES
    elif path.is_dir() or path.suffix.lower() in (".npy", ".tar"):
        check_source(path, "image folder")
        return Source(path, _open_folder(path, crop, skip_unreadable))
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


def open_sources(paths: Sequence[str | Path | None], crop: int | None, skip_unreadable: bool = False) -> list[Source]:
    """Open the paths that are not None; ValueError as `open_source`, or for a crop that changes nothing."""
    given = [path for path in paths if path is not None]
    sources = [open_source(path, crop, skip_unreadable) for path in given]
    # The folder of ddt_fast.sample stands for an npz, which is not cropped, but may have that size.
    folders = [
        source.images
        for path, source in zip(given, sources, strict=True)
        if Path(path).is_dir() or (source.images is not None and source.images.files is not None)
    ]
    if crop is not None and not any(images and images.size == (crop, crop) for images in folders):
        raise ValueError(f"center_crop is for folders of images; {sources[-1].path} is not one")
    return sources


def unreadable_images(source: Source) -> dict[str, list[dict[str, str]]]:
    """`unreadable`, the images that were left out and why, for the source's part of a report; empty if there are
    none."""
    left_out = () if source.images is None else source.images.unreadable
    return {"unreadable": [{"file": name, "reason": why} for name, why in left_out]} if left_out else {}


def _open_npz(path: Path, archive: zipfile.ZipFile, names: set[str]) -> ImageSource:
    with archive.open("arr_0.npy") as stream:
        shape, fortran_order, dtype = _read_header(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"{path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, 3)")
    if fortran_order:
        raise ValueError(f"{path}: arr_0 is in Fortran order; expected C order")
    labels, count = None, shape[0]
    if name := next((name for name in ("labels", "arr_1") if name in names), None):
        with archive.open(f"{name}.npy") as stream:
            labels = np.lib.format.read_array(stream, allow_pickle=False)
        if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{path}: {name} (labels) is {labels.dtype} {labels.shape}; expected integers ({count},)")
        labels = labels.astype(np.int64)
    return ImageSource(path, count, (shape[1], shape[2]), labels, None)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _open_folder(path: Path, crop: int | None, skip_unreadable: bool) -> ImageSource:
    files = find_images(path)
    if files.passed_over:
        warnings.warn(f"{path}: {files.passed_over}", stacklevel=4)
    reports = ".json" in files.others
    grids = {name for name in files.names if _is_grid(files.root / name, reports)}
    if grids:
        text = f"passed over {plural(len(grids), 'picture')} drawn by ddt-fast, such as {min(grids)}"
        warnings.warn(f"{path}: {text}", stacklevel=4)
    names = [name for name in files.names if name not in grids]
    if not names:
        raise ValueError(f"folder {path} holds no images; expected {WANTED}")
    sizes, unreadable = _check(files, names, skip_unreadable)
    for name, reason in unreadable.items():
        if not skip_unreadable:
            raise ValueError(f"{files.root / name} cannot be read: {reason}; `skip_unreadable` leaves it out")
        warnings.warn(f"{files.root / name} is left out: {reason}", stacklevel=4)
    if not sizes:
        raise ValueError(f"{path} holds {plural(len(names), 'image')}, none of which can be read")
    size = _common_size(files.root, sizes) if crop is None else (crop, crop)
    return ImageSource(
        path, len(sizes), size, _labels_in(files, sizes), replace(files, names=(*sizes,)), crop, (*unreadable.items(),)
    )


def _is_grid(file: Path, reports: bool) -> bool:
    """Whether a command drew the picture; `reports`: whether any .json lies in the folder, which may be a report."""
    if any(re.fullmatch(name, file.name) and (file.parent / record).is_file() for name, record in _GRIDS.items()):
        return True
    if not reports or file.suffix != ".png":
        return False
    try:  # a report of `ddt_fast.evaluate`, which may not exist
        return {"metrics", "not_computed"} <= read_json(file.with_suffix(".json")).keys()
    except (OSError, ValueError):
        return False


def _check(files: ImageFiles, names: list[str], to_the_end: bool) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The sizes of the images that can be read, and why the others cannot, both by name; to the end, or until some of
    them cannot."""

    def check(name: str) -> tuple[int, int] | str:
        try:
            return check_image(files.file(name), files.members.get(name))
        except UnreadableImageError as error:
            return str(error)

    sizes: dict[str, tuple[int, int]] = {}
    unreadable: dict[str, str] = {}
    with _threads() as pool, tqdm(total=len(names), desc="checking", unit="img", delay=2, dynamic_ncols=True) as bar:
        for start in range(0, len(names), _CHECKED_AT_ONCE):
            part = names[start : start + _CHECKED_AT_ONCE]
            for name, found in zip(part, pool.map(check, part), strict=True):
                if isinstance(found, str):
                    unreadable[name] = found
                else:
                    sizes[name] = found
            bar.update(len(part))
            if unreadable and not to_the_end:
                break
    return sizes, unreadable


def _common_size(root: Path, sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    first, (height, width) = next(iter(sizes.items()))
    for name, size in sizes.items():
        if size != (height, width):
            seen = f"{root / name} has {size[1]}x{size[0]} pixels, {Path(first).name} {width}x{height}"
            raise ValueError(f"{seen}; expected one size; `center_crop` crops a folder's images to one")
    return height, width


def _labels_in(files: ImageFiles, names: Iterable[str]) -> NDArray[np.int64] | None:
    """The classes in the images' names (as `ddt_fast.sample` gives them) or in their tars; None if one has none."""
    labels = []
    for name in names:
        member, match = files.members.get(name), _CLASS_IN_NAME.search(posixpath.basename(name))
        label = int(match[1]) if match else member and member.label
        if label is None:
            return None
        labels.append(label)
    return np.array(labels, dtype=np.int64)


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))
