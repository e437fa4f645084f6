"""The demo's models and requests, as the page sends them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ddt_fast.webdemo.models import EMBEDDED_NAME, DemoModel, load_models
from ddt_fast.webdemo.requests import FIELDS, Limits, Request, read_request
from ddt_fast.webdemo.running import Finished, Progress

LIMITS = Limits(images=12, steps=40)


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
