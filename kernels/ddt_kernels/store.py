"""What was found out about kernels on this machine's GPU, kept for its other processes and for later runs.

One JSON file for each environment (GPU, driver, torch, triton, this package) in the folder DDT_KERNELS_CACHE, else
~/.cache/ddt_kernels. Only one process at a time finds something out; the others wait for it and read what it found. A
file that cannot be read is made anew; where none can be written, what is found out lasts as long as the process.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

VARIABLE = "DDT_KERNELS_CACHE"
FORMAT = 1


class Store:
    """A dictionary from strings to JSON values, in a file that other processes read and write too."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.environment = environment
        digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]
        gpu = re.sub(r"\W+", "-", environment["gpu"]).strip("-").lower()
        self.path = folder / f"{gpu}-{digest}.json"
        self._known: dict[str, Any] = {}
        self._writable = True

    def get(self, key: str) -> Any:
        """The value of `key`, or None."""
        if key not in self._known:
            self._known |= self._read()
        return self._known.get(key)

    def find(self, key: str, find_out: Callable[[], Any]) -> Any:
        """The value of `key`, which `find_out` returns if no process has found it out yet."""
        known = self.get(key)
        if known is not None:
            return known
        with self._alone():
            known = self.get(key)
            if known is None:
                known = self._known[key] = find_out()
                self._write()
        return known

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] == FORMAT and content["environment"] == self.environment:
                return dict(content["found"])
        except (OSError, ValueError, TypeError, KeyError):  # not there, or damaged
            pass
        return {}

    def _write(self) -> None:
        content = {"format": FORMAT, "environment": self.environment, "found": self._read() | self._known}
        temporary = self.path.with_suffix(".tmp")  # written by one process at a time
        try:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            self._say_unwritable(error)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other process finds something out; where files cannot be locked, several may."""
        try:
            import fcntl

            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_suffix(".lock").open("w")
        except (ImportError, OSError) as error:
            self._say_unwritable(error)
            yield
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                self._say_unwritable(error)
            yield

    def _say_unwritable(self, error: Exception) -> None:
        if self._writable:
            self._writable = False
            warnings.warn(
                f"ddt_kernels: {self.path.parent} cannot be written ({error}), so what is found out about kernels on "
                f"this GPU is lost when the process ends; set {VARIABLE} to another folder",
                stacklevel=2,
            )


def folder() -> Path:
    """Where the files are."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddt_kernels"


@cache
def store(device: torch.device) -> Store:
    """That of a CUDA device."""
    return Store(folder(), environment(device))


def environment(device: torch.device) -> dict[str, str]:
    """What a finding depends on beside its key."""
    from ddt_kernels.runtime import triton

    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", "none"),
        "ddt_kernels": _sources(),
    }


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return match[0] if match else f"CUDA {torch.version.cuda}"


def _sources() -> str:
    """A digest of this package's code: edited kernels are other kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
