"""What an attention layer does between its two GEMMs, with the fewest passes over memory."""

import torch
from torch import Tensor

import ddt_kernels
from ddt_fast.model.attention import AttentionBackend, attention, backend_for


def qkv_attention(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    backend: AttentionBackend = "auto",
    *,
    overwrite: bool,
) -> Tensor:
    """softmax(q·kᵀ / √D)·v per sample and head, with q and k RMS-normed and rotated first.

    Args:
        qkv: (B, N, 3, H, D), a projection's output.
        q_weight, k_weight, cos, sin: as for `ddt_kernels.qk_norm_rope`.
        backend: as for `attention`. With gradients and ddt_kernels' own attention, everything is one operator, which
            keeps only qkv for the backward pass, and not q, k and v too.
        overwrite: nothing else reads qkv: without gradients, the normed q and k overwrite those in qkv.

    Returns: (B, N, H, D), in qkv's dtype; see `attention`.
    Raises: ValueError, as `ddt_kernels.qk_norm_rope` and `attention`.
    """
    others = q_weight, k_weight, cos, sin
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (qkv, q_weight, k_weight))
    if qkv.device.type == "cpu" and torch.compiler.is_compiling():
        normed = ddt_kernels.qk_norm_rope(qkv, *others)  # plain PyTorch: Inductor decides what to keep
    elif overwrite and not gradient:
        normed = ddt_kernels.qk_norm_rope_(qkv, *others)
    elif gradient and _is_ours(qkv, backend):
        return ddt_kernels.qkv_attention(qkv, *others)
    else:
        normed = ddt_kernels.qk_norm_rope(qkv, *others)
    q, k, v = normed.unbind(2)
    return attention(q, k, v, backend)


def _is_ours(qkv: Tensor, backend: AttentionBackend) -> bool:
    """Whether `backend`, with gradients, runs what `ddt_kernels.attention` runs."""
    return backend_for(qkv, backend, gradient=True) == ("sdpa_flash" if qkv.device.type == "cpu" else "triton")
