"""guided_step's kernel against the reference."""

import pytest
import torch

from ddt_kernels.guided_step import launch_guided_step
from guided_step_cases import check_against_reference, fresh, make_inputs, results
from kernel_testing import BF16, DTYPES

SHAPE = (2, 3, 6, 10)


def launch(inputs, patch_size, in_place=False):
    arguments = fresh(inputs)
    out = arguments["x"] if in_place else torch.empty(inputs["x"].shape)
    launch_guided_step(*arguments.values(), out, patch_size)
    if not in_place:
        assert torch.equal(arguments["x"], inputs["x"])
    return results(arguments, out)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in-place"])
@pytest.mark.parametrize("guided", [False, True], ids=["cond", "guided"])
@pytest.mark.parametrize("differences", [0, 1, 3])
@pytest.mark.parametrize("velocities", [0, 1, 3])
def test_matches_reference(guided, differences, velocities, in_place):
    inputs = make_inputs(SHAPE, 2, guided=guided, differences=differences, velocities=velocities)
    check_against_reference(inputs, 2, launch(inputs, 2, in_place))


@DTYPES
@pytest.mark.parametrize(
    ("shape", "patch_size"), [((1, 1, 3, 5), 1), ((2, 4, 8, 8), 2), ((1, 5, 8, 12), 4), ((3, 3, 16, 14), 2)]
)
def test_patches_of_every_size_and_dtype(shape, patch_size, dtype):
    inputs = make_inputs(shape, patch_size, dtype, noise=True, velocities=2, differences=1)
    check_against_reference(inputs, patch_size, launch(inputs, patch_size))


def test_more_than_one_program_per_sample():
    inputs = make_inputs((2, 4, 14, 22), 2, BF16, velocities=1, differences=2)
    check_against_reference(inputs, 2, launch(inputs, 2))


def test_a_single_row_without_a_step():
    inputs = make_inputs(SHAPE, 2, steps=None, noise=True)
    check_against_reference(inputs, 2, launch(inputs, 2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("step", [0, 2])
def test_the_step_selects_the_row(step, dtype):
    inputs = make_inputs(SHAPE, 2)
    inputs["step"] = torch.tensor(step, dtype=dtype)
    check_against_reference(inputs, 2, launch(inputs, 2))


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_table_is_nan(step):
    inputs = make_inputs(SHAPE, 2)
    inputs["step"] = torch.tensor([step])
    assert launch(inputs, 2)["x"].isnan().all()


@pytest.mark.parametrize("guided", [False, True], ids=["cond", "guided"])
def test_what_a_zero_coefficient_drops_may_be_nan(guided):
    inputs = make_inputs(SHAPE, 2, guided=guided, velocities=3, differences=3, noise=True)
    clean = fresh(inputs)
    inputs["coefficients"][1, [1, 3, 4, 5, 7, 8, 9]] = 0
    for name in ("velocity_history", "noise"):
        inputs[name].fill_(float("nan"))
    inputs["difference_history"][0 if guided else 1 :].fill_(float("nan"))
    made = launch(inputs, 2)
    assert made["x"].isfinite().all()
    assert made["velocity_history"][0].isfinite().all()
    clean["coefficients"] = inputs["coefficients"]
    assert torch.equal(launch(clean, 2)["x"], made["x"])
