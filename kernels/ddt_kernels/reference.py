"""The package's functions in plain PyTorch: CPU implementation, the tests' oracle, the benchmarks' baseline.

Shapes and dtypes are those of the fused functions of the same name; nothing is checked here. The forward functions
follow the model's rounding order (DDT, arXiv 2504.05741, as released): a norm's statistics are fp32, the normalised
value is cast back to the input's dtype, then multiplied by the weight, then modulated. float64 inputs are computed in
float64 throughout, for gradcheck and the tests' oracles.

The backward functions are the closed forms the fused backward kernels compute, with fp32 arithmetic and one rounding
per result.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension, cast to x's dtype, times weight."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype) * weight).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift."""
    return x * (1 + scale) + shift


def norm_modulate(
    x: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """The norm family in general: x' = x + gate · branch, or x without them; with shift and scale, its modulated norm:
    RMSNorm, or, without weight, LayerNorm, which has no affine part."""
    if branch is not None and gate is not None:
        x = x + gate * branch
    if shift is None or scale is None:
        return x, None
    normed = F.layer_norm(x, x.shape[-1:], eps=eps) if weight is None else rms_norm(x, weight, eps)
    return x, modulate(normed, shift, scale)


def rms_norm_modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """rms_norm(x, weight) · (1 + scale) + shift."""
    return modulate(rms_norm(x, weight, eps), shift, scale)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """layer_norm(x) · (1 + scale) + shift."""
    return modulate(F.layer_norm(x, x.shape[-1:], eps=eps), shift, scale)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate · branch."""
    return x + gate * branch


def gated_residual_rms_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x' = x + gate · branch, and rms_norm_modulate(x')."""
    residual = gated_residual(x, branch, gate)
    return residual, rms_norm_modulate(residual, weight, shift, scale, eps)


def gated_residual_layer_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, keep: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """y = layer_norm_modulate(x') of x' = x + gate · branch; (x', y) if keep."""
    residual = gated_residual(x, branch, gate)
    y = layer_norm_modulate(residual, shift, scale, eps)
    return (residual, y) if keep else y


def forecast(history: Tensor, weights: Tensor, step: Tensor) -> Tensor:
    """Σ_k weights[step, k] · history[k], in fp32, rounded to history's dtype; an entry with weight 0 may hold anything.

    history: (K, ...); weights: (steps, K); step: an integer tensor of shape () or (1,).
    """
    row = weights.index_select(0, step.reshape(1)).squeeze(0)
    if history.device.type != "cpu" or torch.compiler.is_compiling():
        return _combine(row, _wide(history).unbind()).to(history.dtype)
    # A CPU reads its own weights for free, and without a kernel to fuse them, selects would cost more than the sum.
    total = torch.zeros(history.shape[1:], dtype=torch.promote_types(history.dtype, torch.float32))
    for weight, entry in zip(row.tolist(), history.unbind(), strict=True):
        if weight != 0:
            total.add_(entry, alpha=weight)
    return total.to(history.dtype)


def _reduce_to(gradient: Tensor, like: Tensor) -> Tensor:
    """Sums a (B, N, C) gradient over the tokens if `like` is per sample; in like's dtype."""
    if like.shape[1] != gradient.shape[1]:
        gradient = gradient.sum(1, keepdim=True)
    return gradient.to(like.dtype)


def _normalize(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * rstd, rstd


def _norm_backward(grad_normed: Tensor, normed: Tensor, rstd: Tensor, center: bool) -> Tensor:
    """Gradient of normed = centered(x) · rstd(x): projects out the directions the norm removes, then rescales."""
    projected = grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True)
    if center:
        projected = projected - grad_normed.mean(-1, keepdim=True)
    return projected * rstd


def norm_modulate_backward(
    grad_residual: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float = 1e-6,
) -> tuple[Tensor | None, ...]:
    """Gradients of norm_modulate in x, branch, gate, weight, shift (of scale's shape) and scale, from those of x' and
    y; None where a call has no such input. Without y's, x is not read and its gradient, that of x' itself, None."""
    grad_x = grad_weight = grad_shift = grad_scale = grad_branch = grad_gate = None
    grad = None if grad_residual is None else _wide(grad_residual)
    if grad_y is not None and x is not None and scale is not None:
        residual, _ = norm_modulate(x, branch, gate)
        normed, rstd = _normalize(residual, eps, center=weight is None)
        dy, factor = _wide(grad_y), 1 + _wide(scale)
        grad_normed, grad_modulated = dy * factor, dy * normed
        if weight is not None:
            grad_weight = (grad_normed * normed).sum((0, 1)).to(weight.dtype)
            grad_normed, grad_modulated = grad_normed * _wide(weight), grad_modulated * _wide(weight)
        through_norm = _norm_backward(grad_normed, normed, rstd, center=weight is None)
        grad = through_norm if grad is None else grad + through_norm
        grad_x, grad_shift, grad_scale = grad.to(x.dtype), _reduce_to(dy, scale), _reduce_to(grad_modulated, scale)
    if branch is not None and gate is not None and grad is not None:
        grad_branch, grad_gate = (grad * _wide(gate)).to(branch.dtype), _reduce_to(grad * _wide(branch), gate)
    return grad_x, grad_branch, grad_gate, grad_weight, grad_shift, grad_scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the adjacent pairs of x (B, N, H, D) by the angles of cos and sin (N, D / 2), in fp32."""
    even, odd = _wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6) -> Tensor:
    """rotate(rms_norm(x, weight)), x (B, N, H, D)."""
    return rotate(rms_norm(x, weight, eps), cos, sin)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> Tensor:
    """norm_rope of q and of k, packed again with v."""
    q, k, v = qkv.unbind(2)
    return torch.stack([norm_rope(q, q_weight, cos, sin, eps), norm_rope(k, k_weight, cos, sin, eps), v], dim=2)


def norm_rope_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of norm_rope in x and weight."""
    normed, rstd = _normalize(x, eps, center=False)
    grad = rotate(_wide(grad_y), cos, -sin)
    grad_x = _norm_backward(grad * _wide(weight), normed, rstd, center=False)
    return grad_x.to(x.dtype), (grad * normed).sum((0, 1, 2)).to(weight.dtype)


def qk_norm_rope_backward(
    grad_out: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qk_norm_rope in qkv, q_weight and k_weight."""
    (q, k, _), (grad_q, grad_k, grad_v) = qkv.unbind(2), grad_out.unbind(2)
    grad_q, grad_q_weight = norm_rope_backward(grad_q, q, q_weight, cos, sin, eps)
    grad_k, grad_k_weight = norm_rope_backward(grad_k, k, k_weight, cos, sin, eps)
    return torch.stack([grad_q, grad_k, grad_v], dim=2), grad_q_weight, grad_k_weight


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """(B, N, C·p·p), features in (channel, row, column) order, to (B, C, height, width), fp32."""
    rows, columns, p = height // patch_size, width // patch_size, patch_size
    patches = _wide(tokens).unflatten(2, (-1, p, p)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _combine(coefficients: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Σ coefficients[k] · values[k]; a value whose coefficient is 0 may hold anything."""
    first, *rest = (torch.where(c == 0, 0.0, c * v) for c, v in zip(coefficients.unbind(), values, strict=False))
    return sum(rest, first)


def guided_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    coefficients: Tensor,
    step: Tensor | None = None,
    velocity_history: Tensor | None = None,
    difference_history: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    patch_size: int,
) -> Tensor:
    """A sampling step from the final layer's tokens to the next x; updates the histories in place."""
    height, width = x.shape[2:]
    row = coefficients if step is None else coefficients.index_select(0, step.reshape(1)).squeeze(0)
    v_0 = unpatchify(v_cond, height, width, patch_size)
    velocities = [v_0, *([] if velocity_history is None else velocity_history.unbind())]
    differences = [] if difference_history is None else list(difference_history.unbind())
    if v_uncond is not None:
        differences = [v_0 - unpatchify(v_uncond, height, width, patch_size), *differences]
    after = _combine(row[:1], [x]) + _combine(row[2:6], velocities)
    if differences:
        after = after + _combine(row[6:10], differences)
    if noise is not None:
        after = after + _combine(row[1:2], [noise])
    for history, newest_first in ((velocity_history, velocities), (difference_history, differences)):
        if history is not None:
            history.copy_(torch.stack(newest_first[: len(history)]))
    return after


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale · q·kᵀ)·v of (B, Nq, H, D) queries and (B, Nk, H, D) keys, by whichever implementation PyTorch
    picks."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def qkv_attention(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    """attention after qk_norm_rope on a packed (B, N, 3, H, D): (B, N, H, D)."""
    q, k, v = qk_norm_rope(qkv, q_weight, k_weight, cos, sin, eps).unbind(2)
    return attention(q, k, v, scale)


def attention_logsumexp(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """ln Σ exp(scale · q·kᵀ) of every query, (B, H, Nq), with fp32 arithmetic."""
    scores = torch.einsum("bnhd,bmhd->bhnm", _wide(q), _wide(k))
    return torch.logsumexp(scores * (q.shape[-1] ** -0.5 if scale is None else scale), dim=-1)


def swiglu(x: Tensor, w1: Tensor, w3: Tensor, b1: Tensor | None = None, b3: Tensor | None = None) -> Tensor:
    """silu(x · w1ᵀ + b1) · (x · w3ᵀ + b3)."""
    return F.silu(F.linear(x, w1, b1)) * F.linear(x, w3, b3)


def swiglu_activation_backward(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    # In place: training on a CPU runs this, and its memory peaks here.
    (gate, up), grad = _wide(gate_up).chunk(2, -1), _wide(grad_y)
    sigmoid = torch.sigmoid(gate)
    grad_gate = (grad * up).mul_(sigmoid).mul_((1 - sigmoid).mul_(gate).add_(1))
    return torch.cat([grad_gate, sigmoid.mul_(gate).mul_(grad)], -1).to(gate_up.dtype)


def swiglu_backward(
    grad_y: Tensor, x: Tensor, w1: Tensor, w3: Tensor, gate_up: Tensor, biased: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of swiglu in x, in (w1; w3), stacked, and, if `biased`, in (b1; b3), else an empty tensor, given
    gate_up = (x · w1ᵀ + b1 | x · w3ᵀ + b3), side by side in the last dimension."""
    grad_gate_up = swiglu_activation_backward(grad_y, gate_up)
    grad_rows = grad_gate_up.flatten(0, -2)
    grad_biases = grad_rows.sum(0) if biased else x.new_empty(0)
    return grad_gate_up @ torch.cat([w1, w3]), grad_rows.mT @ x.flatten(0, -2), grad_biases


def swiglu_mlp(
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b3: Tensor | None = None,
    b2: Tensor | None = None,
) -> Tensor:
    """swiglu(x, w1, w3, b1, b3) · w2ᵀ + b2."""
    return F.linear(swiglu(x, w1, w3, b1, b3), w2, b2)


def swiglu_mlp_backward(
    grad_z: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, gate_up: Tensor, biased: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of swiglu_mlp in x, (w1; w3), w2 and (b1; b3; b2), given gate_up as `swiglu_backward` is."""
    gate, up = _wide(gate_up).chunk(2, -1)
    grad_rows = grad_z.flatten(0, -2)
    grad_w2 = grad_rows.mT @ F.silu(gate).mul_(up).to(x.dtype).flatten(0, -2)
    grad_x, grad_weights, grad_biases = swiglu_backward(grad_z @ w2, x, w1, w3, gate_up, biased)
    return grad_x, grad_weights, grad_w2, torch.cat([grad_biases, grad_rows.sum(0)]) if biased else grad_biases
