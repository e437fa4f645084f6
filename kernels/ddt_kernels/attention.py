"""Non-causal softmax attention on heads read in place from a packed qkv, written in the order the projection reads.

    attention(q, k, v) = softmax(scale · q·kᵀ)·v, per sample and head

q is (B, Nq, H, D), k and v are (B, Nk, H, D), usually views of one (B, N, 3, H, D); the result is contiguous, so
`.flatten(2)` is the (B, Nq, C) that the next GEMM reads: nothing is transposed or copied on either side. Queries of an
image may attend to the image and a text: Nk is then larger than Nq. Autograd keeps the inputs, the output and the fp32
log-sum-exp of every row; probabilities are recomputed. Kernels, formulas and the reason for our own backward pass
instead of PyTorch's: `attention_kernels.py`. A CPU runs PyTorch's flash attention, which keeps the same log-sum-exp.
"""

from typing import Any

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.attention_launch import MAX_HEAD_DIM, launch_backward, launch_forward
from ddt_kernels.checks import check_kind, check_positive, check_same_kind, check_tensor, check_unit_stride, fail
from ddt_kernels.cost import Cost
from ddt_kernels.runtime import inlined

MAX_TOKEN_STRIDE = 2**31 // 128  # a tile has at most 128 rows


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale · q·kᵀ)·v for every sample and head: no mask, scores and softmax in fp32.

    Args:
        q: (B, Nq, H, D), any Nq and H, D divisible by 4 and at most 128; bf16, fp16 or fp32 (fp64 on a CPU).
        k, v: (B, Nk, H, D), any Nk; q's dtype. All three may have any strides, except 1 for the last dimension. Fastest
            where all others are multiples of 16 bytes.
        scale: above 0; None: D**-0.5.

    Returns: (B, Nq, H, D), q's dtype, contiguous. Differentiable once, in all three. All results repeat bit for bit
        once the shape's tile is chosen; processes may choose differently unless DDT_KERNELS_AUTOTUNE=0 (`tuning`).

    Raises: ValueError on any other shape, dtype, device mix, scale, or a last stride other than 1.
    Source: Attention Is All You Need, arXiv 1706.03762; computed as in FlashAttention, arXiv 2205.14135, 2307.08691.
    """
    op = "attention"
    _check_heads(op, "q", q)
    _check_keys(op, q, k, v)
    for name, heads in (("q", q), ("k", k), ("v", v)):
        check_strides(op, name, heads)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    check_positive(op, "scale", scale)
    if inlined(q):
        return reference.attention(q, k, v, scale).contiguous()
    return attention_operator(q, k, v, scale)[0]


def _check_heads(op: str, name: str, x: Tensor) -> None:
    check_tensor(op, name, x)
    if x.ndim != 4:
        fail(op, name, f"has shape {tuple(x.shape)}", "shape (B, N, H, D)")
    check_kind(op, name, x)
    B, N, H, D = x.shape
    if min(B, N, H) < 1 or D % 4 or not 4 <= D <= MAX_HEAD_DIM:
        fail(op, name, f"has shape {tuple(x.shape)}", f"B, N and H at least 1, D a multiple of 4 in 4..{MAX_HEAD_DIM}")
    check_unit_stride(op, name, x)


def _check_keys(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """k must be q except for its tokens, v have k's shape."""
    B, _, H, D = q.shape
    check_tensor(op, "k", k)
    if k.ndim != 4 or k.shape[1] < 1 or k.shape != (B, k.shape[1], H, D):
        fail(op, "k", f"has shape {tuple(k.shape)}", f"shape ({B}, Nk, {H}, {D}), Nk at least 1")
    check_tensor(op, "v", v)
    if v.shape != k.shape:
        fail(op, "v", f"has shape {tuple(v.shape)}", f"{tuple(k.shape)}, like k")
    for name, x in (("k", k), ("v", v)):
        check_same_kind(op, name, x, q)
        check_unit_stride(op, name, x)


def check_strides(op: str, name: str, x: Tensor) -> None:
    """Refuses strides with which the kernels' 32-bit offsets, within a tile and from head to head, would overflow."""
    _, N, H, _ = x.shape
    if (N > 1 and x.stride(1) >= MAX_TOKEN_STRIDE) or (H > 1 and (H - 1) * x.stride(2) >= 2**31):
        expected = f"a token stride below {MAX_TOKEN_STRIDE} and heads within 2^31 elements: call .contiguous()"
        fail(op, name, f"has strides {tuple(x.stride())}", expected)


@torch.library.custom_op("ddt_kernels::attention", mutates_args=(), device_types="cuda")
def attention_operator(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse), lse the (B, H, Nq) natural log of Σ exp(scale · q·kᵀ), fp32 (fp64 for fp64); not differentiable."""
    return launch_forward(q, k, v, scale)


@attention_operator.register_kernel("cpu")
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


@attention_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((B, H, N), dtype=dtype)


@torch.library.custom_op("ddt_kernels::attention_backward", mutates_args=(), device_types="cuda")
def attention_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad_out, out, lse, q, k, v, scale)


@attention_backward.register_kernel("cpu")
def _(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, *heads = (tensor.transpose(1, 2) for tensor in (grad_out.contiguous(), q, k, v, out))
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *heads, lse, 0.0, False, scale=scale
    )
    return grad_q.transpose(1, 2).contiguous(), grad_k.transpose(1, 2).contiguous(), grad_v.transpose(1, 2).contiguous()


@attention_backward.register_fake
def _(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *heads, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # or autograd would fill a gradient of lse with zeros
    ctx.save_for_backward(out, lse, *heads)


def _autograd(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:  # nothing downstream differentiates out
        return (None,) * 4
    return *attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


attention_operator.register_autograd(_autograd, setup_context=_setup)


def attention_cost(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    backward: bool = False,
    key_tokens: int | None = None,
) -> Cost:
    """Bytes and FLOPs of one call (or of its backward pass) from (batch, tokens, heads, head_dim) queries to key_tokens
    keys; None: as many as queries.

    FLOPs are those of the products alone (two forward, five backward), as is usual for attention: padded columns,
    repeated products and the softmax do not count. Bytes include the fp32 log-sum-exp.
    """
    keys = tokens if key_tokens is None else key_tokens
    tensors, products = (4, 5) if backward else (2, 2)  # of the queries' shape, and as many of the keys'
    moved = (tensors * (tokens + keys) * head_dim * dtype.itemsize + 4 * tokens) * batch * heads
    return Cost(moved, products * 2 * batch * heads * tokens * keys * head_dim)
