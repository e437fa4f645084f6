"""FusedDDT on other Linears, for inference on a CPU; `pack_bf16`: on bf16 weights that are packed once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt_fast.device import cpu_has_bf16
from ddt_fast.model.attention import attention
from ddt_fast.model.cpu import pack_bf16_weight, packed_bf16_linear
from ddt_fast.model.fused import FusedAttention, FusedBlock, FusedDDT, FusedSwiGLU
from ddt_kernels import reference as plain

MakeLinear = Callable[[Tensor, Tensor | None, torch.dtype], nn.Module]
"""(weight (N, K), bias (N,) or None, dtype of the result) → a layer that is called as layer(x, features=1), K being the
last `features` dimensions of x together."""


def pack_bf16(model: FusedDDT) -> FusedDDT:
    """A copy of a bfloat16 FusedDDT for inference on a CPU with bf16 units, a little faster; `model` is left as it is.

    Returns:
        A FusedDDT that can be called and sampled from, not trained, saved or loaded into; `model` itself where it is of
        another dtype or on another device, or where this CPU or this PyTorch cannot pack.
    """
    layer = model.decoder_modulation
    if not isinstance(layer, nn.Linear) or layer.weight.device.type != "cpu" or pack_bf16_weight(layer.weight) is None:
        return model
    return on_linears(model, PackedLinear, PackedSwiGLU)


def on_linears(model: FusedDDT, linear: MakeLinear, swiglu: Callable[[FusedSwiGLU], nn.Module]) -> FusedDDT:
    """A copy of `model` for inference, modulations and Linears of attention made by `linear`, MLPs by `swiglu`."""
    # What deepcopy finds in its memo counts as copied: the layers to replace are, by what replaces them.
    made: dict[int, nn.Module] = {}
    for layer in (model.encoder_modulation, model.decoder_modulation):
        made[id(layer)] = linear(layer.weight.detach(), layer.bias.detach(), layer.weight.dtype)
    for block in cast(list[FusedBlock], model.blocks):
        made[id(block.attn)] = CPUAttention(block.attn, linear)
        made[id(block.mlp)] = swiglu(block.mlp)
    result = copy.deepcopy(model, cast(dict[int, Any], made)).eval().requires_grad_(False)
    result.register_state_dict_pre_hook(_refuse_state_dict)
    result.register_load_state_dict_pre_hook(_refuse_state_dict)
    return result


def inner_dtype(weight: Tensor) -> torch.dtype:
    """Of what attention and SwiGLU read: bfloat16 where the CPU has units for it, else the weight's."""
    return torch.bfloat16 if cpu_has_bf16() else weight.dtype


class CPUAttention(nn.Module):
    """FusedAttention on Linears that `linear` makes.

    Queries and keys come out of their GEMM with the first of every rotary pair before all of the second: their products
    are the same in any order, and halves are read in whole vectors, pairs are not.
    """

    q_weight: Tensor
    k_weight: Tensor

    def __init__(self, attn: FusedAttention, linear: MakeLinear) -> None:
        super().__init__()
        self.num_heads, self.backend = attn.num_heads, attn.backend
        q, k, v = attn.qkv.weight.detach().unflatten(0, (3, self.num_heads, -1))
        weight, proj = torch.stack([_pairs_apart(q, 1), _pairs_apart(k, 1), v]).flatten(0, 2), attn.proj
        self.qkv = linear(weight, None, inner_dtype(weight))
        self.proj = linear(proj.weight.detach(), proj.bias.detach(), proj.weight.dtype)
        self.register_buffer("q_weight", _pairs_apart(attn.q_norm.weight.detach(), 0))
        self.register_buffer("k_weight", _pairs_apart(attn.k_norm.weight.detach(), 0))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = _norm_rope(q, self.q_weight, cos, sin), _norm_rope(k, self.k_weight, cos, sin)
        y: Tensor = self.proj(attention(q, k, v, self.backend), features=2)
        return y


class PackedLinear(nn.Module):
    """nn.Linear on packed bfloat16 weights.

    Args:
        weight: (N, K).
        bias: (N,) or None.
        dtype: bfloat16.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        assert dtype == torch.bfloat16
        self.register_buffer("packed", pack_bf16_weight(weight))
        self.register_buffer("bias", None if bias is None else bias.clone())

    def forward(self, x: Tensor, features: int = 1) -> Tensor:
        """x (..., K), or with K its last `features` dimensions together → (..., N)."""
        rows = x.reshape(-1, self.packed.shape[1])
        return packed_bf16_linear(rows, self.packed, self.bias).unflatten(0, x.shape[: x.ndim - features])


class PackedSwiGLU(nn.Module):
    """FusedSwiGLU on packed weights: w1 and w3 are one GEMM."""

    def __init__(self, mlp: FusedSwiGLU) -> None:
        super().__init__()
        self.w13 = PackedLinear(torch.cat([mlp.w1.weight, mlp.w3.weight]).detach(), None)
        self.w2 = PackedLinear(mlp.w2.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        y: Tensor = self.w2(F.silu(gate) * up)
        return y


def _pairs_apart(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x.unflatten(dim, (-1, 2)).select(dim + 1, i) for i in (0, 1)], dim)


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ddt_kernels.reference.norm_rope` where the pairs of x (B, N, H, D) and weight (D,) are apart."""
    first, second = plain.rms_norm(x, weight).float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def _refuse_state_dict(*_: Any) -> NoReturn:
    raise ValueError("a model with packed weights is neither saved nor loaded; save and load the one it was made from")
