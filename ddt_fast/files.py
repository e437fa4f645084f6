"""Writing outputs: nothing half-written is ever taken for whole, and nothing of the user's is ever replaced."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddt_fast.checks import require_path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on an error it is removed.

    What was written is on the disk before it gets its name, and the name when this returns: a power failure leaves the
    old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: writers such as Pillow choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError when it holds anything else, OSError when it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as a JSON file, whole or not at all."""
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
    except FileNotFoundError:
        # Another process has written the same content and renamed the temporary file: on another machine it may have
        # the same process id.
        if not path.exists():
            raise


def sync(path: Path) -> None:
    """Return when a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Return when everything in a folder, at any depth, is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """OSErrors within name the path, and say that the finished shards of a job or cache are kept."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        hint = "finished shards are kept, the same command continues from them"
        raise OSError(f"{path} could not be written: {reason}; {hint}") from error


@contextmanager
def atomic_folder(path: Path, owned: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, on an error it is removed.

    Args:
        path: the folder; an older one is replaced only under the rule of `check_replaceable`.
        owned: regular expression for the names that such a folder may hold.

    Raises:
        ValueError: `path` holds something else.
    """
    path = path.resolve()
    check_replaceable(path, owned)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        # mkdtemp makes private folders, safetensors private files; outputs get the rights that new ones usually get.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for entry in temporary.rglob("*"):
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)
        sync_folder(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: Path, owned: str) -> None:
    """ValueError unless `path` is missing, or a folder in which every name matches the regular expression `owned`."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} exists and is not a folder; a folder of that name will be written")
    if path.is_dir():
        foreign = sorted(entry.name for entry in path.iterdir() if not re.fullmatch(owned, entry.name))
        if foreign:
            raise ValueError(f"{path} would be replaced, but holds {foreign[0]}, which ddt-fast did not write")


def output_folder(name: str | Path) -> Path:
    """The folder of that name, created where it is missing; ValueError when it is unnamed or cannot be written."""
    folder = require_path("the output folder", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output folder {folder} cannot be written: {error.strerror}") from error
    return folder
