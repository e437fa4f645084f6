"""The images below a folder: files, members of tars (WebDataset's), arrays in .npy files; and their classes."""

import functools
import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddt_fast.class_names import class_order
from ddt_fast.data.image_file import Member, is_stack, read_pixels
from ddt_fast.wording import plural

# Pillow knows them by name, but needs other programs for them, or does not decode them.
_NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
# A larger label is a mistake; the names of that many classes would fill the memory.
_MAX_CLASSES = 1_000_000
WANTED = "images (any that Pillow reads), WebDataset tars, .npy arrays"


@functools.cache
def extensions() -> frozenset[str]:
    """The endings of the files that Pillow decodes here, in lower case."""
    formats = Image.registered_extensions()
    return frozenset(end for end, name in formats.items() if name in Image.OPEN and name not in _NOT_DECODED)


@dataclass(frozen=True)
class ImageFiles:
    """All images below a folder, or in one tar or .npy file.

    Attributes:
        root: the folder, or the file's folder.
        names: of the images, sorted: paths below root with forward slashes; those in a tar or a .npy stack go on in it
            ("shards/000.tar/0001.jpg", "stack.npy/17").
        members: by name, those that are inside such files.
        others: files that are not named like images, by ending.
        links: links to folders that are among the images anyway, or that lead upwards; not followed.
    """

    root: Path
    names: tuple[str, ...]
    members: dict[str, Member]
    others: Counter[str]
    links: tuple[str, ...]

    def file(self, name: str) -> Path:
        """The file that is or holds an image."""
        member = self.members.get(name)
        return self.root / (name if member is None else member.file)

    def read(self, name: str, crop: int | None = None) -> NDArray[np.uint8]:
        """Read an image, (H, W, 3) uint8 RGB, or its centre crop; UnreadableImageError as `read_pixels`."""
        return read_pixels(self.file(name), crop, self.members.get(name))

    @property
    def passed_over(self) -> str | None:
        """What is not among the images, for a warning: "4 files not named like images: 1 .json, 3 .txt"."""
        parts = []
        if self.others:
            endings = ", ".join(f"{count:,} {end}" for end, count in sorted(self.others.items()))
            parts.append(f"{plural(self.others.total(), 'file')} not named like images: {endings}")
        if self.links:
            parts.append(f"{plural(len(self.links), 'link')} to folders that are read anyway, such as {self.links[0]}")
        return "passed over " + "; ".join(parts) if parts else None


def find_images(root: Path) -> ImageFiles:
    """Find all images below a folder, or in a tar or .npy file. Of tars and .npy files the indexes are read; images are
    not opened. Hidden folders are skipped, and hidden files are not images."""
    if root.is_dir():
        places, links = _real_folders(root)
    else:
        root, places, links = root.parent, [("", [root.name])], []
    names: list[str] = []
    members: dict[str, Member] = {}
    others: Counter[str] = Counter()
    for place, files in places:
        for file in files:
            path, end = place + file, _ending(file)
            if end == ".tar":
                try:
                    inside = _tar_members(root, path, others)
                except OSError as error:
                    inside = {path: Member(path, damage=error.strerror)}
                members |= inside
                names += inside
            elif end == ".npy":
                members |= (inside := _stack_members(root, path))
                names += inside or [path]
            elif end in extensions():
                names.append(path)
            else:
                others[end] += 1
    return ImageFiles(root, tuple(sorted(names, key=lambda name: name.split("/"))), members, others, tuple(links))


def _ending(file: str) -> str:
    if file.startswith("."):
        return "hidden"
    return os.path.splitext(file)[1].lower() or "without an ending"


def _real_folders(root: Path) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Every folder below root once, as its path with a slash at the end ("" for root) and its files' names; and the
    links that were not followed. A folder is known by device and inode, and counts where it really is: links are
    followed last."""
    top = root.resolve()
    seen = {_identity(folder) for folder in (top, *top.parents)}
    found: list[tuple[str, list[str]]] = []
    skipped: list[str] = []
    links: list[str] = []
    todo = [""]
    while todo or links:
        if not todo:
            link = links.pop(0)
            if (identity := _identity(root / link)) in seen:
                skipped.append(link.rstrip("/"))
                continue
            seen.add(identity)
            todo.append(link)
        place, files = todo.pop(), []
        with os.scandir(root / place) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        for entry in entries:
            if not _is_folder(entry):
                # A pipe or a device would be waited for; a link that leads nowhere is listed as unreadable.
                if entry.is_symlink() or entry.is_file():
                    files.append(entry.name)
            elif entry.name.startswith("."):
                continue
            elif entry.is_symlink():
                links.append(f"{place}{entry.name}/")
            elif (identity := _identity(Path(entry.path))) not in seen:
                seen.add(identity)
                todo.append(f"{place}{entry.name}/")
        found.append((place, files))
    return found, skipped


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _stack_members(root: Path, path: str) -> dict[str, Member]:
    """The rows of a stack in a .npy file, by name; empty for other files, which are images or unreadable."""
    try:
        array = np.load(root / path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return {}
    return {f"{path}/{row:06d}": Member(path, row) for row in range(len(array))} if is_stack(array) else {}


def _tar_members(root: Path, path: str, others: Counter[str]) -> dict[str, Member]:
    """The images of a tar by name, with the class in the .cls or .json beside each, as WebDataset keeps it: members
    belong together if their paths agree up to the first dot of the file name. Other members are counted in `others`.
    Of a damaged tar, the samples before the damage are kept, without the last, which may not be whole; the tar itself
    is listed as unreadable."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    found: dict[str, Member] = {}
    with (root / path).open("rb") as stream:
        end_mark = 0
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for entry in archive:
                    end_mark = entry.offset_data + -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    folder, name = posixpath.split(posixpath.normpath("/" + entry.name).lstrip("/"))
                    if entry.isfile() and name.startswith("."):
                        others["hidden"] += 1
                    elif entry.isfile():
                        stem, _, end = name.partition(".")
                        samples.setdefault(posixpath.join(folder, stem), {})[end] = entry.offset_data, entry.size
            stream.seek(end_mark)
            if any(stream.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"no header at byte {end_mark:,}")
        except (tarfile.TarError, OSError, EOFError) as error:
            found[path] = Member(path, damage=f"damaged tar: {error}")
            samples = dict([*samples.items()][:-1])
        for key, parts in samples.items():
            images = {end: place for end, place in parts.items() if _ending(f"x.{end}") in extensions()}
            others.update(_ending(f"x.{end}") for end in parts if end not in images and end not in ("cls", "json"))
            label, wrong = _label(stream, f"{path}/{key}", parts) if images else (None, None)
            # Beside an image there may be pictures that belong to it: 0001.jpg, 0001.seg.png.
            whole = {end: place for end, place in images.items() if "." not in end} or images
            for end, (start, length) in whole.items():
                found[f"{path}/{key}.{end}"] = Member(path, start, length, label, wrong_label=wrong)
    return found


def _label(stream: IO[bytes], name: str, parts: dict[str, tuple[int, int]]) -> tuple[int | None, str | None]:
    """The class of a sample of a tar: a whole number, the content of its .cls or "cls" in its .json; or why that is not
    a class."""
    label = None
    for end in ("cls", "json"):
        if end in parts and label is None:
            start, length = parts[end]
            stream.seek(start)
            content = stream.read(length)
            try:
                label = int(content.decode()) if end == "cls" else json.loads(content).get("cls")
                if label is not None and not (type(label) is int and 0 <= label < _MAX_CLASSES):
                    raise ValueError(f"the class is {label!r}")
            except (ValueError, AttributeError, RecursionError) as error:
                expected = f"a whole number, 0 to {_MAX_CLASSES - 1:,}"
                return None, f"{name}.{end} holds no class: {error}; expected {expected}"
    return label, None


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder and their classes.

    Attributes:
        images: all images found.
        class_names: label i is class_names[i].
        files: names of the images that have a class, in the order of the cache.
        labels: the class of each.
        passed_over: what is not among them, for a warning.
    """

    images: ImageFiles
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    passed_over: str | None = None

    def read(self, index: int, size: int) -> Tensor:
        """Read the centre crop of an image, (3, size, size) uint8 RGB; UnreadableImageError as `read_pixels`."""
        return _channels_first(self.images.read(self.files[index], size))


def read_image(path: Path, size: int) -> Tensor:
    """Read the centre crop of an image file, (3, size, size) uint8 RGB; UnreadableImageError as `read_pixels`."""
    return _channels_first(read_pixels(path, size))


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    # Transposed by NumPy: torch would start threads, which would wait for those of other images.
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def list_images(root: Path, class_names: Sequence[str] = ()) -> ImageFolder:
    """List the images below a folder (see `find_images`) with their classes, which are, in this order:
    the numbers in a tar's .cls or .json members (an image with a wrong one is unreadable); the sub-folders of root, or
    of a tar in root, in `class_order`, or in that of class_names, if these are all of them; one class, with root's
    name, if there are no sub-folders.

    Raises:
        ValueError: root does not exist, holds no images, or a sub-folder does not; some samples of tars have a number
            as class, and other images have none, or no .cls or .json holds a class.
    """
    check_source(root, "image folder")
    images = find_images(root)
    wrong = {name: member for name, member in images.members.items() if member.wrong_label is not None}
    if any(member.label is not None for member in images.members.values()):
        unreadable = {name: member._replace(damage=member.wrong_label) for name, member in wrong.items()}
        return _numbered(replace(images, members=images.members | unreadable))
    if wrong:
        raise ValueError(f"{root}: {next(iter(wrong.values())).wrong_label}")
    if not images.names:
        raise ValueError(
            f"image folder {root} holds no images; expected {WANTED}; {images.passed_over or 'it is empty'}"
        )
    places = {name: _class_folder(name, images.members.get(name)) for name in images.names}
    folders = class_order({*filter(None, places.values())} | _sub_folders(root, images.links))
    # A cache begun when numbers were sorted as names keeps its order.
    class_names = tuple(class_names) if sorted(class_names) == sorted(folders) else folders
    if not class_names:
        labels = (0,) * len(images.names)
        alone = root.resolve().name if root.is_dir() else root.stem
        return ImageFolder(images, (alone,), images.names, labels, images.passed_over)
    label_of = {name: label for label, name in enumerate(class_names)}
    if empty := sorted({*class_names} - {*places.values()}):
        raise ValueError(f"class folder {root / empty[0]} holds no images; expected {WANTED} (or remove it)")
    labelled = sorted((label_of[folder], name) for name, folder in places.items() if folder is not None)
    passed_over = images.passed_over
    if beside := len(places) - len(labelled):
        more = f"{plural(beside, 'image')} beside the class folders"
        passed_over = f"{passed_over}; {more}" if passed_over else f"passed over {more}"
    files = tuple(name for _, name in labelled)
    return ImageFolder(images, class_names, files, tuple(label for label, _ in labelled), passed_over)


def check_source(root: Path, what: str) -> None:
    """ValueError unless root is a folder, a tar or a .npy file."""
    if not root.is_dir() and not (root.is_file() and root.suffix.lower() in (".npy", ".tar")):
        wrong = "is not a folder, a .tar or a .npy file" if root.exists() else "does not exist"
        raise ValueError(f"{what} {root} {wrong}")


def _numbered(images: ImageFiles) -> ImageFolder:
    """Images whose tars say the number of their class."""
    labels = []
    for name in images.names:
        member = images.members.get(name)
        if member is None or (member.label is None and member.damage is None):
            raise ValueError(
                f"{images.root / name} has no class, although others have one in a .cls or .json of their tar"
            )
        labels.append(member.label or 0)  # what is damaged will not be read
    class_names = tuple(str(label) for label in range(max(labels) + 1))
    return ImageFolder(images, class_names, images.names, tuple(labels), images.passed_over)


def _class_folder(name: str, member: Member | None) -> str | None:
    """The first folder in an image's path, which leads through tars as if they were unpacked where they are."""
    if member is not None:
        name = posixpath.join(posixpath.dirname(member.file), name[len(member.file) + 1 :])
    return name.split("/")[0] if "/" in name else None


def _sub_folders(root: Path, links: tuple[str, ...]) -> set[str]:
    if not root.is_dir():
        return set()
    with os.scandir(root) as scan:
        return {entry.name for entry in scan if _is_folder(entry) and entry.name[0] != "."} - {*links}
