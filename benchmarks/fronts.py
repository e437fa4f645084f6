"""Which of many (cost, loss) points are worth having: a Pareto front, what lies near it, and what to take for a budget.

Lower is better in both. Points that are equal in both count once, as the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence

Costs = Sequence[float]


def front(costs: Costs, losses: Costs) -> list[int]:
    """The points, by number and ascending cost, that no other beats: none costs at most as much and loses at most as
    much."""
    return _ahead(costs, losses, 1.0)


def near_front(costs: Costs, losses: Costs, factor: float) -> list[int]:
    """The points, by number and ascending cost, that lose less than `factor` times the least of those that cost at most
    as much; those on the front too."""
    return sorted({*_ahead(costs, losses, factor), *front(costs, losses)}, key=lambda i: (costs[i], losses[i], i))


def _ahead(costs: Costs, losses: Costs, factor: float) -> list[int]:
    """Points that lose less than `factor` times the least of those before them, in order of cost."""
    chosen, least = [], float("inf")
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i], i)):
        if losses[i] < factor * least:
            chosen.append(i)
        least = min(least, losses[i])
    return chosen


def dominating(costs: Costs, losses: Costs, point: int) -> list[int]:
    """The points, by number and ascending loss, that cost at most as much as `point` and lose less, or cost less and
    lose at most as much."""
    better = [
        i
        for i in range(len(costs))
        if costs[i] <= costs[point]
        and losses[i] <= losses[point]
        and (costs[i] < costs[point] or losses[i] < losses[point])
    ]
    return sorted(better, key=lambda i: (losses[i], costs[i], i))


def recommend(costs: Costs, losses: Costs, budget: float, tolerance: float) -> int | None:
    """The cheapest point whose loss is at most `tolerance` times the least that the budget affords; None where it
    affords nothing. A tolerance of 1 buys the last percent, whatever it costs."""
    affordable = [i for i in range(len(costs)) if costs[i] <= budget]
    if not affordable:
        return None
    least = min(losses[i] for i in affordable)
    return min((i for i in affordable if losses[i] <= tolerance * least), key=lambda i: (costs[i], losses[i], i))
