"""The norm family's forward kernel with a forecast, against the reference."""

import pytest
import torch

from norm_cases import FORECAST_OPS, check_forecast_against_reference, launch_with_forecast, make_forecast_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERY_OP = pytest.mark.parametrize("op", FORECAST_OPS)
GRANULARITIES = pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
HISTORIES = pytest.mark.parametrize("history", [2, 3])


def check(op, inputs, forecast):
    check_forecast_against_reference(op, inputs, forecast, launch_with_forecast(op, inputs, forecast))


@EVERY_OP
@GRANULARITIES
@HISTORIES
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 5, 72), BF16), ((1, 2, 341), FP16), ((1, 2, 1152), BF16), ((2, 3, 64), FP32)]
)
def test_matches_reference(op, per_token, history, shape, dtype):
    check(op, *make_forecast_inputs(op, shape, per_token, dtype, history))


def test_rows_of_several_warps():
    op = "gated_residual_rms_norm_modulate"
    check(op, *make_forecast_inputs(op, (1, 2, 4100), True, BF16, 3))


@EVERY_OP
@HISTORIES
def test_histories_of_strides_of_their_own(op, history):
    inputs, forecast = make_forecast_inputs(op, (2, 3, 72), True, FP32, history)
    inputs["shift"] = inputs["shift"].contiguous()
    inputs["scale"] = inputs["scale"].transpose(0, 2).contiguous().transpose(0, 2)
    check(op, inputs, forecast)


@EVERY_OP
@HISTORIES
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("step", "shape"), [(0, ()), (2, (1,))])
def test_the_step_selects_the_row(op, history, step, shape, dtype):
    inputs, (weights, _) = make_forecast_inputs(op, (1, 2, 72), True, FP32, history)
    check(op, inputs, (weights, torch.full(shape, step, dtype=dtype)))


@EVERY_OP
@HISTORIES
@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_table_is_nan(op, history, step):
    inputs, (weights, _) = make_forecast_inputs(op, (1, 2, 72), True, FP32, history)
    for output in launch_with_forecast(op, inputs, (weights, torch.tensor([step]))):
        assert output.isnan().all()


@EVERY_OP
@GRANULARITIES
@pytest.mark.parametrize("row", [(1.0, 0.0), (0.0, 1.0), (1.5, -0.5, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)])
def test_what_a_zero_weight_drops_may_be_nan(op, per_token, row):
    inputs, (weights, step) = make_forecast_inputs(op, (1, 3, 72), per_token, BF16, len(row))
    weights[1] = torch.tensor(row)
    expected = launch_with_forecast(op, inputs, (weights, step))
    for tensor in inputs.values():
        if tensor.ndim == 4:
            tensor[weights[1] == 0] = float("nan")
    made = launch_with_forecast(op, inputs, (weights, step))
    assert all(output.isfinite().all() for output in made)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
