"""The demo's server in the tests' own process, so that they can hold its model and see who waits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gradio
import pytest

from ddt_fast.webdemo.models import DemoModel
from ddt_fast.webdemo.server import serve
from demo_cases import LIMITS


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def served(models: Sequence[DemoModel], folder: Path, max_queue: int) -> Iterator[gradio.Blocks]:
    """The page of these models, as it is served on loopback; pictures go into the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        page = serve(models, LIMITS, host="127.0.0.1", port=free_port(), max_queue=max_queue, block=False)
        yield page
        page.close(verbose=False)


def drawing_threads() -> int:
    """Requests that draw, or wait for their model."""
    return sum(thread.name == "draw" for thread in threading.enumerate())


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.02)
