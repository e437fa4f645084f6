"""What an attention layer does to q and k between its qkv GEMM and the attention, in one pass over a packed qkv.

    qk_norm_rope    (q, k, v) → (rope(rms_norm(q)), rope(rms_norm(k)), v), a new tensor, differentiable
    qk_norm_rope_   the same in place, for inference: v is never touched, so 2/3 of the bytes

Formulas, and why the kernels look as they do: `qk_norm_rope_kernels.py`; grids: `qk_norm_rope_launch.py`.
"""

from typing import Any

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.checks import check_kind, check_positive, check_tensor, check_weight_dtype, fail
from ddt_kernels.cost import Cost
from ddt_kernels.qk_norm_rope_launch import launch_backward, launch_forward
from ddt_kernels.runtime import inlined

MAX_HEAD_DIM = 256


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> Tensor:
    """RMS-norms q and k over each head and rotates their adjacent pairs; copies v.

        u = x / sqrt(mean(x²) + eps) · weight
        (y_2i, y_2i+1) = (u_2i cos_i - u_2i+1 sin_i, u_2i sin_i + u_2i+1 cos_i)

    Args:
        qkv: (B, N, 3, H, D), q, k and v in this order, a qkv GEMM's output unflattened; D a multiple of 4, at most
            256. bf16, fp16 or fp32 (fp64 on a CPU). The last three dimensions contiguous, any strides for the others.
        q_weight, k_weight: (D,), qkv's dtype or fp32.
        cos, sin: (N, D / 2) fp32, contiguous: one angle per token and pair. Not differentiable.
        eps: above 0.

    Returns: (B, N, 3, H, D), qkv's dtype, contiguous. Differentiable once, in qkv, q_weight and k_weight.

    Raises: ValueError on any other shape, dtype, device mix or stride, and if cos or sin requires a gradient.
    Source: DDT's attention (arXiv 2504.05741); RMSNorm, arXiv 1910.07467; rotary embeddings, arXiv 2104.09864.
    """
    check_inputs("qk_norm_rope", qkv, q_weight, k_weight, cos, sin, eps)
    return (reference.qk_norm_rope if inlined(qkv) else _operator)(qkv, q_weight, k_weight, cos, sin, eps)


def qk_norm_rope_(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> Tensor:
    """qk_norm_rope in place, for inference. The same arguments; returns qkv itself.

    Raises: ValueError as qk_norm_rope does; also if two elements of qkv share memory, or if autograd would have to
        record it: call it under torch.no_grad() or torch.inference_mode().
    """
    op = "qk_norm_rope_"
    check_inputs(op, qkv, q_weight, k_weight, cos, sin, eps)
    _check_no_overlap(op, qkv)
    if torch.is_grad_enabled():
        for name, tensor in (("qkv", qkv), ("q_weight", q_weight), ("k_weight", k_weight)):
            if tensor.requires_grad:
                fail(op, name, "requires a gradient", "torch.no_grad() around it, or qk_norm_rope")
    (_in_place_on_cpu if inlined(qkv) else _in_place_operator)(qkv, q_weight, k_weight, cos, sin, eps)
    return qkv


def check_inputs(
    op: str,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    max_head_dim: int = MAX_HEAD_DIM,
) -> None:
    """ValueError unless they are valid arguments of `qk_norm_rope`."""
    named = {"qkv": qkv, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}
    for name, tensor in named.items():
        check_tensor(op, name, tensor)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        fail(op, "qkv", f"has shape {tuple(qkv.shape)}", "shape (B, N, 3, H, D)")
    B, N, _, H, D = qkv.shape
    if B < 1 or N < 1 or H < 1 or D % 4 or not 4 <= D <= max_head_dim:
        expected = f"B, N and H at least 1, D a multiple of 4 in 4..{max_head_dim}"
        fail(op, "qkv", f"has shape {tuple(qkv.shape)}", expected)
    check_kind(op, "qkv", qkv)
    if qkv.stride(4) != 1 or (H > 1 and qkv.stride(3) != D) or qkv.stride(2) != H * D:
        fail(op, "qkv", f"has strides {qkv.stride()}", f"its last three dimensions contiguous, strides {(H * D, D, 1)}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != (D,):
            fail(op, name, f"has shape {tuple(weight.shape)}", f"{(D,)}")
        check_weight_dtype(op, name, weight, qkv)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (N, D // 2):
            fail(op, name, f"has shape {tuple(table.shape)}", f"{(N, D // 2)}, one angle per token and pair")
        if table.dtype != torch.float32:
            fail(op, name, f"is {table.dtype}", "torch.float32")
        if table.requires_grad:
            fail(op, name, "requires a gradient", "a table without one")
    for name, tensor in (("q_weight", q_weight), ("k_weight", k_weight), ("cos", cos), ("sin", sin)):
        if tensor.device != qkv.device:
            fail(op, name, f"is on {tensor.device}", f"{qkv.device}, like the first argument")
        if not tensor.is_contiguous():
            fail(op, name, f"has strides {tensor.stride()}", "a contiguous tensor")
    check_positive(op, "eps", eps)


def _check_no_overlap(op: str, qkv: Tensor) -> None:
    extent = qkv.shape[2] * qkv.shape[3] * qkv.shape[4]
    for stride, size in sorted((qkv.stride(axis), qkv.shape[axis]) for axis in (0, 1) if qkv.shape[axis] > 1):
        if stride < extent:
            fail(op, "qkv", f"has strides {qkv.stride()}, which overlap", "elements that share no memory")
        extent += stride * (size - 1)


def qk_norm_rope_cost(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    backward: bool = False,
    in_place: bool = False,
) -> Cost:
    """Bytes and FLOPs of one call (or of its backward pass); the weights in `dtype` too. in_place: of qk_norm_rope_."""
    if backward and in_place:
        raise ValueError("qk_norm_rope_cost: in_place is True for a backward pass; expected False, it has none")
    tensor = batch * tokens * heads * head_dim
    # Backward: q and k of qkv, all of both gradients. v is copied, unless in place.
    activations = 8 if backward else 4 if in_place else 6
    weights, tables = (4 if backward else 2) * head_dim, 4 * tokens * head_dim
    return Cost((activations * tensor + weights) * dtype.itemsize + tables, (19 if backward else 7) * 2 * tensor)


@torch.library.custom_op("ddt_kernels::qk_norm_rope", mutates_args=(), device_types="cuda")
def _operator(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return launch_forward(qkv, q_weight, k_weight, cos, sin, eps, qkv.new_empty(qkv.shape))


@_operator.register_kernel("cpu")
def _(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return reference.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, eps)


@_operator.register_fake
def _(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


@torch.library.custom_op("ddt_kernels::qk_norm_rope_backward", mutates_args=(), device_types="cuda")
def _backward_operator(
    grad_out: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad_out, qkv, q_weight, k_weight, cos, sin, eps)


@_backward_operator.register_kernel("cpu")
def _(
    grad_out: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.qk_norm_rope_backward(grad_out, qkv, q_weight, k_weight, cos, sin, eps)


@_backward_operator.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_operator(grad_out, *ctx.saved_tensors, ctx.eps), None, None, None


_operator.register_autograd(_autograd, setup_context=_setup)


@torch.library.custom_op("ddt_kernels::qk_norm_rope_", mutates_args=("qkv",), device_types="cuda")
def _in_place_operator(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    launch_forward(qkv, q_weight, k_weight, cos, sin, eps, qkv)


@_in_place_operator.register_kernel("cpu")
def _in_place_on_cpu(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    q, k, _ = qkv.unbind(2)
    q.copy_(reference.norm_rope(q, q_weight, cos, sin, eps))
    k.copy_(reference.norm_rope(k, k_weight, cos, sin, eps))


@_in_place_operator.register_fake
def _(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    return None


@_in_place_operator.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[None, None]:
    """One call after another, which torch does by itself for operators that mutate nothing."""
    if in_dims[0] is None or (arguments[0].stride(in_dims[0]) == 0 and info.batch_size > 1):
        fail("qk_norm_rope_", "qkv", "is shared by all calls of vmap", "one each, or qk_norm_rope")
    for i in range(info.batch_size):
        sliced = zip(arguments, in_dims, strict=True)
        _in_place_operator(*(value if axis is None else value.select(axis, i) for value, axis in sliced))
    return None, None
