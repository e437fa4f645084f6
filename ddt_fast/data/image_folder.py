"""Images in class folders, as in ImageNet, and the crop that ADM and its successors train on."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ddt_fast.class_names import class_order

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

Images = NDArray[np.uint8]
"""(N, H, W, 3) RGB."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder with one sub-folder per class.

    Attributes:
        root: the folder.
        class_names: sub-folder names, in `class_order`; a label is an index into them.
        files: paths relative to root with forward slashes, sorted within a class, class after class.
        labels: the class of each file.
        ignored: files below root that are not named like images.
    """

    root: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    ignored: tuple[str, ...]


def find_images(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """For a folder and each one below it: its path, its images and its other files, told apart by name. Hidden folders
    are skipped, and hidden files are not images."""
    for place, inner, names in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        images = [name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS and name[0] != "."]
        yield Path(place), images, sorted({*names} - {*images})


def list_images(root: Path, class_names: Sequence[str] = ()) -> ImageFolder:
    """List every image below the sub-folders of root (see `find_images`); nothing is opened. Classes are in
    `class_order`, or that of class_names, if these are all of them. ValueError if root is not a folder, has no
    sub-folders, or a sub-folder holds no images."""
    if not root.is_dir():
        raise ValueError(f"image folder {root} {'is not a folder' if root.exists() else 'does not exist'}")
    with os.scandir(root) as scan:
        entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    folders = class_order(entry.name for entry in entries if entry.is_dir())
    # A cache of before numbers were in numeric order keeps its own.
    class_names = tuple(class_names) if sorted(class_names) == sorted(folders) else folders
    if not class_names:
        raise ValueError(f"image folder {root} holds no class folders; expected one folder of images per class")
    files: list[str] = []
    labels: list[int] = []
    ignored = [entry.name for entry in entries if not entry.is_dir()]
    for label, name in enumerate(class_names):
        found: list[str] = []
        for folder, images, others in find_images(root / name):
            place = folder.relative_to(root).as_posix()
            found += [f"{place}/{file}" for file in images]
            ignored += [f"{place}/{file}" for file in others]
        if not found:
            raise ValueError(
                f"class folder {root / name} holds no images; allowed: {', '.join(sorted(EXTENSIONS))} (or remove it)"
            )
        files += sorted(found)
        labels += [label] * len(found)
    return ImageFolder(root, class_names, tuple(files), tuple(labels), tuple(sorted(ignored)))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` and take the middle size x size pixels, as ADM does (arXiv 2105.05233,
    guided-diffusion): halve with a box filter while the side is at least 2 * size, then resize bicubically."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message says why, without the path."""


def read_image(path: Path, size: int) -> Tensor:
    """Read the centre crop of an image file, (3, size, size) uint8 RGB. UnreadableImageError if the file is missing,
    unreadable, truncated, or not an image."""
    try:
        with Image.open(path) as image:
            cropped = center_crop(image.convert("RGB"), size)
    except UnidentifiedImageError:
        raise UnreadableImageError("not an image that Pillow can read") from None
    except MemoryError:
        raise
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    except Exception as error:  # a decoder may raise anything on damaged bytes: SyntaxError, IndexError, …
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error
    # Transposed by NumPy: torch would start threads, which would wait for those of other images.
    return torch.from_numpy(np.array(np.asarray(cropped).transpose(2, 0, 1), order="C"))
