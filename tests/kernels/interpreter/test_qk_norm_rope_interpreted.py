"""qk_norm_rope's kernels, forward, in place and backward, against the reference."""

import pytest
import torch

from ddt_kernels import qk_norm_rope_launch
from ddt_kernels.qk_norm_rope_launch import launch_backward, launch_forward
from kernel_testing import BF16, FP16, FP32
from qk_norm_rope_cases import check_qk_norm_rope, make_grad, make_inputs

CASES = [((2, 5, 3, 72), BF16), ((1, 3, 16, 72), BF16), ((3, 1, 2, 24), BF16), ((1, 2, 12, 64), BF16)]
CASES += [((1, 6, 1, 80), BF16), ((2, 3, 2, 128), BF16), ((1, 2, 2, 256), BF16), ((1, 5, 3, 20), BF16)]
CASES += [((1, 9, 2, 4), BF16), ((1, 2, 3, 12), BF16), ((1, 3, 2, 252), BF16)]
CASES += [(shape, dtype) for shape in ((2, 3, 3, 72), (1, 3, 2, 44)) for dtype in (FP16, FP32)]
CASES += [((1, 2, 2, 256), FP32)]


def check(inputs, eps=1e-6):
    grad, arguments = make_grad(inputs), (*inputs.values(), eps)
    output = launch_forward(*arguments, out=torch.empty(inputs["qkv"].shape, dtype=inputs["qkv"].dtype))
    assert output.is_contiguous()
    gradients = dict(zip(inputs, launch_backward(grad, *arguments), strict=False))  # the tables, last, have none
    check_qk_norm_rope(inputs, [output], [grad], gradients, eps)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_matches_reference(shape, dtype):
    check(make_inputs(shape, dtype))


def test_contiguous_inputs_fp32_weights_and_an_eps_that_matters():
    check(make_inputs((2, 3, 3, 72), BF16, strided=False))
    check(make_inputs((2, 3, 3, 72), FP32, strided=False))
    check(make_inputs((2, 3, 2, 24), BF16, weight_dtype=FP32))
    check(make_inputs((2, 3, 3, 24), FP32), eps=2.0)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 5, 3, 72), BF16), ((1, 4, 2, 80), FP16), ((1, 3, 5, 20), FP32)])
def test_in_place_leaves_all_else_alone(shape, dtype):
    inputs = make_inputs(shape, dtype)
    buffer = inputs["qkv"]._base  # (N, B, 4, H, D): v and what lies between the tokens included
    before, kept = buffer.clone(), inputs["qkv"].clone()
    made = launch_forward(*inputs.values(), 1e-6, out=inputs["qkv"])
    assert made is inputs["qkv"]
    check_qk_norm_rope(inputs | {"qkv": kept}, [made])
    changed = (buffer != before).reshape(shape[1], shape[0], 4, -1)
    assert not changed[:, :, 2:].any()
    assert changed[:, :, :2].any(-1).all()


def test_many_groups_of_heads_in_a_program(monkeypatch):
    monkeypatch.setattr(qk_norm_rope_launch, "groups_per_program", lambda tokens, heads, lane_heads: 2)
    assert qk_norm_rope_launch.tile_config(21, 64, 2).lane_heads == 4  # three programs per token, the last half empty
    check(make_inputs((1, 5, 21, 64), BF16))


def test_backward_programs_that_walk_many_tiles(monkeypatch):
    monkeypatch.setattr(qk_norm_rope_launch, "tokens_per_program", lambda batch, tokens, tile: 2 * tile)
    tile = qk_norm_rope_launch.tile_config(2, 72, 4).tokens
    check(make_inputs((2, 3 * tile + 1, 2, 72), FP32))
