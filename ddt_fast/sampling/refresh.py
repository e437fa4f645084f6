"""Encoder sharing by statistical dynamic programming: which steps of a run refresh the encoder's state.

A probe run (`probe`) says how the states of all steps resemble each other. From it the schedule of a given number of
refreshes with the smallest predicted error is found exactly, as in the DDT paper (arXiv 2504.05741, section 3.4) for
held states, and with the same idea where states are extrapolated between refreshes.

Sizes: T steps, M refreshes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ddt_fast.config import SamplingConfig, StateForecast
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.sampling.probe import Probe, probe_states
from ddt_fast.sampling.schedule_cache import Report, read_schedule, schedule_key, store_schedule

Array = NDArray[np.float64]

# States that a forecast reads.
_NODES = {"hold": 1, "linear": 2, "quadratic": 3}

# M T L^3 of the search over triples; beyond it the length L of a segment is bounded. About three seconds.
_SEARCH_BUDGET = 5 * 10**8


def optimal_refresh_steps(similarity: ArrayLike | Tensor, num_refreshes: int) -> tuple[int, ...]:
    """The refresh steps that minimise the sum over segments [j, i) of sum_{k=j..i-1} (1 - similarity[k][j]).

    Exact: O(M T^2). Of equal schedules the one whose last refresh is the earliest wins, then the one before it.

    Args:
        similarity: (T, T), the mean cosine similarity of the states of steps i and j.
        num_refreshes: M, 1 to T.

    Returns:
        M ascending steps, the first 0.

    Raises:
        ValueError: similarity that is not square and finite, num_refreshes out of range.
    """
    matrix = _square(similarity)
    num_steps = len(matrix)
    _check_budget(num_refreshes, num_steps)
    # segment[j, i]: the error of holding the state of step j in the steps j to i - 1.
    steps = np.arange(num_steps)
    held = np.where(steps >= steps[:, None], 1 - matrix.T, 0.0)
    segment = np.full((num_steps, num_steps + 1), np.inf)
    for j in range(num_steps):
        segment[j, j + 1 :] = held[j, j:].cumsum()
    best = segment[0]
    choices = []
    for _ in range(num_refreshes - 1):
        totals = best[:num_steps, None] + segment
        choices.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    refreshes = [num_steps]
    for choice in reversed(choices):
        refreshes.append(int(choice[refreshes[-1]]))
    return (0, *reversed(refreshes[1:]))


def optimal_refresh_schedule(probe: Probe, num_refreshes: int, forecast: StateForecast = "hold") -> tuple[int, ...]:
    """The refresh steps with the smallest predicted error, where `forecast` fills the steps between them.

    The sum of `step_errors` is minimal. "hold" is `optimal_refresh_steps`. With a forecast the error of a segment
    depends on the one or two refreshes before it as well: "linear" is an exact search over pairs, O(M T^3);
    "quadratic" one over triples, exact among the schedules without a segment longer than L steps, where L is T if
    that takes a few seconds, and never less than one and a half mean segments.

    Args:
        probe: of `probe_states`.
        num_refreshes: M, 1 to T.
        forecast: the setting state_forecast of the run.

    Returns:
        M ascending steps, the first 0.

    Raises:
        ValueError: num_refreshes out of range.
    """
    if forecast not in _NODES:
        raise ValueError(f"forecast is {forecast!r}; allowed: {', '.join(_NODES)}")
    if forecast == "hold":
        return optimal_refresh_steps(probe.similarity, num_refreshes)
    _check_budget(num_refreshes, len(probe.times))
    costs = _costs(probe, num_refreshes, forecast)
    # With one or two refreshes there never are three states to put a parabola through.
    if forecast == "linear" or num_refreshes < 3:
        return _search_pairs(costs, num_refreshes)
    return _search_triples(costs, num_refreshes)


def uniform_refresh_steps(num_steps: int, num_refreshes: int) -> tuple[int, ...]:
    """num_refreshes steps spread evenly: step floor(i T / M) for i = 0 .. M - 1; ValueError for M out of range."""
    _check_budget(num_refreshes, num_steps)
    return tuple(i * num_steps // num_refreshes for i in range(num_refreshes))


def step_errors(probe: Probe, refreshes: Sequence[int], forecast: StateForecast = "hold") -> Array:
    """The predicted error of the state at every step, 0 at the refreshes.

    |sum_i w_i u_i - u_k|^2 / 2 + drift (sum_i w_i^2 - 1), averaged over tokens, where w are the weights of the forecast
    and u unit states: a token's state divided by its norm. Held, this is 1 - similarity[k][j], as in the paper. The
    second term is there because a run that leaves out refreshes no longer meets the probe's states exactly, and
    extrapolating far beyond close refreshes multiplies the difference; its drift is the mean of the first term over a
    uniform schedule of as many refreshes.

    On the digits model, 250 steps, linear, this gave smaller errors of the final sample than the relative squared error
    of the states themselves, and than leaving the second term out.

    Args:
        probe: of `probe_states`.
        refreshes: ascending steps, the first 0.
        forecast: what fills the steps between refreshes, as SamplingConfig.state_forecast.

    Returns:
        (T,) float64.
    """
    return _errors(_costs(probe, len(refreshes), forecast), refreshes, forecast)


def _errors(costs: _Costs, refreshes: Sequence[int], forecast: StateForecast) -> Array:
    parts = []
    for i, (start, end) in enumerate(pairwise([*refreshes, costs.num_steps])):
        nodes = [np.array([[node]]) for node in refreshes[max(0, i + 1 - _NODES[forecast]) : i + 1]]
        parts.append(costs(nodes, np.arange(start, end))[0])
    return np.concatenate(parts)


def _costs(probe: Probe, num_refreshes: int, forecast: StateForecast) -> _Costs:
    costs = _Costs(np.asarray(probe.times), _square(probe.similarity))
    if forecast != "hold":
        uniform = uniform_refresh_steps(costs.num_steps, num_refreshes)
        costs.drift = float(_errors(costs, uniform, forecast).mean())
    return costs


def resolve_refresh_steps(
    model: DDT | FusedDDT,
    config: SamplingConfig,
    height: int,
    width: int,
    cache: Path | None = None,
    report: Report = print,
    progress: Callable[[], object] | None = None,
) -> SamplingConfig:
    """A configuration whose refresh_steps "dp" are step numbers; any other is returned as it is.

    The schedule is taken from the cache, or found by a probe of the model and added to it.

    Args:
        model: on the device and in the dtype to compute in.
        config: the sampling settings; num_refreshes is the budget.
        height, width: of what the model sees.
        cache: file of schedules, `schedule_cache.schedule_cache_path` of the checkpoint; None keeps nothing.
        report: called with a line for everything there is to say: what was chosen, and whence.
        progress: called after every step of the probe, if there is one, as `probe_states` does.

    Raises:
        ValueError: a size that does not fit the model, or a probe that is not finite.
    """
    if config.refresh_steps != "dp":
        return config
    assert config.num_refreshes is not None, "a configuration with dp has a budget"
    key = schedule_key(model, config, height, width) if cache is not None else ""
    entry = read_schedule(cache, key, report) if cache is not None else None
    if cache is not None and entry is not None:
        try:
            resolved = _with_steps(config, entry["refresh_steps"])
            errors = float(entry["mean_error"]), float(entry["mean_error_uniform"])
        except (KeyError, TypeError, ValueError, OverflowError):
            report(f"an entry of {cache} is no schedule; probing again")
        else:
            report(f"{describe_choice(resolved, *errors)}; from {cache}")
            return resolved
    started = time.perf_counter()
    probe = probe_states(model, config, height, width, progress=progress)
    steps = optimal_refresh_schedule(probe, config.num_refreshes, config.state_forecast)
    seconds = time.perf_counter() - started
    uniform = uniform_refresh_steps(config.num_steps, config.num_refreshes)
    chosen, even = (
        float(step_errors(probe, refreshes, config.state_forecast).mean()) for refreshes in (steps, uniform)
    )
    resolved = _with_steps(config, steps)
    report(f"{describe_choice(resolved, chosen, even)}; from a probe of {seconds:.1f} s")
    if cache is not None:
        entry = {
            "refresh_steps": list(steps),
            "mean_error": chosen,
            "mean_error_uniform": even,
            "sampling": asdict(config),
            "size": [height, width],
        }
        store_schedule(cache, key, entry, report)
    return resolved


def describe_choice(config: SamplingConfig, mean_error: float, mean_error_uniform: float) -> str:
    """One line on a resolved configuration and its predicted errors."""
    steps = config.refresh_steps
    assert isinstance(steps, tuple)
    return (
        f"refresh at {len(steps)} of {config.num_steps} steps ({', '.join(map(str, steps))}), {config.state_forecast} "
        f"between: mean predicted error {mean_error:.3g}, uniform {mean_error_uniform:.3g}"
    )


def _with_steps(config: SamplingConfig, steps: Sequence[int]) -> SamplingConfig:
    if len(steps) != config.num_refreshes:
        raise ValueError(f"{len(steps)} refresh steps; wanted {config.num_refreshes}")
    return replace(config, refresh_steps=tuple(steps), num_refreshes=None)


class _Costs:
    """What the forecast through some refreshes costs at some steps."""

    def __init__(self, times: Array, similarity: Array) -> None:
        self.times, self.similarity, self.drift = times, (similarity + similarity.T) / 2, 0.0

    @property
    def num_steps(self) -> int:
        return len(self.times)

    def __call__(self, nodes: Sequence[NDArray[np.int64]], steps: NDArray[np.int64]) -> Array:
        """(A, K): nodes are arrays (A, 1) or (1, 1) of refreshes, steps (K,) those whose state is forecast."""
        weights = [self._weight(i, nodes, steps) for i in range(len(nodes))]
        s = self.similarity
        square: Array = s[steps, steps]
        amplification: Array | float = -1.0
        for i, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
            square = square + weight * (weight * s[node, node] - 2 * s[node, steps])
            amplification = amplification + weight * weight
            for other, other_weight in zip(nodes[:i], weights[:i], strict=True):
                square = square + 2 * weight * other_weight * s[node, other]
        # Rounding may leave the distance of two equal states slightly negative.
        return np.maximum(square, 0) / 2 + self.drift * amplification

    def segments(self, nodes: Sequence[NDArray[np.int64]], steps: NDArray[np.int64]) -> Array:
        """(A, K): the sum over steps[: i + 1], for every i."""
        return self(nodes, steps).cumsum(axis=1)

    def _weight(self, i: int, nodes: Sequence[NDArray[np.int64]], steps: NDArray[np.int64]) -> Array:
        """Lagrange's weight of nodes[i] at the times of the steps (`solvers.lagrange_weights`, for arrays)."""
        t, own = self.times[steps], self.times[nodes[i]]
        weight = np.ones((1, len(steps)))
        for j, node in enumerate(nodes):
            if j != i:
                weight = weight * ((t - self.times[node]) / (own - self.times[node]))
        return weight


def _search_pairs(costs: _Costs, num_refreshes: int) -> tuple[int, ...]:
    """The best schedule where a segment's cost depends on its own and the previous refresh."""
    count = costs.num_steps
    # best[m, b, d]: of the steps before d with m refreshes, the last of them at b; before[m, b, d] is the one before b.
    best = np.full((num_refreshes + 1, count, count + 1), np.inf)
    before = np.zeros(best.shape, dtype=np.int32)
    steps = np.arange(count)
    best[1, 0, 1:] = costs.segments([np.zeros((1, 1), dtype=np.int64)], steps)[0]
    for b in range(1, count):
        # No more refreshes so far than steps, and no more to come than steps remain.
        low, high = max(2, num_refreshes - (count - 1 - b)), min(num_refreshes, b + 1)
        if low > high:
            continue
        segment = costs.segments([steps[:b, None], steps[b : b + 1, None]], steps[b:])
        totals = best[low - 1 : high, :b, b][:, :, None] + segment
        before[low : high + 1, b, b + 1 :] = totals.argmin(axis=1)
        best[low : high + 1, b, b + 1 :] = totals.min(axis=1)
    refreshes = [count, int(best[num_refreshes, :, count].argmin())]
    for m in range(num_refreshes, 1, -1):
        refreshes.append(int(before[m, refreshes[-1], refreshes[-2]]))
    return tuple(reversed(refreshes[1:]))


def _search_triples(costs: _Costs, num_refreshes: int, longest: int | None = None) -> tuple[int, ...]:
    """The best schedule of three or more refreshes where a segment's cost depends on its own and the two refreshes
    before it, among those whose segments have at most `longest` steps."""
    count = costs.num_steps
    if longest is None:
        affordable = int((_SEARCH_BUDGET / (num_refreshes * count)) ** (1 / 3))
        longest = min(count, max(affordable, -(-3 * count // (2 * num_refreshes))))
    # best[m, c, u, v]: of the steps before c + v with m refreshes, the last two at c - u and c; before[m, c, u, v] is
    # the length of the segment that ends at c - u.
    best = np.full((num_refreshes + 1, count, longest + 1, longest + 1), np.inf)
    before = np.zeros(best.shape, dtype=np.int32)
    steps = np.arange(count)
    held = costs.segments([np.zeros((1, 1), dtype=np.int64)], steps)[0]
    for c in range(1, count):
        ahead = min(longest, count - c)
        last = steps[c : c + 1, None]
        for u in range(1, min(longest, c) + 1):
            b = c - u
            if b == 0:
                segment = costs.segments([np.zeros((1, 1), dtype=np.int64), last], steps[c : c + ahead])
                best[2, c, u, 1 : ahead + 1] = held[c - 1] + segment[0]
                continue
            low, high = max(3, num_refreshes - (count - 1 - c)), min(num_refreshes, c + 1)
            if low > high:
                continue
            lengths = np.arange(1, min(longest, b) + 1)
            segment = costs.segments([b - lengths[:, None], steps[b : b + 1, None], last], steps[c : c + ahead])
            totals = best[low - 1 : high, b, 1 : len(lengths) + 1, u][:, :, None] + segment
            before[low : high + 1, c, u, 1 : ahead + 1] = totals.argmin(axis=1) + 1
            best[low : high + 1, c, u, 1 : ahead + 1] = totals.min(axis=1)
    # The last segment ends at the last step: c + v = T.
    ends = {(u, v): best[num_refreshes, count - v, u, v] for v in range(1, longest + 1) for u in range(1, longest + 1)}
    u, v = min(ends, key=lambda pair: (ends[pair], -pair[1], -pair[0]))
    c = count - v
    refreshes = [c, c - u]
    for m in range(num_refreshes, 2, -1):
        u, v = int(before[m, c, u, v]), u
        c -= v
        refreshes.append(c - u)
    return tuple(reversed(refreshes))


def _square(similarity: ArrayLike | Tensor) -> Array:
    values = similarity.detach().cpu().double().numpy() if isinstance(similarity, Tensor) else similarity
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"similarity has shape {matrix.shape}; wanted (T, T), one row and one column a step")
    if not np.isfinite(matrix).all():
        raise ValueError("similarity holds values that are not finite")
    return matrix


def _check_budget(num_refreshes: int, num_steps: int) -> None:
    if isinstance(num_refreshes, bool) or not isinstance(num_refreshes, int) or not 1 <= num_refreshes <= num_steps:
        raise ValueError(f"num_refreshes is {num_refreshes!r}; allowed: 1 to {num_steps}, the number of steps")
