"""The norm family as one registered operator, `ddt_kernels::norm_modulate`, and its backward operator.

`norm_modulate.py` checks arguments and calls it. What a call does not have is None among the inputs and an empty tensor
among the outputs, whose number is fixed. Per token, shift's gradient is y's: the backward operator returns an empty
tensor for it (an operator may not return its input), and autograd passes y's gradient on.
"""

from typing import Any

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.norm_launch import launch_backward, launch_forward, plain_forward


def _or_empty(made: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if made is None else made.contiguous()


def _norm(weight: Tensor | None, scale: Tensor | None) -> str:
    return "none" if scale is None else "layer" if weight is None else "rms"


@torch.library.custom_op("ddt_kernels::norm_modulate", mutates_args=(), device_types="cuda")
def norm_modulate(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    forecast_weights: Tensor | None,
    step: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(x', y): x' if `keep`, y if there are shift and scale, the LayerNorm if there is no weight."""
    forecast, norm = (forecast_weights, step), _norm(weight, scale)
    residual, y = launch_forward(x, branch, gate, weight, shift, scale, eps, norm, keep, *forecast)
    return _or_empty(residual, x), _or_empty(y, x)


@norm_modulate.register_kernel("cpu")
def norm_modulate_on_cpu(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    forecast_weights: Tensor | None,
    step: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    forecast, norm = (forecast_weights, step), _norm(weight, scale)
    residual, y = plain_forward(x, branch, gate, weight, shift, scale, eps, norm, keep, *forecast)
    return _or_empty(residual, x), _or_empty(y, x)


@norm_modulate.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    scale, keep = rest[4], rest[-1]
    return x.new_empty(x.shape if keep else 0), x.new_empty(0 if scale is None else x.shape)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("ddt_kernels::norm_modulate_backward", mutates_args=(), device_types="cuda")
def norm_modulate_backward(
    grad_residual: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, branch, gate, weight, shift and scale. Without scale, x' has the only gradient: x's is it."""
    made = launch_backward(grad_residual, grad_y, x, branch, gate, weight, scale, eps, _norm(weight, scale))
    return _gradients(made.x, made.branch, made.gate, made.weight, made.shift, made.scale)


def _gradients(*made: Tensor | None) -> Gradients:
    like = next(tensor for tensor in made if tensor is not None)
    x, branch, gate, weight, shift, scale = (_or_empty(tensor, like) for tensor in made)
    return x, branch, gate, weight, shift, scale


@norm_modulate_backward.register_kernel("cpu")
def _(grad_residual: Tensor | None, grad_y: Tensor | None, *rest: Any) -> Gradients:
    made = reference.norm_modulate_backward(grad_residual, grad_y, *rest)
    scale, grad_shift = rest[-2], made[4]
    return _gradients(*made[:4], None if _per_token(grad_y, scale) else grad_shift, made[5])


def _per_token(grad_y: Tensor | None, scale: Tensor | None) -> bool:
    return grad_y is not None and scale is not None and scale.shape == grad_y.shape


@norm_modulate_backward.register_fake
def _(grad_residual: Tensor | None, grad_y: Tensor | None, *rest: Any) -> Gradients:
    x, branch, gate, weight, scale, _ = rest
    made = (x, branch, gate, weight, None if _per_token(grad_y, scale) else scale, scale)
    return _gradients(*(like if like is None else like.new_empty(like.shape) for like in made))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, gate, weight, _, scale, ctx.forecast, _, ctx.eps, keep = inputs
    if not keep or scale is None:  # one of the outputs is empty
        ctx.mark_non_differentiable(output[keep])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(None if scale is None else x, branch, gate, weight, scale)


def _autograd(ctx: Any, grad_residual: Tensor | None, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.forecast is not None:
        raise RuntimeError("ddt_kernels::norm_modulate: a forecast has no gradient")
    x, branch, gate, weight, scale = ctx.saved_tensors  # once: non-reentrant checkpoints unpack each tensor only once
    if grad_y is None:  # there is no y, or nothing downstream differentiates it
        x = weight = scale = None
    made: tuple[Tensor | None, ...] = (None,) * 6
    if grad_y is not None or (grad_residual is not None and gate is not None):
        gradients = norm_modulate_backward(grad_residual, grad_y, x, branch, gate, weight, scale, ctx.eps)
        made = tuple(gradient if gradient.numel() else None for gradient in gradients)
    grad_x, grad_branch, grad_gate, grad_weight, grad_shift, grad_scale = made
    if grad_y is None:
        grad_x = grad_residual
    elif grad_shift is None:
        grad_shift = grad_y
    return grad_x, grad_branch, grad_gate, grad_weight, grad_shift, grad_scale, None, None, None, None


norm_modulate.register_autograd(_autograd, setup_context=_setup)
