"""Attention as a user meets it: operators, gradients, compilation, mistakes, costs."""

import os

import pytest
import torch

import ddt_kernels
from attention_cases import LAYOUTS, check_against_reference, check_logsumexp, make_grad, make_heads
from ddt_kernels import attention_launch, reference
from ddt_kernels.compilation import SHARED_MEMORY_LIMIT, compile_case
from kernel_testing import check_compiles, check_replays, poison_empty, with_gradients

SHAPE = (2, 5, 3, 12)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
FORWARD, BACKWARD = torch.ops.ddt_kernels.attention.default, torch.ops.ddt_kernels.attention_backward.default


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
def test_on_a_cpu(dtype, layout):
    heads = make_heads(SHAPE, dtype, layout)
    grad = make_grad(heads)
    (out,), gradients = with_gradients(ddt_kernels.attention, heads, [grad])
    assert out.is_contiguous()
    check_against_reference(heads, grad, out, gradients)
    check_logsumexp(heads, FORWARD(*heads, 12**-0.5)[1])


def test_a_packed_projection_trains():
    """The layout the op exists for: one GEMM's output in, rows of the next GEMM out."""
    qkv = torch.randn(2, 5, 3, 3, 12, dtype=FP64, requires_grad=True)
    made, expected = (function(*qkv.unbind(2)).flatten(2) for function in (ddt_kernels.attention, attend))
    assert made.shape == (2, 5, 36)
    torch.testing.assert_close(made, expected)
    gradients = [torch.autograd.grad(output.square().sum(), qkv)[0] for output in (made, expected)]
    torch.testing.assert_close(*gradients)


def test_scale_defaults_to_the_inverse_root_of_the_head_dim():
    heads = make_heads(SHAPE, FP32)
    assert torch.equal(ddt_kernels.attention(*heads), ddt_kernels.attention(*heads, scale=12**-0.5))
    torch.testing.assert_close(ddt_kernels.attention(*heads, scale=0.7), reference.attention(*heads, 0.7))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_opcheck(dtype):
    heads = [tensor.requires_grad_() for tensor in make_heads(SHAPE, dtype)]
    torch.library.opcheck(FORWARD, (*heads, 0.3))
    heads = [tensor.detach() for tensor in heads]
    torch.library.opcheck(BACKWARD, (make_grad(heads), *FORWARD(*heads, 0.3), *heads, 0.3))


@pytest.mark.parametrize("module", [reference, ddt_kernels], ids=["reference", "operator"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_gradcheck(module, scale):
    heads = [tensor.requires_grad_() for tensor in make_heads((2, 3, 2, 4), FP64, "contiguous")]
    assert torch.autograd.gradcheck(lambda *tensors: module.attention(*tensors, scale), heads)


def test_compiles_without_graph_breaks():
    heads = make_heads(SHAPE, FP32)
    scale = SHAPE[-1] ** -0.5
    check_compiles(ddt_kernels.attention, lambda *h: FORWARD(*h, scale)[0], heads, [make_grad(heads)])


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return ddt_kernels.attention(q, k, v)

    graph = torch.export.export(Module(), tuple(make_heads(SHAPE, FP32))).graph
    assert any(node.target == FORWARD for node in graph.nodes)


def test_the_logsumexp_is_not_differentiable():
    heads = [tensor.requires_grad_() for tensor in make_heads(SHAPE, FP32)]
    out, lse = FORWARD(*heads, 0.3)
    assert out.requires_grad
    assert not lse.requires_grad


def test_second_derivatives_are_refused():
    heads = [tensor.requires_grad_() for tensor in make_heads(SHAPE, FP32)]
    (grad,) = torch.autograd.grad(ddt_kernels.attention(*heads).square().sum(), heads[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), heads[:1])


def test_the_gradient_of_a_sum_has_no_strides_to_rely_on():
    heads = [tensor.requires_grad_() for tensor in make_heads(SHAPE, FP64)]
    made, expected = (torch.autograd.grad(f(*heads).sum(), heads) for f in (ddt_kernels.attention, attend))
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda t: t[0], r"q is of shape \(5, 3, 12\); wanted shape \(B, N, H, D\)"),
        ("q", lambda t: t.int(), r"q is torch.int32 on cpu; wanted bfloat16, float16 or float32"),
        ("q", lambda t: t.double().to("meta"), r"q is torch.float64 on meta; wanted bfloat16, float16 or float32"),
        ("q", lambda t: t[:, :0], r"q is of shape \(2, 0, 3, 12\); wanted B, N and H at least 1, D divisible by 4"),
        ("q", lambda t: t[..., :10], r"q is of shape \(2, 5, 3, 10\); wanted .* D divisible by 4 in 4..128"),
        ("q", lambda t: t[..., :0], r"q is of shape \(2, 5, 3, 0\); wanted .* in 4..128"),
        ("q", lambda t: t.new_zeros(2, 5, 3, 132), r"q is of shape \(2, 5, 3, 132\); wanted .* in 4..128"),
        ("q", lambda t: t.mT.contiguous().mT, r"q is strided \(180, 36, 1, 3\); wanted a last stride of 1"),
        ("k", lambda t: t[:, :4], r"k is of shape \(2, 4, 3, 12\); wanted \(2, 5, 3, 12\), as the first argument"),
        ("k", lambda t: t.half(), r"k is torch.float16; wanted torch.float32, as the first argument"),
        ("k", lambda t: t.to("meta"), r"k is on meta; wanted cpu, as the first argument"),
        ("k", lambda t: t.mT.contiguous().mT, r"k is strided \(180, 36, 1, 3\); wanted a last stride of 1"),
        ("v", lambda t: t[..., :8], r"v is of shape \(2, 5, 3, 8\); wanted \(2, 5, 3, 12\)"),
        ("v", lambda t: t.bfloat16(), r"v is torch.bfloat16; wanted torch.float32"),
        ("v", lambda t: t.to("meta"), r"v is on meta; wanted cpu"),
        ("v", lambda t: t.mT.contiguous().mT, r"v is strided"),
        ("scale", lambda _: 0.0, r"scale is 0.0; wanted a finite number above 0"),
        ("scale", lambda _: -1.0, r"scale is -1.0; wanted a finite number above 0"),
        ("scale", lambda _: float("inf"), r"scale is inf; wanted a finite number above 0"),
        ("scale", lambda _: float("nan"), r"scale is nan; wanted a finite number above 0"),
    ],
)
def test_mistakes_are_value_errors(name, change, message):
    arguments = dict(zip("qkv", make_heads(SHAPE, FP32, "contiguous"), strict=True)) | {"scale": 0.3}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"attention: {message}"):
        ddt_kernels.attention(**arguments)


def test_cost_is_what_the_operators_read_and_write():
    heads = make_heads(SHAPE, BF16)
    made = FORWARD(*heads, 0.3)
    grad = make_grad(heads)
    for backward, tensors in (
        (False, [*heads, *made]),
        (True, [grad, *made, *heads, *BACKWARD(grad, *made, *heads, 0.3)]),
    ):
        cost = ddt_kernels.attention_cost(*SHAPE, BF16, backward=backward)
        assert cost.bytes_moved == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        products = 5 if backward else 2
        assert cost.flops == products * 2 * (2 * 3) * (5 * 5) * 12


def test_heads_are_split_where_it_saves_columns():
    split = {head_dim: attention_launch.split_head(head_dim) for head_dim in range(4, 129, 4)}
    assert [split[d] for d in (16, 24, 32, 64, 72, 80, 96, 128)] == [
        *((16, 0), (32, 0), (32, 0), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0))
    ]
    for head_dim, (main, tail) in split.items():
        assert head_dim <= main + tail
        assert main + tail <= max(16, 1 << (head_dim - 1).bit_length())
        assert all(width == 0 or (width >= 16 and width & (width - 1) == 0) for width in (main, tail))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting process can compile nothing")
def test_two_programs_share_an_sm_of_a_hopper():
    """What the forward's speed is argued from (attention_kernels.py)."""
    pytest.importorskip("triton")
    case = next(case for case in attention_launch.aot_cases() if case.configuration == "D 72 bfloat16 N 1024")
    (binary,) = [row for row in compile_case(case, 90) if "[128x64," in row.configuration]
    assert binary.problems == ()
    assert binary.tensor_core == "wgmma"
    assert binary.bulk_copies
    assert 2 * 256 * binary.registers <= 65536
    assert 2 * binary.shared <= SHARED_MEMORY_LIMIT[90]


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 24, 2, 72), (2, 256, 16, 72), (1, 1, 3, 24), (2, 130, 12, 64), (1, 1000, 2, 128)]
)
def test_on_a_gpu(shape, dtype, layout, monkeypatch):
    poison_empty(monkeypatch)
    heads = make_heads(shape, dtype, layout, device="cuda")
    grad = make_grad(heads)
    (out,), gradients = with_gradients(ddt_kernels.attention, heads, [grad])
    check_against_reference(heads, grad, out, gradients)
    check_logsumexp(heads, FORWARD(*heads, shape[-1] ** -0.5)[1])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 20, 72, 80, 96, 128])
def test_every_width_on_a_gpu(head_dim):
    heads = make_heads((2, 200, 3, head_dim), BF16, device="cuda")
    grad = make_grad(heads)
    (out,), gradients = with_gradients(ddt_kernels.attention, heads, [grad])
    check_against_reference(heads, grad, out, gradients)


@pytest.mark.gpu
def test_gradients_repeat_bit_for_bit_on_a_gpu():
    heads = make_heads((4, 256, 16, 72), BF16, device="cuda")
    runs = [with_gradients(ddt_kernels.attention, heads, [make_grad(heads)])[1] for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_cuda_graph_replays_forward_and_backward():
    heads = make_heads((4, 256, 16, 72), BF16, device="cuda")
    grad = make_grad(heads)

    def run():
        made = FORWARD(*heads, 0.1)
        return [*made, *BACKWARD(grad, *made, *heads, 0.1)]

    check_replays(run)
