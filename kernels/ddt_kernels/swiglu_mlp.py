"""swiglu_mlp(x, w1, w3, w2) = (silu(x · w1ᵀ) · (x · w3ᵀ)) · w2ᵀ: a whole MLP, to save memory in training.

The forward pass is `swiglu` and a cuBLAS GEMM. The point is the backward pass: w2's gradient needs swiglu's output, F
columns that a Linear after `swiglu` would keep; here the backward kernel recomputes them from what is kept anyway.
Formulas, what is kept and why, and the kernels: `swiglu_kernels.py`.
"""

from typing import Any

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.checks import check_same_kind, check_tensor, check_unit_stride, fail
from ddt_kernels.cost import Cost
from ddt_kernels.runtime import inlined, without_autocast
from ddt_kernels.swiglu import check_inputs, swiglu_cost, swiglu_operator, tf32_allowed
from ddt_kernels.swiglu_launch import launch_mlp_backward, launch_mlp_forward


def swiglu_mlp(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """(silu(x · w1ᵀ) · (x · w3ᵀ)) · w2ᵀ; swiglu's result is rounded to x's dtype before the last GEMM.

    Args:
        x, w1, w3: as in `swiglu`.
        w2: (O, F), the weight of nn.Linear(F, O, bias=False); x's dtype, unit last stride.

    Returns: (..., O), x's dtype, contiguous. Differentiable once, in all four tensors. If autograd records it, 2F
        columns are kept for the backward pass besides x: F fewer than with w2 after `swiglu`.

    Raises: ValueError on any other shape, dtype, device mix, or a last stride other than 1.
    Source: arXiv 2002.05202; the MLP of DDT (arXiv 2504.05741).
    """
    op = "swiglu_mlp"
    check_inputs(op, x, w1, w3)
    check_tensor(op, "w2", w2)
    if w2.ndim != 2 or w2.shape[1] != w1.shape[0] or w2.shape[0] < 1:
        fail(op, "w2", f"has shape {tuple(w2.shape)}", f"shape (O, {w1.shape[0]}), one column per row of w1")
    check_same_kind(op, "w2", w2, x)
    check_unit_stride(op, "w2", w2)
    if inlined(x):
        return reference.swiglu_mlp(x, w1, w3, w2)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, w1, w3, w2))
    z, _ = swiglu_mlp_operator(x, w1, w3, w2, keep)
    return z


@torch.library.custom_op("ddt_kernels::swiglu_mlp", mutates_args=(), device_types="cuda")
def swiglu_mlp_operator(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """(z, gate_up): (..., O), and (x · w1ᵀ | x · w3ᵀ) (..., 2F) if `keep`, else an empty tensor."""
    return launch_mlp_forward(x, w1, w3, w2, keep, tf32_allowed(x))


@swiglu_mlp_operator.register_kernel("cpu")
def _(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    y, gate_up = swiglu_operator(x, w1, w3, keep)
    with without_autocast(x):
        return torch.nn.functional.linear(y, w2), gate_up


@swiglu_mlp_operator.register_fake
def _(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    return x.new_empty((*lead, w2.shape[0])), x.new_empty((*lead, 2 * w1.shape[0]) if keep else 0)


@torch.library.custom_op("ddt_kernels::swiglu_mlp_backward", mutates_args=(), device_types="cuda")
def swiglu_mlp_backward(
    grad_z: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, gate_up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the stacked weights (w1; w3), (2F, C), and of w2."""
    return launch_mlp_backward(grad_z, x, w1, w3, w2, gate_up)


@swiglu_mlp_backward.register_kernel("cpu")
def _(grad_z: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x):
        grad_x, grad_w1, grad_w3, grad_w2 = reference.swiglu_mlp_backward(grad_z, x, w1, w3, w2, gate_up)
    return grad_x.contiguous(), torch.cat([grad_w1, grad_w3]), grad_w2.contiguous()


@swiglu_mlp_backward.register_fake
def _(grad_z: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width, channels = w1.shape
    return x.new_empty(x.shape), w1.new_empty((2 * width, channels)), w2.new_empty(w2.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, w3, w2, ctx.keep = inputs
    gate_up = output[1]
    ctx.mark_non_differentiable(gate_up)
    ctx.set_materialize_grads(False)  # or autograd would fill a gradient of gate_up, 2F wide, with zeros
    ctx.save_for_backward(x, w1, w3, w2, gate_up)


def _autograd(ctx: Any, grad_z: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_z is None:  # nothing downstream differentiates z
        return None, None, None, None, None
    x, w1, w3, w2, gate_up = ctx.saved_tensors
    if not ctx.keep:  # the operator was called directly and kept nothing: recompute it
        gate_up = swiglu_operator(x, w1, w3, True)[1]
    grad_x, grad_weights, grad_w2 = swiglu_mlp_backward(grad_z, x, w1, w3, w2, gate_up)
    grad_w1, grad_w3 = grad_weights.chunk(2)
    return grad_x, grad_w1, grad_w3, grad_w2, None


swiglu_mlp_operator.register_autograd(_autograd, setup_context=_setup)


def swiglu_mlp_cost(
    batch: int,
    tokens: int,
    channels: int,
    width: int,
    dtype: torch.dtype,
    training: bool = False,
    backward: bool = False,
) -> Cost:
    """Bytes and FLOPs of one call on (batch, tokens, channels) whose result is as wide, or of its backward pass.

    training: the forward also writes what the backward pass reads. swiglu's result between the GEMMs is not counted.
    """
    rows, weight = batch * tokens, width * channels
    first = swiglu_cost(batch, tokens, channels, width, dtype, training, backward)
    if backward:  # dz for dy, w2 and its gradient, and y's activation once more
        moved = rows * (channels - width) + 2 * weight
        return Cost(first.bytes_moved + moved * dtype.itemsize, first.flops + 4 * rows * weight + 2 * rows * width)
    moved = rows * (channels - width) + weight
    return Cost(first.bytes_moved + moved * dtype.itemsize, first.flops + 2 * rows * weight)
