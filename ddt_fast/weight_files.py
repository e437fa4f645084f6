"""Reading weight files that come from elsewhere: nothing in them is run, and a refusal names the file, what is wrong
with it and what is expected."""

import re
import warnings
import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ddt_fast.wording import one_line

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_GLOBAL = re.compile(r"(?:GLOBAL |[Gg]lobal: )(?:GLOBAL )?([\w.]+)")


def read_pickle(
    what: str,
    file: Path,
    expected: str,
    device: torch.device | str = "cpu",
    allowed: AbstractContextManager[Any] | None = None,
) -> Any:
    """What `torch.save` wrote, on the device; on the CPU, memory-mapped if torch can.

    Args:
        what: the kind of file, which begins the message.
        file: the file.
        expected: what is expected, which ends the message.
        device: where tensors go.
        allowed: a context of `torch.serialization.safe_globals`; None allows nothing but tensors in plain containers.

    Raises:
        ValueError: there is no such file, it is damaged or of another kind, or it holds objects that are not allowed.
        OSError: it may not be read.
    """
    require_file(what, file, expected)
    try:
        with allowed or nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript and of odd pickles, which are refused
            mmap = zipfile.is_zipfile(file) and torch.device(device).type == "cpu"
            return torch.load(file, map_location=device, weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the unpickler raise anything
        raise refusal(what, file, error, expected) from error


def read_safetensors(what: str, file: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, memory-mapped, on the CPU; errors as for `read_pickle`."""
    require_file(what, file, expected)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise refusal(what, file, error, expected) from error


def require_file(what: str, file: Path, expected: str) -> None:
    """ValueError unless there is such a file; OSError if it may not be read, which does not make it damaged."""
    if not file.is_file():
        problem = "is not a file" if file.exists() else "does not exist"
        raise ValueError(f"{what} {file} {problem}; expected {expected}")
    file.open("rb").close()


def require_readable_folder(folder: Path) -> None:
    """ValueError if a .safetensors file in a folder of weights is damaged; only their headers are read."""
    for file in sorted(folder.glob("*.safetensors")):
        if error := _header_error(file):
            raise refusal("weights", file, error, "a whole .safetensors file")


def _header_error(file: Path) -> Exception | None:
    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return error


def refusal(what: str, file: Path, error: BaseException, expected: str) -> ValueError:
    """The error for a file that could not be read."""
    problem = _seen_in(file) or _known(error) or "it is truncated, or not a file of torch.save"
    return ValueError(f"{what} {file} cannot be read: {problem}; expected {expected}")


def reason(error: BaseException) -> str:
    """Why weights could not be read, in one line, without torch's advice to open them unsafely."""
    return _known(error) or one_line(error)


def _known(error: BaseException) -> str | None:
    text = str(error)
    if found := _GLOBAL.search(text):
        return f"it holds more than tensors, and was not executed: it would call or make {found[1]}"
    if isinstance(error, SafetensorError):
        return f"it is truncated or not safetensors: {one_line(error)}"
    return "it is truncated, or not a file of torch.save" if "weights_only" in text else None


def reason_in(name: str, error: BaseException) -> str:
    """As `reason`, for a local folder or hub id: it names the folder's first damaged weight file."""
    for file in sorted(Path(name).iterdir()) if Path(name).is_dir() else ():
        if file.suffix not in _SUFFIXES:
            continue
        damage = _header_error(file) if file.suffix == ".safetensors" else None
        if problem := _seen_in(file) or (damage and reason(damage)):
            return f"{file.name}: {problem}"
    return reason(error)


def _seen_in(file: Path) -> str | None:
    """What is wrong with a weight file by its first bytes, if they show it."""
    with file.open("rb") as stream:
        head = stream.read(100)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer ('git lfs pull' fetches the file)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page"
    if file.suffix == ".safetensors" and head.startswith((b"PK", b"\x80")):
        return "it is a pickle, which may hold code and was not opened"
    if head.startswith(b"PK") and not zipfile.is_zipfile(file):
        return "it is truncated"
    if head.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return "it is a TorchScript programme, which was not executed"
    return None
