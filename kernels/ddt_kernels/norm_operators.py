"""The norm family as registered operators, `ddt_kernels::…`. `norm_modulate.py` checks arguments and calls them.

Each is functional, with a fixed number of arguments. The decorated function's body is the CUDA kernel, the CPU kernel
is the reference, the fake kernel allocates, and the backward pass is an operator of its own, wrapped by two functions
that say what is kept for it and which gradient goes where. Per token, shift's gradient is y's: the backward operators
return an empty tensor for it (an operator may not return its input) and autograd passes y's gradient on. For forecasts,
which are for inference, one operator serves all norms.
"""

from typing import Any

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.norm_launch import launch_backward, launch_forward


def _made(output: Tensor | None) -> Tensor:
    assert output is not None
    return output


def _per_token(x: Tensor, modulation: Tensor) -> bool:
    return modulation.shape[1] == x.shape[1]


def _shift_gradient(grad_shift: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(0) if _per_token(x, scale) else grad_shift.contiguous()


def _empty_shift(x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(0) if _per_token(x, scale) else scale.new_empty(scale.shape)


@torch.library.custom_op("ddt_kernels::rms_norm_modulate", mutates_args=(), device_types="cuda")
def rms_norm_modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _made(launch_forward(x, None, None, weight, shift, scale, eps, "rms", False)[1])


@rms_norm_modulate.register_kernel("cpu")
def rms_norm_modulate_on_cpu(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return reference.rms_norm_modulate(x, weight, shift, scale, eps).contiguous()


@rms_norm_modulate.register_fake
def _(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ddt_kernels::rms_norm_modulate_backward", mutates_args=(), device_types="cuda")
def rms_norm_modulate_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = launch_backward(None, grad_y, x, None, None, weight, scale, eps, "rms")
    return _made(grads.x), _made(grads.weight), _made(grads.shift), _made(grads.scale)


@rms_norm_modulate_backward.register_kernel("cpu")
def _(grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_shift, grad_scale = reference.rms_norm_modulate_backward(grad_y, x, weight, scale, eps)
    return grad_x.contiguous(), grad_weight, _shift_gradient(grad_shift, x, scale), grad_scale.contiguous()


@rms_norm_modulate_backward.register_fake
def _(grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), _empty_shift(x, scale), scale.new_empty(scale.shape)


def _rms_norm_modulate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, weight, scale)


def _rms_norm_modulate_autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale = ctx.saved_tensors
    grad_x, grad_weight, grad_shift, grad_scale = rms_norm_modulate_backward(grad_y, x, weight, scale, ctx.eps)
    return grad_x, grad_weight, grad_y if _per_token(x, scale) else grad_shift, grad_scale, None


rms_norm_modulate.register_autograd(_rms_norm_modulate_autograd, setup_context=_rms_norm_modulate_setup)


@torch.library.custom_op("ddt_kernels::gated_residual_rms_norm_modulate", mutates_args=(), device_types="cuda")
def gated_residual_rms_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual, y = launch_forward(x, branch, gate, weight, shift, scale, eps, "rms", True)
    return _made(residual), _made(y)


@gated_residual_rms_norm_modulate.register_kernel("cpu")
def gated_residual_rms_norm_modulate_on_cpu(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual, y = reference.gated_residual_rms_norm_modulate(x, branch, gate, weight, shift, scale, eps)
    return residual.contiguous(), y.contiguous()


@gated_residual_rms_norm_modulate.register_fake
def _(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("ddt_kernels::gated_residual_rms_norm_modulate_backward", mutates_args=(), device_types="cuda")
def gated_residual_rms_norm_modulate_backward(
    grad_residual: Tensor,
    grad_y: Tensor,
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = launch_backward(grad_residual, grad_y, x, branch, gate, weight, scale, eps, "rms")
    stream = (_made(grads.x), _made(grads.branch), _made(grads.gate))
    return *stream, _made(grads.weight), _made(grads.shift), _made(grads.scale)


@gated_residual_rms_norm_modulate_backward.register_kernel("cpu")
def _(
    grad_residual: Tensor,
    grad_y: Tensor,
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_branch, grad_gate, grad_weight, grad_shift, grad_scale = (
        reference.gated_residual_rms_norm_modulate_backward(grad_residual, grad_y, x, branch, gate, weight, scale, eps)
    )
    stream = (grad_x.contiguous(), grad_branch.contiguous(), grad_gate.contiguous())
    return *stream, grad_weight, _shift_gradient(grad_shift, x, scale), grad_scale.contiguous()


@gated_residual_rms_norm_modulate_backward.register_fake
def _(
    grad_residual: Tensor,
    grad_y: Tensor,
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    stream = (x.new_empty(x.shape), x.new_empty(x.shape), gate.new_empty(gate.shape))
    return *stream, weight.new_empty(weight.shape), _empty_shift(x, scale), scale.new_empty(scale.shape)


def _gated_residual_rms_norm_modulate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, gate, weight, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, branch, gate, weight, scale)


def _gated_residual_rms_norm_modulate_autograd(
    ctx: Any, grad_residual: Tensor, grad_y: Tensor
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: non-reentrant checkpoints unpack each tensor only once
    *grads, grad_shift, grad_scale = gated_residual_rms_norm_modulate_backward(grad_residual, grad_y, *saved, ctx.eps)
    return *grads, grad_y if _per_token(saved[0], saved[-1]) else grad_shift, grad_scale, None


gated_residual_rms_norm_modulate.register_autograd(
    _gated_residual_rms_norm_modulate_autograd, setup_context=_gated_residual_rms_norm_modulate_setup
)


@torch.library.custom_op("ddt_kernels::gated_residual_layer_norm_modulate", mutates_args=(), device_types="cuda")
def gated_residual_layer_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    return _made(launch_forward(x, branch, gate, None, shift, scale, eps, "layer", False)[1])


@gated_residual_layer_norm_modulate.register_kernel("cpu")
def gated_residual_layer_norm_modulate_on_cpu(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    return reference.gated_residual_layer_norm_modulate(x, branch, gate, shift, scale, eps).contiguous()


@gated_residual_layer_norm_modulate.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "ddt_kernels::gated_residual_layer_norm_modulate_backward", mutates_args=(), device_types="cuda"
)
def gated_residual_layer_norm_modulate_backward(
    grad_y: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = launch_backward(None, grad_y, x, branch, gate, None, scale, eps, "layer")
    return _made(grads.x), _made(grads.branch), _made(grads.gate), _made(grads.shift), _made(grads.scale)


@gated_residual_layer_norm_modulate_backward.register_kernel("cpu")
def _(
    grad_y: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_branch, grad_gate, grad_shift, grad_scale = reference.gated_residual_layer_norm_modulate_backward(
        grad_y, x, branch, gate, scale, eps
    )
    stream = (grad_x.contiguous(), grad_branch.contiguous(), grad_gate.contiguous())
    return *stream, _shift_gradient(grad_shift, x, scale), grad_scale.contiguous()


@gated_residual_layer_norm_modulate_backward.register_fake
def _(
    grad_y: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    stream = (x.new_empty(x.shape), x.new_empty(x.shape), gate.new_empty(gate.shape))
    return *stream, _empty_shift(x, scale), scale.new_empty(scale.shape)


def _gated_residual_layer_norm_modulate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, branch, gate, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, branch, gate, scale)


def _gated_residual_layer_norm_modulate_autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    *grads, grad_shift, grad_scale = gated_residual_layer_norm_modulate_backward(grad_y, *saved, ctx.eps)
    return *grads, grad_y if _per_token(saved[0], saved[-1]) else grad_shift, grad_scale, None


gated_residual_layer_norm_modulate.register_autograd(
    _gated_residual_layer_norm_modulate_autograd, setup_context=_gated_residual_layer_norm_modulate_setup
)


@torch.library.custom_op("ddt_kernels::gated_residual", mutates_args=(), device_types="cuda")
def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return _made(launch_forward(x, branch, gate, None, None, None, 0.0, "none", True)[0])


@gated_residual.register_kernel("cpu")
def gated_residual_on_cpu(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return reference.gated_residual(x, branch, gate).contiguous()


@gated_residual.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ddt_kernels::gated_residual_backward", mutates_args=(), device_types="cuda")
def gated_residual_backward(grad_residual: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    grads = launch_backward(grad_residual, None, None, branch, gate, None, None, 0.0, "none")
    return _made(grads.branch), _made(grads.gate)


@gated_residual_backward.register_kernel("cpu")
def _(grad_residual: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    grad_branch, grad_gate = reference.gated_residual_backward(grad_residual, branch, gate)
    return grad_branch.contiguous(), grad_gate.contiguous()


@gated_residual_backward.register_fake
def _(grad_residual: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape)


def _gated_residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gated_residual_autograd(ctx: Any, grad_residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad_residual, *gated_residual_backward(grad_residual, *ctx.saved_tensors)


gated_residual.register_autograd(_gated_residual_autograd, setup_context=_gated_residual_setup)


@torch.library.custom_op("ddt_kernels::forecast_norm_modulate", mutates_args=(), device_types="cuda")
def forecast_norm_modulate(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    forecast_weights: Tensor,
    step: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(x', y); x' is empty without branch and gate, and without weight, which makes it a LayerNorm."""
    keep, norm = gate is not None and weight is not None, "layer" if weight is None else "rms"
    forecast = forecast_weights, step
    residual, y = launch_forward(x, branch, gate, weight, shift, scale, eps, norm, keep, forecast)
    return x.new_empty(0) if residual is None else residual, _made(y)


@forecast_norm_modulate.register_kernel("cpu")
def forecast_norm_modulate_on_cpu(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    forecast_weights: Tensor,
    step: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shift, scale = (reference.forecast(history, forecast_weights, step) for history in (shift, scale))
    if branch is None or gate is None:
        return x.new_empty(0), rms_norm_modulate_on_cpu(x, _made(weight), shift, scale, eps)
    gate = reference.forecast(gate, forecast_weights, step)
    if weight is None:
        return x.new_empty(0), gated_residual_layer_norm_modulate_on_cpu(x, branch, gate, shift, scale, eps)
    return gated_residual_rms_norm_modulate_on_cpu(x, branch, gate, weight, shift, scale, eps)


@forecast_norm_modulate.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    forecast_weights: Tensor,
    step: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if gate is None or weight is None else x.shape), x.new_empty(x.shape)
