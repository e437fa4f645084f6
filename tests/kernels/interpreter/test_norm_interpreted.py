"""The norm family's kernels, forward, backward and with a forecast, against the reference."""

import pytest
import torch

from ddt_kernels import norm_launch
from kernel_testing import BF16, FP16, FP32, assert_all_equal, check_against_reference
from norm_cases import (
    FORECAST_OPS,
    OPS,
    check_launched,
    launch_forward,
    make_forecast_inputs,
    make_inputs,
    with_forecast,
)

EVERY_OP = pytest.mark.parametrize("op", OPS)
EVERY_FORECAST_OP = pytest.mark.parametrize("op", FORECAST_OPS)
GRANULARITIES = pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
HISTORIES = pytest.mark.parametrize("history", [2, 3])


@EVERY_OP
@GRANULARITIES
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 9, 72), BF16),
        ((3, 2, 341), BF16),
        ((1, 5, 1152), BF16),
        ((3, 1, 72), BF16),
        ((1, 2, 64), BF16),
        ((3, 2, 72), FP16),
        ((1, 2, 1152), FP32),
    ],
)
def test_matches_reference(op, shape, per_token, dtype):
    check_launched(op, make_inputs(op, shape, per_token, dtype))


@EVERY_OP
@GRANULARITIES
def test_backward_programs_that_walk_many_rows(op, per_token, monkeypatch):
    monkeypatch.setattr(norm_launch, "backward_rows_per_program", lambda batch, tokens, resident: 3)
    check_launched(op, make_inputs(op, (2, 5, 72), per_token, FP32))


@EVERY_OP
def test_forward_programs_that_walk_many_rows(op, monkeypatch):
    monkeypatch.setattr(norm_launch, "forward_rows_per_program", lambda batch, tokens, per_token: 3)
    check_launched(op, make_inputs(op, (2, 5, 72), False, FP32))


@pytest.mark.parametrize("history", [2, 3])
def test_forecasts_that_walk_many_rows(history, monkeypatch):
    monkeypatch.setattr(norm_launch, "forward_rows_per_program", lambda batch, tokens, per_token: 3)
    op = "gated_residual_rms_norm_modulate"
    check_forecast(op, *make_forecast_inputs(op, (2, 5, 72), False, FP32, history))


@pytest.mark.parametrize(
    ("shape", "per_token", "strided"),
    [
        ((1, 2, 72), False, False),
        ((1, 2, 72), True, False),
        ((1, 20, 72), False, True),  # more partial sums than one tile of them
        ((1, 2, 4100), True, True),  # rows of several warps
    ],
)
def test_special_layouts_and_shapes(shape, per_token, strided):
    assert norm_launch.backward_rows_per_program(1, 20, 132) == 1
    op = "gated_residual_rms_norm_modulate"  # which has all inputs
    check_launched(op, make_inputs(op, shape, per_token, BF16, strided=strided))


def test_fp32_weight_with_bf16_activations():
    inputs = make_inputs("rms_norm_modulate", (2, 3, 72), False, BF16)
    inputs["weight"] = inputs["weight"].float() + 1e-4
    check_launched("rms_norm_modulate", inputs)


def check_forecast(op, inputs, forecast):
    check_against_reference(with_forecast(op, forecast), inputs, launch_forward(op, inputs, forecast))


@EVERY_FORECAST_OP
@GRANULARITIES
@pytest.mark.parametrize(
    ("history", "shape", "dtype"),
    [
        (2, (2, 5, 72), BF16),
        (3, (2, 5, 72), BF16),
        (2, (1, 2, 341), FP16),
        (3, (1, 2, 1152), BF16),
        (3, (2, 3, 64), FP32),
    ],
)
def test_forecast_matches_reference(op, per_token, history, shape, dtype):
    check_forecast(op, *make_forecast_inputs(op, shape, per_token, dtype, history))


def test_forecast_on_rows_of_several_warps():
    op = "gated_residual_rms_norm_modulate"
    check_forecast(op, *make_forecast_inputs(op, (1, 2, 4100), True, BF16, 3))


@EVERY_FORECAST_OP
@HISTORIES
def test_histories_of_strides_of_their_own(op, history):
    inputs, forecast = make_forecast_inputs(op, (2, 3, 72), True, FP32, history)
    inputs["shift"] = inputs["shift"].contiguous()
    inputs["scale"] = inputs["scale"].transpose(0, 2).contiguous().transpose(0, 2)
    check_forecast(op, inputs, forecast)


@EVERY_FORECAST_OP
@pytest.mark.parametrize(
    ("history", "step", "shape", "dtype"), [(2, 0, (), torch.int64), (3, 2, (1,), torch.int32), (3, 0, (), torch.int32)]
)
def test_the_step_selects_the_row(op, history, step, shape, dtype):
    inputs, (weights, _) = make_forecast_inputs(op, (1, 2, 72), True, FP32, history)
    check_forecast(op, inputs, (weights, torch.full(shape, step, dtype=dtype)))


@EVERY_FORECAST_OP
@pytest.mark.parametrize(("history", "step"), [(2, -1), (3, 3)])
def test_a_step_outside_the_table_is_nan(op, history, step):
    inputs, (weights, _) = make_forecast_inputs(op, (1, 2, 72), True, FP32, history)
    for output in launch_forward(op, inputs, (weights, torch.tensor([step]))):
        assert output.isnan().all()


@EVERY_FORECAST_OP
@pytest.mark.parametrize(
    ("row", "per_token"),
    [
        ((1.0, 0.0), False),
        ((0.0, 1.0), True),
        ((1.5, -0.5, 0.0), False),
        ((1.5, -0.5, 0.0), True),
        ((0.0, 0.0, 1.0), True),
        ((1.0, 0.0, 0.0), True),
    ],
)
def test_what_a_zero_weight_drops_may_be_nan(op, row, per_token):
    inputs, (weights, step) = make_forecast_inputs(op, (1, 3, 72), per_token, BF16, len(row))
    weights[1] = torch.tensor(row)
    expected = launch_forward(op, inputs, (weights, step))
    for tensor in inputs.values():
        if tensor.ndim == 4:
            tensor[weights[1] == 0] = float("nan")
    made = launch_forward(op, inputs, (weights, step))
    assert all(output.isfinite().all() for output in made)
    assert_all_equal(made, expected)
