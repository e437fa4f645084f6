"""The norm family: a transformer block's element-wise passes between GEMMs. Each reads and writes memory once.

    rms_norm_modulate                   y  = rms_norm(x) · weight · (1 + scale) + shift
    layer_norm_modulate                 y  = layer_norm(x) · (1 + scale) + shift
    gated_residual_rms_norm_modulate    x' = x + gate · branch;  y = rms_norm_modulate(x')
    gated_residual_layer_norm_modulate  x' = x + gate · branch;  y = layer_norm_modulate(x')
    gated_residual                      x' = x + gate · branch

Activations are (B, N, C); shift, scale and gate are per sample (B, 1, C) or per token (B, N, C), all alike in one
call. All dimensions except the last may have any stride: chunks of one adaLN GEMM's output are read in place. Autograd
keeps only inputs; the backward kernels recompute x' and the statistics. Kernels and formulas: `norm_kernels.py`.

With `forecast`, the norms take each modulation as a history of K cached ones and use Σ_k weights[step, k] · cached[k]:
what a sampler extrapolates between refreshes is never written to memory.
"""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ddt_kernels.checks import (
    check_activations,
    check_flag,
    check_forecast,
    check_like,
    check_modulation,
    check_positive,
    check_tensor,
    check_weight,
    fail,
)
from ddt_kernels.cost import Cost
from ddt_kernels.norm_launch import MAX_CHANNELS
from ddt_kernels.norm_operator import norm_modulate, norm_modulate_on_cpu
from ddt_kernels.runtime import inlined

Forecast = tuple[Tensor, Tensor]


def rms_norm_modulate(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    forecast: Forecast | None = None,
) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight · (1 + scale) + shift, statistics and arithmetic in fp32.

    Args:
        x: (B, N, C), C ≤ 6144; bf16, fp16 or fp32 (fp64 on a CPU).
        weight: (C,), x's dtype or fp32.
        shift, scale: (B, 1, C) or (B, N, C), both of one shape, x's dtype.
        eps: above 0.
        forecast: (weights, step); shift and scale are then (K, B, 1 or N, C), K 2 or 3, and stand for
            Σ_k weights[step, k] · shift[k], summed in fp32. An entry with weight 0 is ignored, whatever it holds.
            weights: (steps, K) fp32, contiguous. step: int32 or int64, shape () or (1,), never read by the host;
            outside the table, every result is NaN on a GPU and an IndexError on a CPU (compiled for a CPU, a step past
            the end is a RuntimeError and a negative one counts from the end). Both on x's device.

    Returns: (B, N, C), x's dtype, contiguous. Differentiable once, in all four tensors; with a forecast, in none.

    Raises: ValueError on any other shape, dtype, device mix, or a last stride other than 1, and with a forecast if
        autograd would have to record it.
    Source: the adaLN norm of DDT (arXiv 2504.05741); RMSNorm, arXiv 1910.07467.
    """
    tensors = {"weight": weight, "shift": shift, "scale": scale}
    return _apply("rms_norm_modulate", x, tensors, eps, forecast, keep=False)[1]


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, forecast: Forecast | None = None
) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) · (1 + scale) + shift: the norm has no affine part.

    Arguments, errors and result as in rms_norm_modulate, without a weight.

    Source: the first norm of a DiT or SiT block (arXiv 2212.09748, 2401.08740).
    """
    return _apply("layer_norm_modulate", x, {"shift": shift, "scale": scale}, eps, forecast, keep=False)[1]


def gated_residual_rms_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    forecast: Forecast | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate · branch and y = rms_norm_modulate(x'), in one pass.

    Args:
        x, branch: (B, N, C), like rms_norm_modulate's x.
        gate, shift, scale: (B, 1, C) or (B, N, C), all of one shape, x's dtype.
        weight, eps: as in rms_norm_modulate.
        forecast: as in rms_norm_modulate, for gate too.

    Returns: (x', y), each (B, N, C), x's dtype, contiguous; y is computed from x' rounded to that dtype.
        Differentiable once, in all six tensors; with a forecast, in none.

    Raises: ValueError as rms_norm_modulate does.
    Source: the residual and the next norm of a DDT block (arXiv 2504.05741).
    """
    tensors = {"branch": branch, "weight": weight, "gate": gate, "shift": shift, "scale": scale}
    return _apply("gated_residual_rms_norm_modulate", x, tensors, eps, forecast, keep=True)


@overload
def gated_residual_layer_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    keep: Literal[False] = False,
    *,
    forecast: Forecast | None = None,
) -> Tensor: ...


@overload
def gated_residual_layer_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    keep: Literal[True] = ...,
    *,
    forecast: Forecast | None = None,
) -> tuple[Tensor, Tensor]: ...


def gated_residual_layer_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    keep: bool = False,
    *,
    forecast: Forecast | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x' = x + gate · branch and y = layer_norm_modulate(x'), in one pass.

    Arguments, errors and results as in gated_residual_rms_norm_modulate, without a weight. Returns y, or (x', y) if
    `keep` is True. Nothing reads x' after a final layer, so without `keep` it is not even written. The backward pass
    reads branch and gate anyway; it rebuilds x' from x for as many bytes as reading a stored x' would take.

    Source: the last residual and the final layer of DDT (arXiv 2504.05741); with `keep`, the residual and the next norm
    of a DiT or SiT block (arXiv 2212.09748, 2401.08740).
    """
    check_flag("gated_residual_layer_norm_modulate", "keep", keep)
    tensors = {"branch": branch, "gate": gate, "shift": shift, "scale": scale}
    residual, y = _apply("gated_residual_layer_norm_modulate", x, tensors, eps, forecast, keep)
    return (residual, y) if keep else y


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x' = x + gate · branch. Arguments and errors as in gated_residual_rms_norm_modulate.

    Returns: (B, N, C), x's dtype, contiguous. Differentiable once, in all three tensors.
    """
    return _apply("gated_residual", x, {"branch": branch, "gate": gate}, 0.0, None, keep=True)[0]


def _apply(
    op: str, x: Tensor, tensors: dict[str, Tensor], eps: float, forecast: Forecast | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """(x', y) of the operator that has these inputs, checked in the name of `op`."""
    _check(op, x, tensors, eps, forecast)
    if forecast is not None and torch.is_grad_enabled():
        for name, tensor in {"x": x, **tensors, "forecast[0] (weights)": forecast[0]}.items():
            if tensor.requires_grad:
                fail(op, name, "requires a gradient", "torch.no_grad() around it: a forecast has no gradient")
    inputs = (tensors.get(name) for name in ("branch", "gate", "weight", "shift", "scale"))
    function = norm_modulate_on_cpu if inlined(x) else norm_modulate
    return function(x, *inputs, *(forecast or (None, None)), eps, keep)


def _check(op: str, x: Tensor, tensors: dict[str, Tensor], eps: float, forecast: Forecast | None) -> None:
    check_activations(op, "x", x, MAX_CHANNELS)
    tokens, first = 0, ""
    history: tuple[int, ...] = ()
    for name, tensor in tensors.items():
        if name == "branch":
            check_like(op, name, tensor, x)
        elif name == "weight":
            check_weight(op, name, tensor, x)
        else:
            if not first:
                check_tensor(op, name, tensor)
                if forecast is not None:
                    history = (_history(op, name, tensor, x),)
                    check_forecast(op, forecast, history[0], x)
                tokens = tensor.shape[-2] if tensor.ndim == 3 + len(history) else -1
            check_modulation(op, name, tensor, x, tokens, history, first)
            first = first or name
    if "scale" in tensors:
        check_positive(op, "eps", eps)


def _history(op: str, name: str, modulation: Tensor, x: Tensor) -> int:
    """K of a forecast's modulation (K, B, N or 1, C)."""
    if modulation.ndim != 4 or modulation.shape[0] not in (2, 3):
        B, N, C = x.shape
        given = f"has shape {tuple(modulation.shape)}"
        fail(op, name, given, f"(K, {B}, 1 or {N}, {C}), K 2 or 3, with a forecast")
    return modulation.shape[0]


def _cost_function(op: str, norm: str, gated: bool, keep: bool) -> Callable[..., Cost]:
    def cost(
        batch: int,
        tokens: int,
        channels: int,
        dtype: torch.dtype,
        per_token: bool,
        backward: bool = False,
        history: int = 1,
    ) -> Cost:
        """Bytes and FLOPs of one call (or its backward pass) on (batch, tokens, channels); the weight in `dtype` too.

        A gradient that equals another costs nothing: per token shift's, which is y's, and gated_residual's of x, which
        is that of x'. history: a forecast's K, or 1 without; the kernel then also reads a row of fp32 weights.
        """
        if history not in ((1,) if backward or norm == "none" else (1, 2, 3)):
            expected = "1: a forecast has no backward pass" if backward else "1, 2 or 3"
            fail(f"{op}_cost", "history", f"is {history}", expected)
        normed = norm != "none"
        activations = (3 * normed + 2 * gated if backward else 1 + gated + normed) + keep
        modulations = 2 * (gated + normed) + (normed and not per_token) if backward else gated + 2 * normed
        vectors = (1 + backward) * (norm == "rms")
        flops = {"rms": (7, 21), "layer": (8, 18), "none": (0, 0)}[norm][backward]
        flops += gated * (3 + 2 * normed if backward else 2)  # the backward pass of a norm makes x' again
        elements = batch * tokens * channels
        modulation = elements if per_token else batch * channels
        moved = activations * elements + history * modulations * modulation + vectors * channels
        forecast = history > 1
        sums = forecast * modulations * (2 * history - 1) * modulation
        return Cost(moved * dtype.itemsize + forecast * 4 * history, flops * elements + sums)

    cost.__name__ = cost.__qualname__ = f"{op}_cost"
    return cost


rms_norm_modulate_cost = _cost_function("rms_norm_modulate", "rms", gated=False, keep=False)
layer_norm_modulate_cost = _cost_function("layer_norm_modulate", "layer", gated=False, keep=False)
gated_residual_rms_norm_modulate_cost = _cost_function("gated_residual_rms_norm_modulate", "rms", gated=True, keep=True)
_layer_costs = [_cost_function("gated_residual_layer_norm_modulate", "layer", True, keep) for keep in (False, True)]
gated_residual_cost = _cost_function("gated_residual", "none", gated=True, keep=True)


def gated_residual_layer_norm_modulate_cost(*args: Any, keep: bool = False, **kwargs: Any) -> Cost:
    """Like rms_norm_modulate_cost; keep: as the function takes it."""
    return _layer_costs[keep](*args, **kwargs)
