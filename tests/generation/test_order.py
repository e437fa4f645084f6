"""The order of samples in a file: fixed for all time, and mixed."""

import hashlib

import numpy as np
import torch

from ddt_fast.generation.images import grid_columns
from ddt_fast.generation.seeds import Assignment, assign_labels, shuffled_order


def test_the_permutation_never_changes():
    assert shuffled_order(12).tolist() == [2, 4, 6, 8, 5, 10, 1, 11, 7, 0, 9, 3]
    digest = hashlib.sha256(shuffled_order(50_000).astype("<i8").tobytes()).hexdigest()
    assert digest == "d622806430ecc5bef7f2b1028f2d7f3ce52a44cde5e23d44bda036f5213a72db"


def test_it_is_a_permutation_and_nested():
    order = shuffled_order(5000)
    assert sorted(order.tolist()) == list(range(5000))
    np.testing.assert_array_equal(order[order < 700], shuffled_order(700))


def test_contiguous_splits_hold_all_classes_about_equally():
    """What ADM's Inception Score needs of 50,000 samples in 10 splits: as mixed as drawing at random."""
    drawn = Assignment.of_draws(assign_labels(50_000, 1000), range(50_000), shuffle=True)
    assert np.bincount(drawn.labels).tolist() == [50] * 1000
    for split in np.split(drawn.labels, 10):
        counts = np.bincount(split, minlength=1000)
        assert (counts > 0).sum() > 980
        assert 1.9 < counts.std() < 2.4  # hypergeometric: sqrt(50 · 0.1 · 0.9) = 2.12
    np.testing.assert_array_equal(drawn.labels, drawn.seeds % 1000)


def test_first_draws_are_found_wherever_they_lie():
    drawn = Assignment.of_draws(assign_labels(200, 10), range(300, 500), shuffle=True)
    positions = drawn.first_draws(20)
    assert drawn.seeds[positions].tolist() == list(range(300, 320))
    assert drawn.labels[positions].tolist() == [*range(10), *range(10)]
    assert len(drawn.first_draws(1000)) == 200
    plain = Assignment.of_draws(torch.tensor([3, 1]), [5, 2**63 - 1], shuffle=False)
    assert plain.seeds.tolist() == [5, 2**63 - 1]


def test_grids_of_few_classes_have_whole_rounds_in_a_row():
    assert [grid_columns(classes) for classes in (1, 2, 3, 4, 6, 7, 10, 1000)] == [10, 10, 9, 8, 6, 7, 10, 10]
