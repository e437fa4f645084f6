"""The norm family: a transformer block's element-wise passes between GEMMs, each reading and writing memory once.

    rms_norm_modulate                   y  = rms_norm(x) · weight · (1 + scale) + shift
    gated_residual_rms_norm_modulate    x' = x + gate · branch;  y as above, of x'
    gated_residual_layer_norm_modulate  y  = layer_norm(x + gate · branch) · (1 + scale) + shift
    gated_residual                      x' = x + gate · branch

Activations are (B, N, C); shift, scale and gate are per sample (B, 1, C) or per token (B, N, C), all of a call alike.
Everything may be strided but for the last dimension: chunks of one adaLN GEMM's output are read in place. Autograd
keeps inputs alone; the backward kernels recompute x' and the statistics. Kernels and formulas: `norm_kernels.py`.
"""

import torch
from torch import Tensor

from ddt_kernels import norm_operators as operators
from ddt_kernels.checks import (
    check_activations,
    check_like,
    check_modulation,
    check_positive,
    check_tensor,
    check_weight,
)
from ddt_kernels.cost import Cost
from ddt_kernels.norm_launch import MAX_CHANNELS


def rms_norm_modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight · (1 + scale) + shift, statistics and arithmetic in fp32.

    Args:
        x: (B, N, C), C ≤ 6144; bf16, fp16 or fp32 (fp64 on a CPU).
        weight: (C,), x's dtype or fp32.
        shift, scale: (B, 1, C) or (B, N, C), both alike, x's dtype.
        eps: above 0.

    Returns: (B, N, C), x's dtype, contiguous. Differentiable, once, in all four tensors.

    Raises: ValueError on any other shape, dtype, device mix, or a last stride other than 1.
    Source: the adaLN norm of DDT (arXiv 2504.05741); RMSNorm, arXiv 1910.07467.
    """
    op = "rms_norm_modulate"
    check_activations(op, "x", x, MAX_CHANNELS)
    check_weight(op, "weight", weight, x)
    _check_modulations(op, x, shift=shift, scale=scale)
    check_positive(op, "eps", eps)
    return operators.rms_norm_modulate(x, weight, shift, scale, eps)


def gated_residual_rms_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x' = x + gate · branch and y = rms_norm_modulate(x'), in one pass.

    Args:
        x, branch: (B, N, C), as rms_norm_modulate's x.
        gate, shift, scale: (B, 1, C) or (B, N, C), all alike, x's dtype.
        weight, eps: as in rms_norm_modulate.

    Returns: (x', y), each (B, N, C), x's dtype, contiguous; y is computed from x' as rounded to that dtype.
        Differentiable, once, in all six tensors.

    Raises: ValueError as rms_norm_modulate.
    Source: the residual and the next norm of a DDT block (arXiv 2504.05741).
    """
    op = "gated_residual_rms_norm_modulate"
    check_activations(op, "x", x, MAX_CHANNELS)
    check_like(op, "branch", branch, x)
    check_weight(op, "weight", weight, x)
    _check_modulations(op, x, gate=gate, shift=shift, scale=scale)
    check_positive(op, "eps", eps)
    return operators.gated_residual_rms_norm_modulate(x, branch, gate, weight, shift, scale, eps)


def gated_residual_layer_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> Tensor:
    """y = layer_norm(x + gate · branch) · (1 + scale) + shift, the norm without affine part, in one pass.

    Arguments, errors and result as in gated_residual_rms_norm_modulate, without a weight. x' is neither returned nor
    written: nothing reads it after the final layer, and the backward pass, which has to read branch and gate, rebuilds
    it from x for the bytes that reading a stored x' would cost.

    Source: the last residual and the final layer of DDT (arXiv 2504.05741).
    """
    op = "gated_residual_layer_norm_modulate"
    check_activations(op, "x", x, MAX_CHANNELS)
    check_like(op, "branch", branch, x)
    _check_modulations(op, x, gate=gate, shift=shift, scale=scale)
    check_positive(op, "eps", eps)
    return operators.gated_residual_layer_norm_modulate(x, branch, gate, shift, scale, eps)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x' = x + gate · branch. Arguments and errors as in gated_residual_rms_norm_modulate.

    Returns: (B, N, C), x's dtype, contiguous. Differentiable, once, in all three tensors.
    """
    op = "gated_residual"
    check_activations(op, "x", x, MAX_CHANNELS)
    check_like(op, "branch", branch, x)
    _check_modulations(op, x, gate=gate)
    return operators.gated_residual(x, branch, gate)


def _check_modulations(op: str, x: Tensor, **modulations: Tensor) -> None:
    tokens = None
    for name, modulation in modulations.items():
        if tokens is None:
            check_tensor(op, name, modulation)
            tokens = modulation.shape[1] if modulation.ndim == 3 else -1
        check_modulation(op, name, modulation, x, tokens)


def rms_norm_modulate_cost(
    batch: int, tokens: int, channels: int, dtype: torch.dtype, per_token: bool, backward: bool = False
) -> Cost:
    """Bytes and FLOPs of one call (or of its backward pass) on (batch, tokens, channels); the weight in `dtype` too.

    A per-token gradient of shift is the gradient of y itself and costs nothing.
    """
    activations, modulations, vectors = (3, 2, 2) if backward else (2, 2, 1)
    modulations += backward and not per_token
    flops = 21 if backward else 7
    return _cost(batch, tokens, channels, dtype, per_token, activations, modulations, vectors, flops)


def gated_residual_rms_norm_modulate_cost(
    batch: int, tokens: int, channels: int, dtype: torch.dtype, per_token: bool, backward: bool = False
) -> Cost:
    """As rms_norm_modulate_cost."""
    activations, modulations, vectors = (6, 4, 2) if backward else (4, 3, 1)
    modulations += backward and not per_token
    flops = 26 if backward else 9
    return _cost(batch, tokens, channels, dtype, per_token, activations, modulations, vectors, flops)


def gated_residual_layer_norm_modulate_cost(
    batch: int, tokens: int, channels: int, dtype: torch.dtype, per_token: bool, backward: bool = False
) -> Cost:
    """As rms_norm_modulate_cost."""
    activations, modulations = (5, 4) if backward else (3, 3)
    modulations += backward and not per_token
    flops = 23 if backward else 10
    return _cost(batch, tokens, channels, dtype, per_token, activations, modulations, 0, flops)


def gated_residual_cost(
    batch: int, tokens: int, channels: int, dtype: torch.dtype, per_token: bool, backward: bool = False
) -> Cost:
    """As rms_norm_modulate_cost; x's gradient is that of x' itself and costs nothing."""
    activations, modulations, flops = (3, 2, 3) if backward else (3, 1, 2)
    return _cost(batch, tokens, channels, dtype, per_token, activations, modulations, 0, flops)


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
) -> Cost:
    """activations, modulations, vectors: how many (B, N, C), (B, N or 1, C) and (C,) tensors cross memory once."""
    elements = batch * tokens * channels
    modulation = elements if per_token else batch * channels
    moved = activations * elements + modulations * modulation + vectors * channels
    return Cost(moved * dtype.itemsize, flops_per_element * elements)
