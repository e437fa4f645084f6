"""The refresh steps with the smallest predicted error, by dynamic programming over a probe's similarities.

For held states, this is the exact method of the DDT paper (arXiv 2504.05741, section 3.4); states that are extrapolated
between refreshes use the same idea.

Sizes: T steps, M refreshes.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ddt_fast.checks import require
from ddt_fast.config import StateForecast
from ddt_fast.sampling.plan import STATES_IN_FORECAST
from ddt_fast.sampling.refresh.probe import Probe

Array = NDArray[np.float64]
Steps = NDArray[np.int64]

# Limit of M T L^3 in the search over triples, about three seconds; it bounds the length L of a segment.
_SEARCH_BUDGET = 5 * 10**8
_FIRST = np.zeros((1, 1), dtype=np.int64)


def optimal_refresh_steps(similarity: ArrayLike | Tensor, num_refreshes: int) -> tuple[int, ...]:
    """The refresh steps that minimise the sum over segments [j, i) of sum_{k=j..i-1} (1 - similarity[k][j]), ascending.

    Exact, in O(M T^2). Among equal schedules, the one with the earliest last refresh wins, then the one before it.
    `similarity` (T, T) is the mean cosine similarity of the states of steps i and j. ValueError if it is not square and
    finite, or num_refreshes is not 1 to T.
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
    """The refresh steps with the smallest predicted error if `forecast` fills the steps between them, ascending.

    The sum of `step_errors` is minimal. "hold" is `optimal_refresh_steps`. With a forecast, the error of a segment also
    depends on the one or two refreshes before it: "linear" is an exact search over pairs, in O(M T^3); "quadratic"
    searches over triples, and is exact among schedules whose segments have at most L steps. L is T if that takes a few
    seconds, and at least one and a half mean segments. ValueError if num_refreshes is not 1 to T.
    """
    require(forecast in STATES_IN_FORECAST, "forecast", forecast, ", ".join(STATES_IN_FORECAST))
    if forecast == "hold":
        return optimal_refresh_steps(probe.similarity, num_refreshes)
    _check_budget(num_refreshes, len(probe.times))
    costs = _Costs(probe, forecast, num_refreshes)
    # One or two refreshes are too few states for a parabola.
    if forecast == "linear" or num_refreshes < 3:
        return _search_pairs(costs, num_refreshes)
    affordable = int((_SEARCH_BUDGET / (num_refreshes * costs.num_steps)) ** (1 / 3))
    longest = min(costs.num_steps, max(affordable, -(-3 * costs.num_steps // (2 * num_refreshes))))
    return _search_triples(costs, num_refreshes, longest)


def uniform_refresh_steps(num_steps: int, num_refreshes: int) -> tuple[int, ...]:
    """num_refreshes evenly spread steps: floor(i T / M) for i = 0 .. M - 1; ValueError for M out of range."""
    _check_budget(num_refreshes, num_steps)
    return tuple(i * num_steps // num_refreshes for i in range(num_refreshes))


def step_errors(probe: Probe, refreshes: Sequence[int], forecast: StateForecast = "hold") -> Array:
    """The predicted error of the state at every step, (T,) float64, 0 at the refreshes, which ascend from 0.

    It is |sum_i w_i u_i - u_k|^2 / 2 + drift (sum_i w_i^2 - 1), averaged over tokens, where w are the weights of the
    forecast and u are unit states: a token's state divided by its norm. For held states, this is 1 - similarity[k][j],
    as in the paper. The second term is there because a run without all refreshes does not meet the probe's states
    exactly, and extrapolating far beyond close refreshes multiplies the difference; the drift is the mean of the first
    term over a uniform schedule with as many refreshes.

    On the digits model, with 250 steps and "linear", this gave smaller errors of the final sample than the relative
    squared error of the states, and than leaving out the second term.
    """
    return _Costs(probe, forecast, len(refreshes)).of(refreshes)


class _Costs:
    """The cost of a forecast through refreshes at other steps, as `step_errors` defines it; without num_refreshes, the
    drift is 0."""

    def __init__(self, probe: Probe, forecast: StateForecast, num_refreshes: int | None = None) -> None:
        similarity = _square(probe.similarity)
        self.times, self.similarity = np.asarray(probe.times), (similarity + similarity.T) / 2
        self.num_steps, self.history, self.drift = len(probe.times), STATES_IN_FORECAST[forecast], 0.0
        if forecast != "hold" and num_refreshes is not None:
            self.drift = float(self.of(uniform_refresh_steps(self.num_steps, num_refreshes)).mean())

    def of(self, refreshes: Sequence[int]) -> Array:
        """(T,): the cost of every step of a schedule."""
        parts = []
        for i, (start, end) in enumerate(pairwise([*refreshes, self.num_steps])):
            nodes = [np.array([[node]]) for node in refreshes[max(0, i + 1 - self.history) : i + 1]]
            parts.append(self(nodes, np.arange(start, end))[0])
        return np.concatenate(parts)

    def __call__(self, nodes: Sequence[Steps], steps: Steps) -> Array:
        """(A, K): nodes are arrays (A, 1) or (1, 1) of refreshes; steps (K,) are those whose states are forecast."""
        weights = [self._weight(i, nodes, steps) for i in range(len(nodes))]
        s = self.similarity
        square: Array = s[steps, steps]
        amplification: Array | float = -1.0
        for i, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
            square = square + weight * (weight * s[node, node] - 2 * s[node, steps])
            amplification = amplification + weight * weight
            for other, other_weight in zip(nodes[:i], weights[:i], strict=True):
                square = square + 2 * weight * other_weight * s[node, other]
        # Rounding may make the distance of two equal states slightly negative.
        return np.maximum(square, 0) / 2 + self.drift * amplification

    def segments(self, nodes: Sequence[Steps], steps: Steps) -> Array:
        """(A, K): the sum over steps[: i + 1], for every i."""
        return self(nodes, steps).cumsum(axis=1)

    def _weight(self, i: int, nodes: Sequence[Steps], steps: Steps) -> Array:
        """Lagrange's weight of nodes[i] at the times of the steps (`solvers.lagrange_weights`, for arrays)."""
        t, own = self.times[steps], self.times[nodes[i]]
        weight = np.ones((1, len(steps)))
        for j, node in enumerate(nodes):
            if j != i:
                weight = weight * ((t - self.times[node]) / (own - self.times[node]))
        return weight


def _possible(c: int, least: int, num_refreshes: int, num_steps: int) -> slice:
    """The possible numbers of refreshes, `least` or more, up to step c, which is one: at most the steps so far, and
    enough that the remaining steps have room for the others."""
    return slice(max(least, num_refreshes - (num_steps - 1 - c)), min(num_refreshes, c + 1) + 1)


def _search_pairs(costs: _Costs, num_refreshes: int) -> tuple[int, ...]:
    """The best schedule where a segment's cost depends on its own and the previous refresh."""
    count = costs.num_steps
    # best[m, b, d]: cost of the steps before d with m refreshes, the last at b; before[m, b, d]: the refresh before b.
    best = np.full((num_refreshes + 1, count, count + 1), np.inf)
    before = np.zeros(best.shape, dtype=np.int32)
    steps = np.arange(count)
    best[1, 0, 1:] = costs.segments([_FIRST], steps)[0]
    for b in range(1, count):
        ms = _possible(b, 2, num_refreshes, count)
        segment = costs.segments([steps[:b, None], steps[b : b + 1, None]], steps[b:])
        totals = best[ms.start - 1 : ms.stop - 1, :b, b][:, :, None] + segment
        before[ms, b, b + 1 :] = totals.argmin(axis=1)
        best[ms, b, b + 1 :] = totals.min(axis=1)
    refreshes = [count, int(best[num_refreshes, :, count].argmin())]
    for m in range(num_refreshes, 1, -1):
        refreshes.append(int(before[m, refreshes[-1], refreshes[-2]]))
    return tuple(reversed(refreshes[1:]))


def _search_triples(costs: _Costs, num_refreshes: int, longest: int) -> tuple[int, ...]:
    """The best schedule of three or more refreshes where a segment's cost depends on its own and the two refreshes
    before it, among those whose segments have at most `longest` steps."""
    count = costs.num_steps
    # best[m, c, u, v]: cost of the steps before c + v with m refreshes, the last two at c - u and c;
    # before[m, c, u, v]: length of the segment that ends at c - u.
    best = np.full((num_refreshes + 1, count, longest + 1, longest + 1), np.inf)
    before = np.zeros(best.shape, dtype=np.int32)
    steps = np.arange(count)
    held = costs.segments([_FIRST], steps)[0]
    for c in range(1, count):
        last, ahead = steps[c : c + 1, None], steps[c : c + longest]
        vs = slice(1, len(ahead) + 1)
        ms = _possible(c, 3, num_refreshes, count)
        if c <= longest:
            best[2, c, c, vs] = held[c - 1] + costs.segments([_FIRST, last], ahead)[0]
        for u in range(1, min(longest, c - 1) + 1):
            b = c - u
            lengths = np.arange(1, min(longest, b) + 1)
            segment = costs.segments([b - lengths[:, None], steps[b : b + 1, None], last], ahead)
            totals = best[ms.start - 1 : ms.stop - 1, b, 1 : len(lengths) + 1, u][:, :, None] + segment
            before[ms, c, u, vs] = totals.argmin(axis=1) + 1
            best[ms, c, u, vs] = totals.min(axis=1)
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
        raise ValueError(f"similarity has shape {matrix.shape}; expected (T, T), a row and a column per step")
    if not np.isfinite(matrix).all():
        raise ValueError("similarity holds values that are not finite")
    return matrix


def _check_budget(num_refreshes: int, num_steps: int) -> None:
    valid = type(num_refreshes) is int and 1 <= num_refreshes <= num_steps
    require(valid, "num_refreshes", num_refreshes, f"1 to {num_steps}, the number of steps")
