"""swiglu(x, w1, w3) = silu(x · w1ᵀ) · (x · w3ᵀ): two of an MLP's three GEMMs and its activation, in one kernel.

The public function checks its arguments, then calls the operator `ddt_kernels::swiglu`, which under autograd also
returns what the backward pass needs. Formulas, what is kept and why, and the kernels: `swiglu_kernels.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.checks import check_kind, check_same_kind, check_tensor, check_unit_stride, fail
from ddt_kernels.cost import Cost
from ddt_kernels.runtime import inlined, without_autocast
from ddt_kernels.swiglu_launch import launch_backward, launch_forward


def swiglu(x: Tensor, w1: Tensor, w3: Tensor, b1: Tensor | None = None, b3: Tensor | None = None) -> Tensor:
    """silu(x · w1ᵀ + b1) · (x · w3ᵀ + b3), accumulated and activated in fp32, rounded once.

    Args:
        x: (..., C); bf16, fp16 or fp32 (fp64 on a CPU). Leading dimensions that merge into one are read in place,
            others are copied first.
        w1, w3: (F, C), the weights of nn.Linear(C, F); x's dtype. Any C and F, but the fastest paths need rows of a
            multiple of 16 bytes. The halves of one tensor, `w1, w3 = w12.chunk(2)`, are read in place; others are
            copied into one first, 4·F·C elements of traffic.
        b1, b3: (F,), contiguous, x's dtype; both or neither.

    Returns: (..., F), x's dtype, contiguous. Differentiable once, in all tensors. If autograd records it, 2F more
        columns are kept for the backward pass; torch.utils.checkpoint trades them for a second forward pass.

    fp32 is multiplied in fp32 unless torch.backends.cuda.matmul allows TF32. The weights' gradients are the two halves
    of one (2F, C) tensor. The backward pass's last GEMMs are torch's, which obeys this switch and its others.

    Raises: ValueError on any other shape, dtype, device mix, or a last stride other than 1.
    Source: arXiv 2002.05202; the MLP of DDT (arXiv 2504.05741).
    """
    check_inputs("swiglu", x, w1, w3, b1, b3)
    if inlined(x):
        return reference.swiglu(x, w1, w3, b1, b3).contiguous()
    y, _ = swiglu_operator(x, w1, w3, b1, b3, recorded(x, w1, w3, b1, b3))
    return y


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operator on these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_inputs(op: str, x: Tensor, w1: Tensor, w3: Tensor, b1: Tensor | None, b3: Tensor | None) -> None:
    """ValueError, in the name of `op`, unless they are valid arguments of `swiglu`."""
    for name, tensor in (("x", x), ("w1", w1), ("w3", w3)):
        check_tensor(op, name, tensor)
    if x.ndim < 2 or x.numel() == 0:
        fail(op, "x", f"has shape {tuple(x.shape)}", "shape (..., C), at least two dimensions, none of them empty")
    check_kind(op, "x", x)
    check_unit_stride(op, "x", x)
    for name, weight in (("w1", w1), ("w3", w3)):
        if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] < 1:
            fail(op, name, f"has shape {tuple(weight.shape)}", f"shape (F, {x.shape[-1]}), columns like x")
        if weight.shape != w1.shape:
            fail(op, name, f"has shape {tuple(weight.shape)}", f"{tuple(w1.shape)}, like w1")
        check_same_kind(op, name, weight, x)
        check_unit_stride(op, name, weight)
    check_biases(op, {"b1": (b1, w1), "b3": (b3, w3)}, x)


def check_biases(op: str, biases: dict[str, tuple[Any, Tensor]], x: Tensor) -> None:
    """By name, with the weight that each goes with: all None, or a number per row, contiguous, like x otherwise."""
    if all(bias is None for bias, _ in biases.values()):
        return
    for name, (bias, weight) in biases.items():
        if bias is None:
            *others, last = biases
            fail(op, name, "is None", f"a torch.Tensor: {', '.join(others)} and {last} go together, all or none")
        check_tensor(op, name, bias)
        if bias.shape != weight.shape[:1]:
            fail(op, name, f"has shape {tuple(bias.shape)}", f"{tuple(weight.shape[:1])}")
        check_same_kind(op, name, bias, x)
        check_unit_stride(op, name, bias)


def tf32_allowed(x: Tensor) -> bool:
    """Whether GEMMs on x may round to TF32: it is fp32, and PyTorch's setting allows it."""
    return x.dtype == torch.float32 and bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@torch.library.custom_op("ddt_kernels::swiglu", mutates_args=(), device_types="cuda")
def swiglu_operator(
    x: Tensor, w1: Tensor, w3: Tensor, b1: Tensor | None, b3: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """(y, gate_up): (..., F), and (x · w1ᵀ + b1 | x · w3ᵀ + b3) (..., 2F) if `keep`, else an empty tensor."""
    return launch_forward(x, w1, w3, keep, tf32_allowed(x), b1, b3)


@swiglu_operator.register_kernel("cpu")
def _(x: Tensor, w1: Tensor, w3: Tensor, b1: Tensor | None, b3: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    with without_autocast(x):
        gate, up = F.linear(x, w1, b1), F.linear(x, w3, b3)
        return (F.silu(gate) * up).contiguous(), torch.cat([gate, up], -1) if keep else x.new_empty(0)


@swiglu_operator.register_fake
def _(x: Tensor, w1: Tensor, w3: Tensor, b1: Tensor | None, b3: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    width = w1.shape[0]
    return x.new_empty((*x.shape[:-1], width)), x.new_empty((*x.shape[:-1], 2 * width) if keep else 0)


@torch.library.custom_op("ddt_kernels::swiglu_backward", mutates_args=(), device_types="cuda")
def swiglu_backward(
    grad_y: Tensor, x: Tensor, w1: Tensor, w3: Tensor, gate_up: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the stacked weights (w1; w3), (2F, C), and, if `biased`, of (b1; b3), (2F,)."""
    return launch_backward(grad_y, x, w1, w3, gate_up, biased)


@swiglu_backward.register_kernel("cpu")
def _(
    grad_y: Tensor, x: Tensor, w1: Tensor, w3: Tensor, gate_up: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x):
        grad_x, grad_weights, grad_biases = reference.swiglu_backward(grad_y, x, w1, w3, gate_up, biased)
    return grad_x.contiguous(), grad_weights, grad_biases


@swiglu_backward.register_fake
def _(
    grad_y: Tensor, x: Tensor, w1: Tensor, w3: Tensor, gate_up: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width, channels = w1.shape
    return x.new_empty(x.shape), w1.new_empty((2 * width, channels)), x.new_empty(2 * width if biased else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.keep = inputs
    gate_up = output[1]
    ctx.mark_non_differentiable(gate_up)
    ctx.set_materialize_grads(False)  # or autograd would fill a gradient of gate_up, 2F wide, with zeros
    ctx.save_for_backward(*tensors, gate_up)


def _autograd(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:  # nothing downstream differentiates y
        return (None,) * 6
    *inputs, gate_up = ctx.saved_tensors
    if not ctx.keep:  # the operator was called directly and kept nothing: recompute it
        gate_up = swiglu_operator(*inputs, True)[1]
    x, w1, w3, b1, _ = inputs
    grad_x, grad_weights, grad_biases = swiglu_backward(grad_y, x, w1, w3, gate_up, b1 is not None)
    return grad_x, *grad_weights.chunk(2), *((None, None) if b1 is None else grad_biases.chunk(2)), None


swiglu_operator.register_autograd(_autograd, setup_context=_setup)


def swiglu_cost(
    batch: int,
    tokens: int,
    channels: int,
    width: int,
    dtype: torch.dtype,
    training: bool = False,
    backward: bool = False,
    biased: bool = False,
) -> Cost:
    """Bytes and FLOPs of one call on (batch, tokens, channels) with (width, channels) weights, or of its backward pass.

    training: the forward also writes what the backward pass reads. biased: with b1 and b3.
    """
    rows, weights, biases = batch * tokens, 2 * width * channels, 2 * width * biased
    if backward:
        moved = 2 * rows * channels + 3 * rows * width + 2 * weights + biases
        return Cost(moved * dtype.itemsize, 4 * rows * weights + (13 + 2 * biased) * rows * width)
    moved = rows * channels + weights + biases + rows * width * (3 if training else 1)
    return Cost(moved * dtype.itemsize, 2 * rows * weights + (5 + 2 * biased) * rows * width)
