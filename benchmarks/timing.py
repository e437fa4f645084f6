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
Clock = Callable[[Callable[[], object]], float]
"""Calls a function once; the seconds that it took."""


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


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call on the host's clock, the device's work included."""
    _synchronize()
    started = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - started


class EventClock:
    """A CUDA device's own clock: seconds between two events around what a call launches.

    Args:
        hide_launches: keep the device busy until the host has launched everything, so that what is timed is the
            device's work alone, whoever launches it: the point of comparing kernels. Otherwise the device waits for
            the host where it has to, as it would for a user.
    """

    CYCLES_PER_SECOND = 2e9
    """Of the SMs' clock, at most: the device is kept busy at least as long as asked for."""

    def __init__(self, hide_launches: bool) -> None:
        self._hide = hide_launches
        self._launching: dict[Callable[[], object], float] = {}

    def __call__(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        if self._hide and run not in self._launching:
            started = time.perf_counter()
            run()
            self._launching[run] = time.perf_counter() - started
            torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._hide:
            torch.cuda._sleep(int((1.5 * self._launching[run] + 50e-6) * self.CYCLES_PER_SECOND))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def record(
    variants: Mapping[Key, Callable[[], object]], rounds: int, warmup: int = 1, clock: Clock = timed
) -> dict[Key, list[float]]:
    """Seconds of every variant in each of `rounds` rounds, in which they take turns, after `warmup` rounds that do not
    count."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[Key, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(clock(run))
    return seconds


def interleave(variants: Mapping[Key, Callable[[], object]], calls: int, warmup: int = 1) -> dict[Key, Timing]:
    """`record`, summed up. A variant ends when the device is done with it."""
    return {name: Timing.of(seconds) for name, seconds in record(variants, calls, warmup).items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
