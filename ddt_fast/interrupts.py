"""Ctrl-C in a command, from its first import to its end: one line, exit code 130."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_process = os.getpid()
_working = False


def handle_interrupts() -> None:
    """Make SIGINT end this process; where it is ignored, as under nohup, it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


@contextmanager
def work_to_clean_up() -> Iterator[None]:
    """While this is open, SIGINT raises KeyboardInterrupt, so that the work can clean up after itself."""
    global _working
    before, _working = _working, True
    try:
        yield
    finally:
        _working = before


def interrupt(_: int, frame: FrameType | None) -> None:
    """The signal handler: KeyboardInterrupt for work that cleans up, else the end."""
    # Extension modules in C++ may swallow an exception that is raised while they are imported.
    if _working and not _importing(frame):
        raise KeyboardInterrupt
    if os.getpid() == _process:  # not a worker of a data loader
        os.write(2, b"interrupted\n")
    os._exit(130)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
