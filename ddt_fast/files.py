"""Files: outputs appear whole or not at all, and nothing of the user's is ever replaced."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ddt_fast.checks import require_path
from ddt_fast.wording import kind_of


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on an error it is removed.

    The content reaches the disk before the file gets its name, and the name is on the disk when this returns: a power
    failure leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keep the suffix: writers such as Pillow choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Checksum of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; ValueError if it holds anything else, OSError if it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {kind_of(content)}; expected an object")
    return content


def read_yaml(path: Path) -> Any:
    """Read a YAML file; ValueError if it is not valid, OSError if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def plain(content: dict[str, Any]) -> dict[str, Any]:
    """The object as a JSON file holds it: lists in place of tuples."""
    return json.loads(json.dumps(content))


def json_text(content: dict[str, Any]) -> str:
    """An object as the text of a JSON file."""
    return json.dumps(content, indent=1) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as a JSON file, whole or not at all."""
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(json_text(content))
    except FileNotFoundError:
        # A process on another machine may have the same id: it has written the same content and renamed the file.
        if not path.exists():
            raise


def sync(path: Path) -> None:
    """Return once a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Return once everything in a folder, at any depth, is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an OSError name the path and say that the finished shards of a job or cache are kept."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        hint = "finished shards are kept, and the same command continues from them"
        raise OSError(f"{path} could not be written: {reason}; {hint}") from error


@contextmanager
def atomic_folder(path: Path, owned: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path`, on an error it is removed. ValueError
    unless `check_replaceable` allows that."""
    path = path.resolve()
    check_replaceable(path, owned)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        # mkdtemp makes private folders, safetensors private files; outputs get the usual permissions.
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
    """ValueError unless `path` is missing or is a folder in which every name matches the regular expression `owned`."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} exists and is not a folder; a folder of that name will be written")
    if path.is_dir():
        foreign = sorted(entry.name for entry in path.iterdir() if not re.fullmatch(owned, entry.name))
        if foreign:
            raise ValueError(f"{path} would be replaced, but holds {foreign[0]}, which ddt-fast did not write")


def check_no_folder(*paths: Path) -> None:
    """ValueError if a folder stands where a file will be written."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; a file of that name will be written")


def output_folder(name: str | Path) -> Path:
    """Create the folder if it is missing; ValueError if the name is empty or the folder cannot be written."""
    folder = require_path("the output folder", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output folder {folder} cannot be written: {error.strerror}") from error
    return folder
