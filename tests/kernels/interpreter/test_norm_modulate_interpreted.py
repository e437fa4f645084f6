"""The norm family's kernels, forward and backward, against the reference."""

import pytest
import torch

from ddt_kernels import norm_launch
from norm_cases import OPS, check_against_reference, launch_backward, launch_forward, make_grads, make_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [((1, 24, 72), BF16), ((3, 2, 341), BF16), ((1, 5, 1152), BF16), ((3, 1, 72), BF16), ((1, 2, 64), BF16)]
CASES += [(shape, dtype) for shape in ((3, 2, 72), (1, 2, 1152)) for dtype in (FP16, FP32)]


def check(op, inputs):
    grads = make_grads(op, inputs)
    check_against_reference(op, inputs, grads, launch_forward(op, inputs), launch_backward(op, inputs, grads))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_matches_reference(op, shape, per_token, dtype):
    check(op, make_inputs(op, shape, per_token, dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_contiguous_inputs(op, per_token):
    check(op, make_inputs(op, (1, 2, 72), per_token, BF16, strided=False))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_backward_programs_that_walk_many_rows(op, per_token, monkeypatch):
    monkeypatch.setattr(norm_launch, "backward_rows_per_program", lambda batch, tokens: 3)
    check(op, make_inputs(op, (2, 5, 72), per_token, FP32))


def test_more_partial_sums_than_one_tile_of_them():
    assert norm_launch.backward_rows_per_program(1, 20) == 1
    check("rms_norm_modulate", make_inputs("rms_norm_modulate", (1, 20, 72), False, BF16))


def test_rows_of_several_warps():
    op = "gated_residual_rms_norm_modulate"
    check(op, make_inputs(op, (1, 2, 4100), True, BF16))


def test_fp32_weight_with_bf16_activations():
    inputs = make_inputs("rms_norm_modulate", (2, 3, 72), False, BF16)
    inputs["weight"] = inputs["weight"].float() + 1e-4
    check("rms_norm_modulate", inputs)
