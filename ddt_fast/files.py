"""Writing outputs so that nothing half-written is ever taken for whole, and nothing of the user's is ever replaced."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: writers such as Pillow choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        for file in temporary.iterdir():
            file.chmod(0o666 & ~umask)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: Path, owned: str) -> None:
    """ValueError unless `path` is missing, or a folder in which every name matches the regular expression `owned`."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} exists and is no folder; it would have to be replaced by one")
    if path.is_dir():
        foreign = sorted(entry.name for entry in path.iterdir() if not re.fullmatch(owned, entry.name))
        if foreign:
            raise ValueError(f"{path} would be replaced, but holds {foreign[0]}, which ddt-fast did not write")


def output_folder(name: str) -> Path:
    """The folder of that name, created where it is missing; ValueError when it is unnamed or cannot be written."""
    if not name:
        raise ValueError("the output folder has an empty name; name one")
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output folder {folder} cannot be written: {error.strerror}") from error
    return folder
