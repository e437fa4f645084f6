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
    on_cpu = qkv.device.type == "cpu"
    norm_rope = ddt_kernels.qk_norm_rope
    if not (on_cpu and torch.compiler.is_compiling()):  # there, in plain PyTorch, Inductor decides what to keep
        # What ddt_kernels.attention runs.
        if gradient and backend_for(qkv, backend, gradient) == ("sdpa_flash" if on_cpu else "triton"):
            return ddt_kernels.qkv_attention(qkv, *others)
        if overwrite and not gradient:
            norm_rope = ddt_kernels.qk_norm_rope_
    q, k, v = norm_rope(qkv, *others).unbind(2)
    return attention(q, k, v, backend)
