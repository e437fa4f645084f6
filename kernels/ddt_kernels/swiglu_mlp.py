"""swiglu_mlp(x, w1, w3, w2) = (silu(x · w1ᵀ) · (x · w3ᵀ)) · w2ᵀ: a whole MLP, to save memory and time in training.

The forward pass is `swiglu` and a cuBLAS GEMM. The point is the backward pass: w2's gradient needs swiglu's output, F
columns that a Linear after `swiglu` would keep; here the backward kernel recomputes them from what is kept anyway, and
swiglu's output's gradient, F columns too, never leaves its registers.
Formulas, what is kept and why, and the kernels: `swiglu_kernels.py`.
"""

from typing import Any

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.checks import check_same_kind, check_tensor, check_unit_stride, fail
from ddt_kernels.cost import Cost
from ddt_kernels.runtime import inlined, without_autocast
from ddt_kernels.swiglu import check_biases, check_inputs, recorded, swiglu_cost, swiglu_operator, tf32_allowed
from ddt_kernels.swiglu_launch import launch_mlp_backward, launch_mlp_forward


def swiglu_mlp(
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b3: Tensor | None = None,
    b2: Tensor | None = None,
) -> Tensor:
    """swiglu(x, w1, w3, b1, b3) · w2ᵀ + b2; swiglu's result is rounded to x's dtype before the last GEMM.

    Args:
        x, w1, w3: as in `swiglu`.
        w2: (O, F), the weight of nn.Linear(F, O); x's dtype, unit last stride.
        b1, b3, b2: (F,), (F,) and (O,), contiguous, x's dtype; all or none.

    Returns: (..., O), x's dtype, contiguous. Differentiable once, in all tensors. If autograd records it, 2F columns
        are kept for the backward pass besides x: F fewer than with w2 after `swiglu`.

    Raises: ValueError on any other shape, dtype, device mix, or a last stride other than 1.
    Source: arXiv 2002.05202; the MLP of DDT (arXiv 2504.05741).
    """
    op = "swiglu_mlp"
    check_inputs(op, x, w1, w3, None, None)
    check_tensor(op, "w2", w2)
    if w2.ndim != 2 or w2.shape[1] != w1.shape[0] or w2.shape[0] < 1:
        fail(op, "w2", f"has shape {tuple(w2.shape)}", f"shape (O, {w1.shape[0]}), one column per row of w1")
    check_same_kind(op, "w2", w2, x)
    check_unit_stride(op, "w2", w2)
    check_biases(op, {"b1": (b1, w1), "b3": (b3, w3), "b2": (b2, w2)}, x)
    tensors = x, w1, w3, w2, b1, b3, b2
    if inlined(x):
        return reference.swiglu_mlp(*tensors)
    z, _ = swiglu_mlp_operator(*tensors, recorded(*tensors))
    return z


@torch.library.custom_op("ddt_kernels::swiglu_mlp", mutates_args=(), device_types="cuda")
def swiglu_mlp_operator(
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b3: Tensor | None,
    b2: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(z, gate_up): (..., O), and what `swiglu` keeps, (..., 2F) if `keep`, else an empty tensor."""
    return launch_mlp_forward(x, w1, w3, w2, keep, tf32_allowed(x), b1, b3, b2)


@swiglu_mlp_operator.register_kernel("cpu")
def _(
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b3: Tensor | None,
    b2: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y, gate_up = swiglu_operator(x, w1, w3, b1, b3, keep)
    with without_autocast(x):
        return torch.nn.functional.linear(y, w2, b2), gate_up


@swiglu_mlp_operator.register_fake
def _(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Any, b3: Any, b2: Any, keep: bool) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    return x.new_empty((*lead, w2.shape[0])), x.new_empty((*lead, 2 * w1.shape[0]) if keep else 0)


@torch.library.custom_op("ddt_kernels::swiglu_mlp_backward", mutates_args=(), device_types="cuda")
def swiglu_mlp_backward(
    grad_z: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, gate_up: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, of the stacked weights (w1; w3), (2F, C), of w2, and, if `biased`, of (b1; b3; b2)."""
    return launch_mlp_backward(grad_z, x, w1, w3, w2, gate_up, biased)


@swiglu_mlp_backward.register_kernel("cpu")
def _(
    grad_z: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, gate_up: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(x):
        grads = reference.swiglu_mlp_backward(grad_z, x, w1, w3, w2, gate_up, biased)
    grad_x, grad_weights, grad_w2, grad_biases = grads
    return grad_x.contiguous(), grad_weights, grad_w2.contiguous(), grad_biases


@swiglu_mlp_backward.register_fake
def _(
    grad_z: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, gate_up: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, channels = w1.shape
    grads = x.new_empty(x.shape), w1.new_empty((2 * width, channels)), w2.new_empty(w2.shape)
    return *grads, x.new_empty(2 * width + w2.shape[0] if biased else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.keep = inputs
    gate_up = output[1]
    ctx.mark_non_differentiable(gate_up)
    ctx.set_materialize_grads(False)  # or autograd would fill a gradient of gate_up, 2F wide, with zeros
    ctx.save_for_backward(*tensors, gate_up)


def _autograd(ctx: Any, grad_z: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_z is None:  # nothing downstream differentiates z
        return (None,) * 8
    x, w1, w3, w2, b1, b3, _, gate_up = ctx.saved_tensors
    if not ctx.keep:  # the operator was called directly and kept nothing: recompute it
        gate_up = swiglu_operator(x, w1, w3, b1, b3, True)[1]
    biased = b1 is not None
    grad_x, grad_weights, grad_w2, grad_biases = swiglu_mlp_backward(grad_z, x, w1, w3, w2, gate_up, biased)
    parts = grad_biases.split([w1.shape[0], w1.shape[0], w2.shape[0]]) if biased else (None,) * 3
    return grad_x, *grad_weights.chunk(2), grad_w2, *parts, None


swiglu_mlp_operator.register_autograd(_autograd, setup_context=_setup)


def swiglu_mlp_cost(
    batch: int,
    tokens: int,
    channels: int,
    width: int,
    dtype: torch.dtype,
    training: bool = False,
    backward: bool = False,
    biased: bool = False,
) -> Cost:
    """Bytes and FLOPs of one call on (batch, tokens, channels) whose result is as wide, or of its backward pass.

    training: the forward also writes what the backward pass reads. biased: with b1, b3 and b2. swiglu's result between
    the GEMMs is not counted.
    """
    rows, weight, bias = batch * tokens, width * channels, channels * biased
    first = swiglu_cost(batch, tokens, channels, width, dtype, training, backward, biased)
    if backward:  # dz for dy, w2 and its gradient, and y's activation once more
        moved, flops = 2 * weight, 4 * rows * weight + 2 * rows * width + rows * bias
    else:
        moved, flops = weight, 2 * rows * weight + rows * bias
    moved += rows * (channels - width) + bias
    return Cost(first.bytes_moved + moved * dtype.itemsize, first.flops + flops)
