"""The demo as the tests serve it: in their own process, so that they can hold its models and see who waits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ddt_fast.demo.requests import EMBEDDED_NAME, load_models

MAX_IMAGES, MAX_STEPS = 12, 40


def values(**changes: Any) -> list[Any]:
    """What a page sends: four digits in 8 steps, except for the changes."""
    fields = {
        "model": EMBEDDED_NAME,
        **{"classes": [], "num_images": 4, "num_steps": 8, "guidance_scale": 1.5},
        **{"guidance_low": 0.3, "guidance_high": 1, "refresh_every": 1, "seed": 0, "state_forecast": "hold"},
        **{"solver": "euler", "order": 2, "timeshift": 1},
    }
    return list((fields | changes).values())


def models(*checkpoints: Path | str) -> dict[str, Any]:
    """The checkpoints and the digits, on the CPU."""
    return load_models([str(checkpoint) for checkpoint in checkpoints], None, torch.device("cpu"), "auto")


@contextmanager
def served(models: dict[str, Any], folder: Path) -> Iterator[Any]:
    """A `Demo` of these models, served on loopback with a queue of one; images go into the folder, and a comparison
    runs once."""
    from ddt_fast.demo import drawing, page

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setattr(drawing, "_TIMED_RUNS", 1)
        demo = page.Demo(models, MAX_IMAGES, MAX_STEPS)
        page.serve(demo, 1, server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True)
        yield demo
        demo.page.close(verbose=False)
        demo.close()


@contextmanager
def held(demo: Any, name: str = EMBEDDED_NAME) -> Iterator[None]:
    """Within, the model draws for nobody."""
    release = threading.Event()
    demo.threads[name].submit(release.wait, 60)
    try:
        yield
    finally:
        release.set()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
