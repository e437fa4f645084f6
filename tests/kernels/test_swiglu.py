"""swiglu and swiglu_mlp: what is kept for the backward pass, tiles, machine code."""

import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ddt_kernels
from ddt_kernels import reference, runtime, swiglu_launch
from ddt_kernels.compilation import compiling_for, programs_per_sm, resource_usage
from dispatched import Dispatched
from kernel_testing import (
    BF16,
    COMPILES,
    FP32,
    FP64,
    assert_all_equal,
    check_against_reference,
    kept_for_backward,
    poison_empty,
    with_gradients,
)
from operators import SWIGLU, SWIGLU_MLP
from swiglu_cases import assert_silu, check_silu, make_grad, make_inputs, silu_gates

BOTH = pytest.mark.parametrize("op", [SWIGLU, SWIGLU_MLP], ids=str)


def keeps(seen):
    """The `keep` of every forward."""
    return [args[-1] for name, args in seen.calls if name in ("swiglu", "swiglu_mlp")]


def test_reference_backward_is_the_gradient():
    inputs = SWIGLU.inputs(FP64)
    grad = make_grad(inputs)
    gate_up = torch.cat([inputs["x"] @ inputs["w1"].T, inputs["x"] @ inputs["w3"].T], -1)
    expected = with_gradients(reference.swiglu, list(inputs.values()), [grad])[1]
    grad_x, grad_weights, nothing = reference.swiglu_backward(grad, *inputs.values(), gate_up)
    torch.testing.assert_close([grad_x, *grad_weights.chunk(2)], expected)
    assert nothing.numel() == 0


@pytest.mark.parametrize("lead", [(4,), (1, 4), (2, 2, 3)])
def test_any_leading_dimensions(lead):
    _, w1, w3 = SWIGLU.inputs().values()
    x = torch.randn(*lead, 20, requires_grad=True)
    y = ddt_kernels.swiglu(x, w1, w3)
    assert y.shape == (*lead, 12)
    y.sum().backward()
    assert x.grad.shape == x.shape


@BOTH
def test_inference_writes_nothing_for_a_backward_pass(op):
    leaves = op.leaves(op.inputs())
    first, *rest = (leaf.detach() for leaf in leaves)
    with Dispatched() as seen:
        with torch.no_grad():
            op.public(*leaves)
        op.public(first, *rest)
        op.public(first, leaves[1], *rest[1:])
        assert keeps(seen) == [False, False, True]
        checkpoint(op.public, *leaves, use_reentrant=True)
    assert keeps(seen)[3:] == [False]


@BOTH
def test_what_was_not_kept_is_recomputed(op):
    leaves = op.leaves(op.inputs())
    made = [torch.autograd.grad(op.registered(*leaves, *kept)[0].sum(), leaves) for kept in op.constants]
    assert_all_equal(*made)


def test_an_mlp_keeps_two_columns_of_f_instead_of_three_or_four():
    leaves = SWIGLU_MLP.leaves(SWIGLU_MLP.inputs())
    hidden = SWIGLU_MLP.shape[0] * SWIGLU_MLP.shape[1] * SWIGLU_MLP.shape[3]

    def two_ops(x, w1, w3, w2):
        return torch.nn.functional.linear(ddt_kernels.swiglu(x, w1, w3), w2)

    for function, columns in ((ddt_kernels.swiglu_mlp, 2), (two_ops, 3), (reference.swiglu_mlp, 4)):
        kept = kept_for_backward(function, *leaves)
        for leaf in leaves:
            kept.pop(leaf.data_ptr(), None)
        assert sum(kept.values()) == columns * hidden


def chosen(rows, chip=90, configs=swiglu_launch.HALF_BY_DESCRIPTOR):
    config = swiglu_launch.forward_config(rows, 1152, 3072, configs, swiglu_launch.CHIPS[chip])
    return config.block_m, config.block_f


def test_the_tile_follows_the_shape():
    assert [chosen(rows) for rows in (1, 64)] == [(64, 32)] * 2
    assert chosen(128) == (64, 64)
    assert chosen(256) == (128, 64)
    for rows in (512, 1024, 16384, 65536):
        for chip, configs in ((80, swiglu_launch.HALF_BY_POINTER), (90, swiglu_launch.HALF_BY_DESCRIPTOR)):
            assert chosen(rows, chip, configs) == (128, 128)


def test_halves_of_one_tensor_are_stacked_in_place():
    whole = torch.arange(48.0).reshape(8, 6)
    w1, w3 = whole[:, :4].chunk(2)
    for first, second, in_place in ((w1, w3, True), (w1, w3.clone(), False), (w3, w1, False), (w1, w1, False)):
        made = swiglu_launch.stacked(first, second)
        assert torch.equal(made, torch.stack([first, second]))
        assert (made.data_ptr() == first.data_ptr()) == in_place


@pytest.mark.parametrize("exponential", [-1, 1])
@pytest.mark.parametrize("reciprocal", [-1, 1])
def test_silu_of_approximate_instructions_errs_as_little_as_it_says(exponential, reciprocal):
    """What ex2.approx.ftz and rcp.approx.ftz may err by at most (PTX: 2^-22 and 2^-23), everywhere at once."""

    def flushed(exact):
        return torch.where(exact < 2.0**-126, 0.0, exact).float()

    gate = silu_gates()
    power = flushed(torch.exp2((gate * -1.44269504).double()) * (1 + exponential * 2.0**-22))
    assert_silu(gate, gate * flushed((1 + power).double().reciprocal() * (1 + reciprocal * 2.0**-23)))


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("width", [3072, 341])
def test_a_tile_says_how_many_programs_fit_and_its_silu_takes_two_special_instructions(width):
    """The 128x64 tile on sm_90."""

    def compile_one(kernel, args, meta):
        if meta["BLOCK_F"] == 64 and meta["BLOCK_M"] == 128:
            found.append(kernel.warmup(*args, grid=(1,), **meta))

    x, w = (torch.empty(rows, 1152, dtype=BF16, device="meta") for rows in (16384, width))
    found = []
    with compiling_for(90), runtime.recording(compile_one):
        swiglu_launch.launch_forward(x, w, w, True, False)
    (binary,) = found
    configs = swiglu_launch.forward_configs(BF16, True, width % 8 != 0)
    (declared,) = [config.per_sm for config in configs if (config.block_m, config.block_f) == (128, 64)]
    assert declared == programs_per_sm(90, resource_usage(binary.asm["cubin"])[0], binary.metadata.shared, 8)
    instructions = re.findall(r"\b(ex2|rcp|div\.full)\.", binary.asm["ptx"])
    assert instructions.count("ex2") == instructions.count("rcp") > 0
    assert "div.full" not in instructions


@pytest.mark.gpu
def test_silu_on_a_gpu():
    check_silu("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 65, 128, 129, 256, 257, 4096])
def test_any_number_of_rows_on_a_gpu(rows, monkeypatch):
    poison_empty(monkeypatch)
    inputs = make_inputs((1, rows, 1152, 3072), BF16, device="cuda")
    check_against_reference(reference.swiglu, inputs, [ddt_kernels.swiglu(*inputs.values())])


@pytest.mark.gpu
def test_tf32_only_where_torch_allows_it(monkeypatch):
    inputs = make_inputs((1, 256, 1152, 3072), FP32, device="cuda")
    oracle = reference.swiglu(*(tensor.double() for tensor in inputs.values()))

    def error():
        return (ddt_kernels.swiglu(*inputs.values()) - oracle).abs().max().item()

    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    exact = error()
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert exact < 1e-4 < error()
