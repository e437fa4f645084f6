"""The norm family: a transformer block's element-wise passes between GEMMs. Each reads and writes memory once.

    rms_norm_modulate                   y  = rms_norm(x) · weight · (1 + scale) + shift
    gated_residual_rms_norm_modulate    x' = x + gate · branch;  y as above, of x'
    gated_residual_layer_norm_modulate  y  = layer_norm(x + gate · branch) · (1 + scale) + shift
    gated_residual                      x' = x + gate · branch

Activations are (B, N, C); shift, scale and gate are per sample (B, 1, C) or per token (B, N, C), the same for all in a
call. All dimensions except the last may have any stride: chunks of one adaLN GEMM's output are read in place. Autograd
keeps only inputs; the backward kernels recompute x' and the statistics. Kernels and formulas: `norm_kernels.py`.

With `forecast`, the norms take each modulation as a history of K cached ones and use Σ_k weights[step, k] · cached[k]:
what a sampler extrapolates between refreshes is never written to memory.
"""

import torch
from torch import Tensor

from ddt_kernels import norm_operators as operators
from ddt_kernels.checks import (
    check_activations,
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
        shift, scale: (B, 1, C) or (B, N, C), both the same, x's dtype.
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
    op = "rms_norm_modulate"
    check_activations(op, "x", x, MAX_CHANNELS)
    check_weight(op, "weight", weight, x)
    _check_modulations(op, x, forecast, shift=shift, scale=scale)
    check_positive(op, "eps", eps)
    if forecast is not None:
        return _with_forecast(op, x, None, None, weight, shift, scale, forecast, eps)[1]
    function = operators.rms_norm_modulate_on_cpu if inlined(x) else operators.rms_norm_modulate
    return function(x, weight, shift, scale, eps)


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
        gate, shift, scale: (B, 1, C) or (B, N, C), all the same, x's dtype.
        weight, eps: as in rms_norm_modulate.
        forecast: as in rms_norm_modulate, for gate too.

    Returns: (x', y), each (B, N, C), x's dtype, contiguous; y is computed from x' rounded to that dtype.
        Differentiable once, in all six tensors; with a forecast, in none.

    Raises: ValueError as rms_norm_modulate does.
    Source: the residual and the next norm of a DDT block (arXiv 2504.05741).
    """
    op = "gated_residual_rms_norm_modulate"
    check_activations(op, "x", x, MAX_CHANNELS)
    check_like(op, "branch", branch, x)
    check_weight(op, "weight", weight, x)
    _check_modulations(op, x, forecast, gate=gate, shift=shift, scale=scale)
    check_positive(op, "eps", eps)
    if forecast is not None:
        return _with_forecast(op, x, branch, gate, weight, shift, scale, forecast, eps)
    plain = operators.gated_residual_rms_norm_modulate_on_cpu
    function = plain if inlined(x) else operators.gated_residual_rms_norm_modulate
    return function(x, branch, gate, weight, shift, scale, eps)


def gated_residual_layer_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    forecast: Forecast | None = None,
) -> Tensor:
    """y = layer_norm(x + gate · branch) · (1 + scale) + shift, the norm without an affine part, in one pass.

    Arguments, errors and result as in gated_residual_rms_norm_modulate, without a weight. x' is neither returned nor
    written: nothing reads it after the final layer, and the backward pass, which reads branch and gate anyway, rebuilds
    it from x for as many bytes as reading a stored x' would take.

    Source: the last residual and the final layer of DDT (arXiv 2504.05741).
    """
    op = "gated_residual_layer_norm_modulate"
    check_activations(op, "x", x, MAX_CHANNELS)
    check_like(op, "branch", branch, x)
    _check_modulations(op, x, forecast, gate=gate, shift=shift, scale=scale)
    check_positive(op, "eps", eps)
    if forecast is not None:
        return _with_forecast(op, x, branch, gate, None, shift, scale, forecast, eps)[1]
    plain = operators.gated_residual_layer_norm_modulate_on_cpu
    function = plain if inlined(x) else operators.gated_residual_layer_norm_modulate
    return function(x, branch, gate, shift, scale, eps)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x' = x + gate · branch. Arguments and errors as in gated_residual_rms_norm_modulate.

    Returns: (B, N, C), x's dtype, contiguous. Differentiable once, in all three tensors.
    """
    op = "gated_residual"
    check_activations(op, "x", x, MAX_CHANNELS)
    check_like(op, "branch", branch, x)
    _check_modulations(op, x, None, gate=gate)
    return (operators.gated_residual_on_cpu if inlined(x) else operators.gated_residual)(x, branch, gate)


def _with_forecast(
    op: str,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    forecast: Forecast,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        named = {"x": x, "branch": branch, "gate": gate, "weight": weight, "shift": shift, "scale": scale}
        for name, tensor in (named | {"forecast[0] (weights)": forecast[0]}).items():
            if tensor is not None and tensor.requires_grad:
                fail(op, name, "requires a gradient", "torch.no_grad() around it: a forecast has no gradient")
    function = operators.forecast_norm_modulate_on_cpu if inlined(x) else operators.forecast_norm_modulate
    return function(x, branch, gate, weight, shift, scale, *forecast, eps)


def _check_modulations(op: str, x: Tensor, forecast: Forecast | None, **modulations: Tensor) -> None:
    tokens = None
    history: tuple[int, ...] = ()
    for name, modulation in modulations.items():
        if tokens is None:
            check_tensor(op, name, modulation)
            if forecast is not None:
                history = (_history(op, name, modulation, x),)
                check_forecast(op, forecast, history[0], x)
            tokens = modulation.shape[-2] if modulation.ndim == 3 + len(history) else -1
        check_modulation(op, name, modulation, x, tokens, history)


def _history(op: str, name: str, modulation: Tensor, x: Tensor) -> int:
    """K of a forecast's modulation (K, B, N or 1, C)."""
    if modulation.ndim != 4 or modulation.shape[0] not in (2, 3):
        B, N, C = x.shape
        given = f"has shape {tuple(modulation.shape)}"
        fail(op, name, given, f"(K, {B}, 1 or {N}, {C}), K 2 or 3, with a forecast")
    return modulation.shape[0]


def rms_norm_modulate_cost(
    batch: int,
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    per_token: bool,
    backward: bool = False,
    history: int = 1,
) -> Cost:
    """Bytes and FLOPs of one call (or of its backward pass) on (batch, tokens, channels); the weight in `dtype` too.

    A per-token gradient of shift is the gradient of y itself and costs nothing. history: a forecast's K, or 1 without.
    """
    _check_history("rms_norm_modulate_cost", backward, history)
    activations, modulations, vectors = (3, 2, 2) if backward else (2, 2, 1)
    modulations += backward and not per_token
    flops = 21 if backward else 7
    return _cost(batch, tokens, channels, dtype, per_token, activations, modulations, vectors, flops, history)


def gated_residual_rms_norm_modulate_cost(
    batch: int,
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    per_token: bool,
    backward: bool = False,
    history: int = 1,
) -> Cost:
    """Like rms_norm_modulate_cost."""
    _check_history("gated_residual_rms_norm_modulate_cost", backward, history)
    activations, modulations, vectors = (6, 4, 2) if backward else (4, 3, 1)
    modulations += backward and not per_token
    flops = 26 if backward else 9
    return _cost(batch, tokens, channels, dtype, per_token, activations, modulations, vectors, flops, history)


def gated_residual_layer_norm_modulate_cost(
    batch: int,
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    per_token: bool,
    backward: bool = False,
    history: int = 1,
) -> Cost:
    """Like rms_norm_modulate_cost."""
    _check_history("gated_residual_layer_norm_modulate_cost", backward, history)
    activations, modulations = (5, 4) if backward else (3, 3)
    modulations += backward and not per_token
    flops = 23 if backward else 10
    return _cost(batch, tokens, channels, dtype, per_token, activations, modulations, 0, flops, history)


def gated_residual_cost(
    batch: int, tokens: int, channels: int, dtype: torch.dtype, per_token: bool, backward: bool = False
) -> Cost:
    """Like rms_norm_modulate_cost; x's gradient is that of x' itself and costs nothing."""
    activations, modulations, flops = (3, 2, 3) if backward else (3, 1, 2)
    return _cost(batch, tokens, channels, dtype, per_token, activations, modulations, 0, flops)


def _check_history(op: str, backward: bool, history: int) -> None:
    if history not in ((1,) if backward else (1, 2, 3)):
        fail(op, "history", f"is {history}", "1: a forecast has no backward pass" if backward else "1, 2 or 3")


def _cost(
    batch: int,
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    per_token: bool,
    activations: int,
    modulations: int,
    vectors: int,
    flops_per_element: int,
    history: int = 1,
) -> Cost:
    """activations, modulations, vectors: how many (B, N, C), (B, N or 1, C) and (C,) tensors cross memory once. With a
    forecast, each modulation is `history` entries, and a row of fp32 weights is added."""
    elements = batch * tokens * channels
    modulation = elements if per_token else batch * channels
    moved = activations * elements + history * modulations * modulation + vectors * channels
    if history == 1:
        return Cost(moved * dtype.itemsize, flops_per_element * elements)
    sums = modulations * (2 * history - 1) * modulation
    return Cost(moved * dtype.itemsize + 4 * history, flops_per_element * elements + sums)
