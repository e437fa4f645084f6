"""Fronts and recommendations against brute force."""

import random

import pytest

from benchmarks.fronts import dominating, front, near_front, recommend

CASES = [
    (
        [random.Random(seed).randint(1, 12) for _ in range(size)],
        [random.Random(~seed).randint(1, 12) for _ in range(size)],
    )
    for seed, size in ((0, 1), (1, 5), (2, 40), (3, 200))
]
CASES += [
    ([generator.randint(1, span) for _ in range(60)], [generator.randint(1, span) / 3 for _ in range(60)])
    for generator, span in ((random.Random(4), 5), (random.Random(5), 20), (random.Random(6), 1000))
]


def beats(costs, losses, i, j):
    return costs[i] <= costs[j] and losses[i] <= losses[j] and (costs[i], losses[i]) != (costs[j], losses[j])


@pytest.mark.parametrize(("costs", "losses"), CASES)
def test_the_front_is_what_nothing_beats(costs, losses):
    numbers = range(len(costs))
    unbeaten = [j for j in numbers if not any(beats(costs, losses, i, j) for i in numbers)]
    found = front(costs, losses)
    # Of equal points the first stands for all.
    assert sorted(found) == [
        j for j in unbeaten if not any((costs[i], losses[i]) == (costs[j], losses[j]) for i in range(j))
    ]
    assert [costs[i] for i in found] == sorted({costs[i] for i in unbeaten})


@pytest.mark.parametrize(("costs", "losses"), CASES)
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_near_the_front_is_what_loses_little_more(costs, losses, factor):
    numbers = range(len(costs))
    found = near_front(costs, losses, factor)
    assert set(front(costs, losses)) <= set(found)
    assert [costs[i] for i in found] == sorted(costs[i] for i in found)
    for j in numbers:
        cheaper = [losses[i] for i in numbers if (costs[i], losses[i]) < (costs[j], losses[j])]
        if j not in front(costs, losses) and cheaper and losses[j] != min(cheaper):
            assert (j in found) == (losses[j] < factor * min(cheaper))


@pytest.mark.parametrize(("costs", "losses"), CASES)
def test_what_dominates_a_point(costs, losses):
    for j in range(0, len(costs), 7):
        found = dominating(costs, losses, j)
        assert sorted(found) == [i for i in range(len(costs)) if beats(costs, losses, i, j)]
        assert [losses[i] for i in found] == sorted(losses[i] for i in found)


@pytest.mark.parametrize(("costs", "losses"), CASES)
@pytest.mark.parametrize("tolerance", [1.0, 1.5])
def test_the_recommendation_is_the_cheapest_that_is_good_enough(costs, losses, tolerance):
    for budget in sorted(set(costs)):
        index = recommend(costs, losses, budget, tolerance)
        affordable = [i for i in range(len(costs)) if costs[i] <= budget]
        enough = [i for i in affordable if losses[i] <= tolerance * min(losses[j] for j in affordable)]
        assert index in enough
        assert costs[index] == min(costs[i] for i in enough)


def test_a_tolerance_spares_what_the_last_percent_costs():
    costs, losses = [1.0, 2.0, 50.0], [0.5, 0.101, 0.1]
    assert [recommend(costs, losses, budget, 1.1) for budget in (0.5, 1, 2, 100)] == [None, 0, 1, 1]
    assert recommend(costs, losses, 100, 1.0) == 2
