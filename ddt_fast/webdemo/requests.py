"""What a page asks for, checked on the server: whatever a client sends becomes a `Request` or a ValueError."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ddt_fast.checks import require, require_choice
from ddt_fast.config import SamplingConfig, Solver, StateForecast
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.sampling.plan import SamplingPlan
from ddt_fast.webdemo.models import DemoModel

MAX_SEED = 2**53 - 1
"""Larger numbers are not exact in a browser."""

GUIDANCE_RANGE = (0.0, 20.0)
TIMESHIFT_RANGE = (0.1, 10.0)
REFRESH_RANGE = (1, 50)
ORDER_RANGE = (1, 4)
_LONGEST_NAME = 100

FIELDS = (
    *("model", "classes", "num_images", "num_steps", "guidance_scale", "guidance_low", "guidance_high"),
    *("refresh_every", "seed", "state_forecast", "solver", "order", "timeshift"),
)
"""What a request consists of, in the page's order."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, at most.

    Args:
        images: drawn at a time.
        steps: of a run.
    """

    images: int = 64
    steps: int = 1000


@dataclass(frozen=True)
class Request:
    """Images to draw: number i is the image of labels[i] and seeds[i], as in the sample command.

    Attributes:
        model: what draws them.
        labels, seeds: one per image.
        sampling: the settings.
    """

    model: DemoModel
    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: SamplingConfig

    @property
    def plan(self) -> SamplingPlan:
        """The run's steps."""
        return SamplingPlan.from_config(self.sampling)

    def first(self, count: int) -> Request:
        """The first images alone."""
        return replace(self, labels=self.labels[:count], seeds=self.seeds[:count])

    def with_sampling(self, **settings: Any) -> Request:
        """The same images with some settings changed."""
        return replace(self, sampling=replace(self.sampling, **settings))


def read_request(fields: Mapping[str, Any], models: Mapping[str, DemoModel], limits: Limits) -> Request:
    """The request in a page's fields.

    Args:
        fields: by the names in `FIELDS`; classes are a list of labels or names, an empty one stands for all.
        models: those offered, by name.
        limits: the server's.

    Raises:
        ValueError: a value that is not allowed; the message says what is.
    """
    name = fields["model"]
    if not isinstance(name, str) or name not in models:
        raise ValueError(f"model {_short(name)} is not offered here; allowed: {', '.join(models)}")
    model = models[name]
    count = whole("images", fields["num_images"], 1, limits.images)
    low = number("guided from t", fields["guidance_low"], 0, 1)
    high = number("guided to t", fields["guidance_high"], 0, 1)
    require(low < high, "guidance interval", (low, high), "from a smaller t to a larger one")
    for name, choices in (("solver", Solver), ("state_forecast", StateForecast)):
        require_choice(name, fields[name] if isinstance(fields[name], str) else _short(fields[name]), choices)
    sampling = replace(
        model.sampling,
        num_steps=whole("steps", fields["num_steps"], 1, limits.steps),
        guidance_scale=number("CFG scale", fields["guidance_scale"], *GUIDANCE_RANGE),
        guidance_interval=(low, high),
        timeshift=number("timeshift", fields["timeshift"], *TIMESHIFT_RANGE),
        refresh_every=whole("refresh K", fields["refresh_every"], *REFRESH_RANGE),
        state_forecast=fields["state_forecast"],
        solver=fields["solver"],
        order=whole("order", fields["order"], *ORDER_RANGE),
    )
    seed = whole("seed", fields["seed"], 0, MAX_SEED - count + 1)
    labels = assign_labels(count, model.num_classes, read_classes(fields["classes"], model))
    request = Request(model, tuple(labels.tolist()), tuple(range(seed, seed + count)), sampling)
    _ = request.plan  # refuses settings that no run can have
    return request


def read_classes(chosen: Any, model: DemoModel) -> list[int]:
    """Labels of what was chosen or typed; none stands for all classes. ValueError names what comes near an unknown
    one."""
    if chosen is None or chosen == "":
        return []
    entries = chosen if isinstance(chosen, list) else [chosen]
    if len(entries) > model.num_classes:
        raise ValueError(f"{len(entries)} classes are chosen; allowed: up to {model.num_classes}")
    return [_label(entry, model) for entry in entries]


def _label(entry: Any, model: DemoModel) -> int:
    if isinstance(entry, str) and len(entry) > _LONGEST_NAME:
        raise ValueError(f"a class of {len(entry)} characters; allowed: up to {_LONGEST_NAME}")
    if isinstance(entry, str) and entry.strip().isdecimal():
        entry = int(entry)
    return model.pipe.class_names.label(entry)


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number from low to high; ValueError for anything else, NaN included."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not valid:
        raise ValueError(f"{name} is {_short(value)}; allowed: {low:g} to {high:g}")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from low to high, which a browser may send as 3.0; ValueError for anything else."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not valid or math.floor(value) != value:
        raise ValueError(f"{name} is {_short(value)}; allowed: a whole number, {low} to {high}")
    return int(value)


def _short(value: Any) -> str:
    """A value as a message shows it; a client may send anything, of any length."""
    if value is None:
        return "empty"
    if isinstance(value, int) and abs(value) > 10**18:
        return "a huge number"
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
