"""The demo's models and requests, as the page sends them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ddt_fast import demo as demo_command
from ddt_fast.command import run_command
from ddt_fast.webdemo.models import EMBEDDED_NAME, DemoModel, load_models
from ddt_fast.webdemo.requests import FIELDS, Limits, Request, read_request
from ddt_fast.webdemo.running import Finished, Progress

LIMITS = Limits(images=12, steps=40)


def error_line(capsys, *arguments: str) -> str:
    """What the command says when it must fail, on its only line."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: demo_command.main(arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def embedded() -> DemoModel:
    """The digits in the package."""
    return load_models([], None, torch.device("cpu"), "auto")[0]


def fields(**changes: Any) -> dict[str, Any]:
    """A page's fields: four digits in 8 steps, but for the changes."""
    values = {
        "model": EMBEDDED_NAME,
        **{"classes": [], "num_images": 4, "num_steps": 8, "guidance_scale": 1.5},
        **{"guidance_low": 0.3, "guidance_high": 1, "refresh_every": 1, "seed": 0, "state_forecast": "hold"},
        **{"solver": "euler", "order": 2, "timeshift": 1},
    }
    assert list(values) == list(FIELDS)
    return values | changes


def request(model: DemoModel, **changes: Any) -> Request:
    return read_request(fields(**{"model": model.name} | changes), {model.name: model}, LIMITS)


def no_report(_text: str, _done: int, _total: int) -> None:
    """For work that nobody watches."""


def result(updates: Iterator[Progress | Finished[Any]]) -> Any:
    """What the work returned in the end."""
    *_, last = updates
    assert isinstance(last, Finished)
    return last.result
