"""DDT in plain PyTorch, with the names of the released weights: every faster path is tested against it.

Shapes: B batch, N tokens, C hidden size, H heads, D head dimension, F SwiGLU width, p patch size. Read from the end:
`DDT` is the model, and the classes above are its parts; `base` turns images into tokens. Source: arXiv 2504.05741 and
its released implementation.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt_fast.config import DDTConfig
from ddt_fast.model.base import DDTBase, Forecast, Rotary


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN's x * (1 + scale) + shift; x (B, N, C), shift and scale (B, 1, C) or (B, N, C)."""
    return x * (1 + scale) + shift


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of x (B, N, H, D) by the angles of `rotary_tables`; float32 inside, x's dtype outside."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6), computed in float32 and cast back, times weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class PatchEmbed(nn.Module):
    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.in_channels * config.patch_size**2, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class TimestepEmbedder(nn.Module):
    """Sinusoids of t itself (t in [0, 1], periods up to 2 pi * 10), then a two-layer MLP."""

    sinusoids = 256
    max_period = 10.0

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.sinusoids, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        half = self.sinusoids // 2
        exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angles = t.float()[:, None] * torch.exp(-math.log(self.max_period) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """One row per class; the last row is the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Self-attention with RMS-normed, rotated queries and keys."""

    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.mlp_hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.mlp_hidden_size, bias=False)
        self.w2 = nn.Linear(config.mlp_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and SwiGLU, each normed, modulated, gated and added. `modulation` comes from adaLN_modulation: (B, 1,
    6C) in the encoder, (B, N, 6C) in the decoder."""

    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size)
        self.mlp = SwiGLU(config)
        self.adaLN_modulation = nn.Sequential(nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def forward(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), cos, sin)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """LayerNorm without affine parameters, modulated, and a Linear; `modulation` is adaLN_modulation(state), (B, N,
    2C)."""

    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(config.hidden_size, config.in_channels * config.patch_size**2)
        self.adaLN_modulation = nn.Sequential(nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DDT(DDTBase):
    """Decoupled Diffusion Transformer: a condition encoder (x, t, y) → state and a velocity decoder (x, state) → v.

    `forward` (in `DDTBase`) embeds t and calls `condition`, `encode_tokens`, `decoder_modulations`, `decode_tokens`.
    """

    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.s_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.final_layer = FinalLayer(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self._initialize()

    def _initialize(self) -> None:
        for embedder in (self.x_embedder, self.s_embedder):
            nn.init.xavier_uniform_(embedder.proj.weight)
            nn.init.zeros_(embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.t_embedder.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        for parameter in self.final_layer.parameters():
            nn.init.zeros_(parameter)

    @property
    def decoder_blocks(self) -> list[Block]:
        return cast(list[Block], self.blocks[self.config.num_encoder_blocks :])

    @property
    def condition_size(self) -> int:
        return self.config.hidden_size

    def condition(self, t_embedding: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        condition = F.silu(t_embedding + self.y_embedder(y)[:, None])
        return condition if out is None else out.copy_(condition)

    def _encode(
        self, tokens: Tensor, t_embedding: Tensor, condition: Tensor, rotary: Rotary, features_after: int | None
    ) -> tuple[Tensor, Tensor | None]:
        s, features = self.s_embedder(tokens), None
        encoder_blocks = cast(list[Block], self.blocks[: self.config.num_encoder_blocks])
        for count, block in enumerate(encoder_blocks, start=1):
            s = self._call(block, s, block.adaLN_modulation(condition), *rotary)
            if count == features_after:
                features = s
        return F.silu(t_embedding + s), features

    def decoder_modulations(self, state: Tensor, out: Tensor | None = None) -> Tensor:
        layers = [block.adaLN_modulation for block in self.decoder_blocks] + [self.final_layer.adaLN_modulation]
        return torch.cat([layer(state) for layer in layers], dim=-1, out=out)

    def decode_tokens(
        self, tokens: Tensor, modulations: Tensor, rotary: Rotary, forecast: Forecast | None = None
    ) -> Tensor:
        if forecast is not None:
            weights, step = forecast
            wide = torch.promote_types(modulations.dtype, weights.dtype)
            weights = weights.index_select(0, step).to(wide).view(-1, 1, 1, 1)
            # Modulations of weight 0 may be anything that an earlier run left there, even NaN.
            combined = torch.where(weights == 0, 0, weights * modulations).sum(0)
            modulations = combined.to(modulations.dtype)
        c = self.config.hidden_size
        *blocks, final = modulations.split([6 * c] * self.config.num_decoder_blocks + [2 * c], dim=-1)
        h = self.x_embedder(tokens)
        for block, modulation in zip(self.decoder_blocks, blocks, strict=True):
            h = self._call(block, h, modulation, *rotary)
        return self.final_layer(h, final)
