"""Everything between an attention layer's two GEMMs as one differentiable op, to save memory and traffic in training.

    qkv_attention(qkv, …) = attention(*qk_norm_rope(qkv, …).unbind(2))

The cost of the two ops in a row, and of this one, in units of one (B, N, H, D) tensor:

- Kept for the backward pass, besides the output: 6 (qkv, and q, k and v again as attention reads them); here 3, just
  qkv. The backward pass recomputes q and k with the forward kernel.
- Moved to and from memory, besides what attention's own kernels read and write: 20, of which autograd takes 6 to put
  the gradients of q, k and v side by side; here 14. v is never copied, attention's kernels write their gradients where
  those of qkv belong, and the norm's backward kernel works there in place.

The kernels are those of the two ops (`qk_norm_rope_kernels.py`, `attention_kernels.py`), with the same rounding. For
inference call `qk_norm_rope_` and `attention`, which need no memory besides qkv and the output.
"""

from typing import Any

import torch
from torch import Tensor

from ddt_kernels import attention_launch, qk_norm_rope_launch, reference
from ddt_kernels.attention import attention_backward, attention_cost, attention_operator, check_strides
from ddt_kernels.checks import check_positive
from ddt_kernels.cost import Cost
from ddt_kernels.qk_norm_rope import check_inputs, qk_norm_rope_cost
from ddt_kernels.runtime import inlined

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]
"""qkv, q_weight, k_weight, cos, sin, eps."""


def qkv_attention(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q·kᵀ)·v with q and k RMS-normed over each head and rotated, and v as it is.

    Args:
        qkv, q_weight, k_weight, cos, sin, eps: as `qk_norm_rope` takes them, D at most 128.
        scale: above 0; None: D**-0.5.

    Returns: (B, N, H, D), qkv's dtype, contiguous. Differentiable once, in qkv, q_weight and k_weight: the output, its
        fp32 log-sum-exp and the arguments are kept.

    Raises: ValueError on any other shape, dtype, device mix, stride or scale.
    Source: DDT's attention (arXiv 2504.05741); see `qk_norm_rope` and `attention`.
    """
    op = "qkv_attention"
    check_inputs(op, qkv, q_weight, k_weight, cos, sin, eps, attention_launch.MAX_HEAD_DIM)
    check_strides(op, "qkv", qkv[:, :, 0])
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    check_positive(op, "scale", scale)
    if inlined(qkv):
        return reference.qkv_attention(qkv, q_weight, k_weight, cos, sin, eps, scale).contiguous()
    return _operator(qkv, q_weight, k_weight, cos, sin, eps, scale)[0]


def _launch_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k as attention reads them, in a new tensor, and v where it is."""
    B, N, _, H, D = qkv.shape
    out = qkv.new_empty((B, N, 2, H, D))
    q, k = qk_norm_rope_launch.launch_forward(qkv, q_weight, k_weight, cos, sin, eps, out).unbind(2)
    return q, k, qkv[:, :, 2]


def launch_forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse), by the kernels of both ops."""
    return attention_launch.launch_forward(*_launch_heads(qkv, q_weight, k_weight, cos, sin, eps), scale)


def launch_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, inputs: Inputs, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, contiguous, q_weight and k_weight."""
    grad_qkv = inputs[0].new_empty(inputs[0].shape)
    attention_launch.launch_backward(grad_out, out, lse, *_launch_heads(*inputs), scale, packed=grad_qkv)
    return qk_norm_rope_launch.launch_backward(grad_qkv, *inputs, in_place=True)


@torch.library.custom_op("ddt_kernels::qkv_attention", mutates_args=(), device_types="cuda")
def _operator(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse), as those of `attention`."""
    return launch_forward(qkv, q_weight, k_weight, cos, sin, eps, scale)


@_operator.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, scale = arguments
    return attention_operator(*_plain_heads(*inputs), scale)


@_operator.register_fake
def _(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, N, _, H, D = qkv.shape
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty((B, N, H, D)), qkv.new_empty((B, H, N), dtype=dtype)


def _plain_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return reference.norm_rope(q, q_weight, cos, sin, eps), reference.norm_rope(k, k_weight, cos, sin, eps), v


@torch.library.custom_op("ddt_kernels::qkv_attention_backward", mutates_args=(), device_types="cuda")
def _backward_operator(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, contiguous, q_weight and k_weight."""
    return launch_backward(grad_out, out, lse, (qkv, q_weight, k_weight, cos, sin, eps), scale)


@_backward_operator.register_kernel("cpu")
def _(grad_out: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, scale = arguments
    qkv, q_weight, k_weight, cos, sin, eps = inputs
    heads = _plain_heads(*inputs)
    grad_q, grad_k, grad_v = attention_backward(grad_out, out, lse, *heads, scale)
    grad_qkv, weights = qkv.new_empty(qkv.shape), []
    grad_qkv[:, :, 2] = grad_v
    for part, (grad, weight) in enumerate(((grad_q, q_weight), (grad_k, k_weight))):
        grad_qkv[:, :, part], grad_weight = reference.norm_rope_backward(grad, qkv[:, :, part], weight, cos, sin, eps)
        weights.append(grad_weight)
    return grad_qkv, weights[0], weights[1]


@_backward_operator.register_fake
def _(
    grad_out: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # or autograd would fill a gradient of lse with zeros
    ctx.save_for_backward(out, lse, *tensors)


def _autograd(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:  # nothing downstream differentiates out
        return (None,) * 7
    gradients = _backward_operator(grad_out, *ctx.saved_tensors, ctx.eps, ctx.scale)
    return *gradients, None, None, None, None


_operator.register_autograd(_autograd, setup_context=_setup)


def qkv_attention_cost(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, backward: bool = False
) -> Cost:
    """Bytes and FLOPs of one call, or of its backward pass, which recomputes q and k. The bytes do not count q and k
    between the kernels, nor their gradients."""
    shape = (batch, tokens, heads, head_dim)
    attended = attention_cost(*shape, dtype, backward)
    normed = qk_norm_rope_cost(*shape, dtype, backward)
    # Weights, their gradients and tables: what the norm moves besides its activations.
    small = normed.bytes_moved - (8 if backward else 6) * batch * tokens * heads * head_dim * dtype.itemsize
    again = qk_norm_rope_cost(*shape, dtype).flops if backward else 0
    return Cost(attended.bytes_moved + small, attended.flops + normed.flops + again)
