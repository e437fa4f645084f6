"""Timing several variants against each other in one run.

Variants take turns, so that whatever else the machine does, or how warm it is, falls on all of them alike; what counts
is the median of each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant: median, first and third quartile, extremes, and the number of calls they are of."""

    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    maximum: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        lower, median, upper = (
            statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
        )
        return cls(median, lower, upper, min(seconds), max(seconds), len(seconds))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def interleave(variants: Mapping[Key, Callable[[], object]], calls: int, warmup: int = 1) -> dict[Key, Timing]:
    """Time every variant `calls` times, in turn, after `warmup` rounds that do not count.

    A variant ends when the device is done with it.
    """
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[Key, list[float]] = {name: [] for name in variants}
    for _ in range(calls):
        for name, run in variants.items():
            seconds[name].append(timed(run))
    return {name: Timing.of(values) for name, values in seconds.items()}


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    _synchronize()
    started = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
