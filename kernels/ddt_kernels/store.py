"""What was found out about kernels on this machine's GPU, kept for its other processes and for later runs.

One JSON file for each environment (GPU, driver, torch, triton, this package) in the folder DDT_KERNELS_CACHE, else
~/.cache/ddt_kernels. Only one process at a time finds something out; the others wait for it and read what it found. A
file that cannot be read is made anew; where none can be written, what is found out lasts as long as the process.
"""

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import RLock
from typing import IO, Any

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
        self._threads, self._depth = RLock(), 0
        self._lock: IO[str] | None = None

    def get(self, key: str) -> Any:
        """The value of `key`, or None."""
        if key not in self._known:
            self._known |= self._read()
        return self._known.get(key)

    def find(self, key: str, find_out: Callable[[], Any]) -> Any:
        """The value of `key`, which `find_out` returns if no process has found it out yet; its None is not kept."""
        known = self.get(key)
        if known is not None:
            return known
        with self.alone():
            known = self.get(key)
            if known is None:
                _say_once(self.environment["gpu"], self.path)
                known = find_out()
                if known is not None:
                    self._known[key] = known
                    self._write()
        return known

    def put(self, key: str, value: Any) -> None:
        """In place of whatever was known."""
        with self.alone():
            self._known[key] = value
            self._write()

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
    def alone(self) -> Iterator[None]:
        """Inside, no other process of this node, nor another thread, is; where files cannot be locked, others may be.
        It may be entered again inside."""
        with self._threads:
            self._depth += 1
            try:
                if self._depth == 1:
                    self._lock = self._locked()
                yield
            finally:
                self._depth -= 1
                if self._depth == 0 and self._lock is not None:
                    _unlock(self._lock)

    def _locked(self) -> IO[str] | None:
        lock = None
        try:
            import fcntl

            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_suffix(".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            if lock is not None:
                lock.close()
            self._say_unwritable(error)
            return None
        return lock

    def _say_unwritable(self, error: Exception) -> None:
        if self._writable:
            self._writable = False
            warnings.warn(
                f"ddt_kernels: {self.path.parent} cannot be written ({error}), so what is found out about kernels on "
                f"this GPU is lost when the process ends; set {VARIABLE} to another folder",
                stacklevel=2,
            )


def _unlock(lock: IO[str]) -> None:
    import fcntl

    fcntl.flock(lock, fcntl.LOCK_UN)  # closing does not, while a forked process still has it open
    lock.close()


@cache
def _say_once(gpu: str, path: Path) -> None:
    print(
        f"ddt_kernels: verifying and timing kernels on {gpu}, once, at the first use of each: about a minute in all; "
        f"kept in {path}",
        file=sys.stderr,
        flush=True,
    )


def folder() -> Path:
    """Where the files are."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddt_kernels"


@cache
def store(device: torch.device) -> Store:
    """That of a CUDA device; GPUs of one kind share it."""
    return _store(folder(), tuple(environment(device).items()))


@cache
def _store(folder: Path, environment: tuple[tuple[str, str], ...]) -> Store:
    return Store(folder, dict(environment))


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
