"""attention and qkv_attention: the log-sum-exp, the default scale, what is kept for the backward pass, tiles."""

import pytest
import torch

import ddt_kernels
from attention_cases import LAYOUTS, check_attention, check_logsumexp, make_grad, make_heads
from ddt_kernels import attention_launch, reference
from ddt_kernels.compilation import compile_case
from kernel_testing import (
    BF16,
    COMPILES,
    DTYPES,
    FP32,
    FP64,
    assert_all_equal,
    compiled_results,
    kept_for_backward,
    total_bytes,
    with_gradients,
)
from operators import ATTENTION, QKV_ATTENTION

SHAPE = (2, 5, 3, 12)
FORWARD = torch.ops.ddt_kernels.attention.default
BACKWARD = torch.ops.ddt_kernels.attention_backward.default


def attend(q, k, v):
    """softmax(q·kᵀ / √D)·v, written out."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def test_the_reference_is_attention():
    heads = make_heads(SHAPE, FP64)
    torch.testing.assert_close(reference.attention(*heads), attend(*heads))
    expected = torch.einsum("bnhd,bmhd->bhnm", *heads[:2]).mul(0.7).exp().sum(-1).log()
    torch.testing.assert_close(reference.attention_logsumexp(*heads[:2], 0.7), expected)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_logsumexp(dtype, layout, device):
    for shape in [SHAPE] if device == "cpu" else ATTENTION.gpu_shapes:
        heads = make_heads(shape, dtype, layout, device)
        check_logsumexp(heads, FORWARD(*heads, shape[-1] ** -0.5)[1])


def test_scale_defaults_to_the_inverse_root_of_the_head_dim():
    heads = make_heads(SHAPE, FP32)
    assert torch.equal(ddt_kernels.attention(*heads), ddt_kernels.attention(*heads, scale=12**-0.5))
    torch.testing.assert_close(ddt_kernels.attention(*heads, scale=0.7), reference.attention(*heads, 0.7))


def two_ops(qkv, *others):
    return ddt_kernels.attention(*ddt_kernels.qk_norm_rope(qkv, *others).unbind(2))


@DTYPES
@pytest.mark.parametrize("layout", QKV_ATTENTION.layouts)
def test_on_a_cpu_qkv_attention_is_the_two_ops_bit_for_bit(dtype, layout):
    inputs = QKV_ATTENTION.inputs(dtype, layout)
    leaves, grads = QKV_ATTENTION.leaves(inputs), QKV_ATTENTION.make_grads(inputs)
    made, expected = (
        with_gradients(QKV_ATTENTION.of_leaves(function, inputs), leaves, grads)
        for function in (ddt_kernels.qkv_attention, two_ops)
    )
    for a, b in zip(made, expected, strict=True):
        assert_all_equal(a, b)


def test_qkv_attention_keeps_three_tensors_instead_of_six():
    inputs = QKV_ATTENTION.inputs(layout="contiguous")
    heads = inputs["qkv"][:, :, 0].numel()
    for function, tensors in ((ddt_kernels.qkv_attention, 3), (two_ops, 6)):
        # As in a layer: qkv is a GEMM's output, which is alive for as long as something keeps it.
        qkv, *weights = QKV_ATTENTION.leaves(inputs)
        kept = kept_for_backward(QKV_ATTENTION.of_leaves(function, inputs), qkv * 1, *weights)
        assert sum(size for size in kept.values() if size >= heads) == (tensors + 1) * heads


def test_heads_are_split_where_it_saves_columns():
    split = {head_dim: attention_launch.split_head(head_dim) for head_dim in range(4, 129, 4)}
    assert [split[d] for d in (16, 24, 32, 64, 72, 80, 96, 128)] == [
        *((16, 0), (32, 0), (32, 0), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0))
    ]
    for head_dim, (main, tail) in split.items():
        assert head_dim <= main + tail
        assert main + tail <= max(16, 1 << (head_dim - 1).bit_length())
        assert all(width == 0 or (width >= 16 and width & (width - 1) == 0) for width in (main, tail))


CROSS = [(5, 3), (3, 7), (1, 9), (9, 1)]
GPU_CROSS = [(256, 384), (4096, 4224), (130, 77), (1, 300), (300, 1)]


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("device", "table"), [("cpu", CROSS), pytest.param("cuda", GPU_CROSS, marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_queries_and_keys_differ_in_number(device, table, layout, dtype):
    for queries, keys in table:
        heads = make_heads((2, queries, 3, 72 if device == "cuda" else 12), dtype, layout, device, keys=keys)
        outputs, gradients = with_gradients(ddt_kernels.attention, heads, [make_grad(heads)])
        check_attention(heads, outputs, [make_grad(heads)], dict(zip("qkv", gradients, strict=True)))
        check_logsumexp(heads, FORWARD(*heads, heads[0].shape[-1] ** -0.5)[1])


@pytest.mark.slow
def test_queries_and_keys_differ_in_number_compiled_and_counted():
    heads = make_heads((2, 3, 3, 12), FP32, keys=7)
    grad, scale = make_grad(heads), 12**-0.5
    torch.testing.assert_close(reference.attention(*heads), attend(*heads))
    outputs, gradients = with_gradients(ddt_kernels.attention, heads, [grad])
    for function, opaque in ((ddt_kernels.attention, False), (lambda *qkv: FORWARD(*qkv, scale)[0], True)):
        made, made_gradients, operators = compiled_results(function, heads, [grad])
        assert bool(operators) == opaque
        assert_all_equal(made, outputs)
        torch.testing.assert_close(made_gradients, gradients)
    torch.library.opcheck(FORWARD, (*(tensor.detach().requires_grad_() for tensor in heads), scale))
    kept = FORWARD(*heads, scale)
    arguments = (grad, *kept, *heads, scale)
    torch.library.opcheck(BACKWARD, arguments)
    for moved, backward, products in (((*heads, *kept), False, 2), ((*arguments, *BACKWARD(*arguments)), True, 5)):
        cost = ddt_kernels.attention_cost(2, 3, 3, 12, FP32, backward, key_tokens=7)
        assert cost == ddt_kernels.Cost(total_bytes(moved), products * 2 * 2 * 3 * 3 * 7 * 12)


@COMPILES
def test_two_programs_of_each_kernel_share_an_sm_of_a_hopper(monkeypatch):
    """What the speed is argued from (attention_kernels.py), with the tile that is taken without timing."""
    default = attention_launch.forward_config
    monkeypatch.setattr(attention_launch, "forward_candidates", lambda *arguments: (default(*arguments),))
    cases = [case for case in attention_launch.aot_cases() if case.configuration.endswith("N 256 to 384")]
    rows = [row for case in cases for row in compile_case(case, 90)]
    assert len(rows) == 3
    assert {(row.per_sm, row.tensor_core, row.bulk_copies, row.problems) for row in rows} == {(2, "wgmma", True, ())}


@pytest.mark.gpu
def test_gradients_repeat_bit_for_bit_on_a_gpu():
    heads = make_heads((4, 256, 16, 72), BF16, device="cuda")
    runs = [with_gradients(ddt_kernels.attention, heads, [make_grad(heads)])[1] for _ in range(3)]
    for other in runs[1:]:
        assert_all_equal(runs[0], other)
