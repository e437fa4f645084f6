"""attention and qkv_attention: the log-sum-exp, the default scale, what is kept for the backward pass, tiles."""

import pytest
import torch

import ddt_kernels
from attention_cases import LAYOUTS, check_logsumexp, make_grad, make_heads
from ddt_kernels import attention_launch, reference
from ddt_kernels.compilation import compile_case
from kernel_testing import BF16, COMPILES, DTYPES, FP32, FP64, assert_all_equal, kept_for_backward, with_gradients
from operators import ATTENTION, QKV_ATTENTION

SHAPE = (2, 5, 3, 12)
FORWARD = torch.ops.ddt_kernels.attention.default


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


@COMPILES
def test_two_programs_share_an_sm_of_a_hopper():
    """What the forward's speed is argued from (attention_kernels.py)."""
    case = next(case for case in attention_launch.aot_cases() if case.configuration == "D 72 bfloat16 N 1024")
    (binary,) = [row for row in compile_case(case, 90) if "[128x32," in row.configuration]
    assert binary.problems == ()
    assert binary.tensor_core == "wgmma"
    assert binary.bulk_copies
    assert binary.per_sm == 2


@pytest.mark.gpu
def test_gradients_repeat_bit_for_bit_on_a_gpu():
    heads = make_heads((4, 256, 16, 72), BF16, device="cuda")
    runs = [with_gradients(ddt_kernels.attention, heads, [make_grad(heads)])[1] for _ in range(3)]
    for other in runs[1:]:
        assert_all_equal(runs[0], other)
