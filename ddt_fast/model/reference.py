"""DDT in plain PyTorch, under the names of the released weights: the definition every faster path is tested against.

Shapes: B batch, N tokens, C hidden size, H heads, D head dimension, F SwiGLU width, p patch size. Read from the end:
`DDT.forward` is the model, the classes above it its parts. Source: arXiv 2504.05741 and its released implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt_fast.config import DDTConfig


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN's x * (1 + scale) + shift; x (B, N, C), shift and scale (B, 1, C) or (B, N, C)."""
    return x * (1 + scale) + shift


def rotary_tables(
    head_dim: int, rows: int, columns: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the 2-D rotary embedding, each (rows * columns, head_dim / 2) float32, one angle a pair.

    Pairs alternate: even pairs turn with the column (x), odd pairs with the row (y), pairs 2k and 2k + 1 at frequency
    10000^(-4k / head_dim). Positions span 0 to 16 whatever the size, so other resolutions see the same range.
    """
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 4, device=device, dtype=torch.float32) / head_dim)
    x = torch.linspace(0, 16, columns, device=device)
    y = torch.linspace(0, 16, rows, device=device)
    y, x = torch.meshgrid(y, x, indexing="ij")
    angles = torch.stack([x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies], dim=-1).flatten(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of x (B, N, H, D) by the angles of `rotary_tables`; float32 inside, x's dtype outside."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def patchify(x: Tensor, config: DDTConfig) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, in_channels, height, width) → its patches (B, N, in_channels * p * p), a token's features in (channel, row,
    column) order, and their `rotary_tables`; ValueError for any other shape."""
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted (B, {config.in_channels}, height, width)")
    config.num_tokens(*x.shape[2:])
    p = config.patch_size
    tokens = F.unfold(x, kernel_size=p, stride=p).transpose(1, 2)
    return tokens, *rotary_tables(config.head_dim, x.shape[2] // p, x.shape[3] // p, device=x.device)


def unpatchify(tokens: Tensor, like: Tensor, config: DDTConfig) -> Tensor:
    """The inverse: (B, N, in_channels * p * p) → an image of the size of `like`."""
    p = config.patch_size
    return F.fold(tokens.transpose(1, 2), like.shape[2:], kernel_size=p, stride=p)


def check_state(state: Tensor, x: Tensor, config: DDTConfig) -> None:
    """ValueError unless `state` is (B, N, C) for x."""
    expected = (x.shape[0], config.num_tokens(*x.shape[2:]), config.hidden_size)
    if state.shape != expected:
        raise ValueError(f"state has shape {tuple(state.shape)}; wanted {expected} for x {tuple(x.shape)}")


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
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class LabelEmbedder(nn.Module):
    """One row a class; the last row is the null class."""

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
    """Attention and SwiGLU, each normed, modulated, gated and added. `modulation` is adaLN_modulation(condition),
    (B, 1, 6C) in the encoder, (B, N, 6C) in the decoder."""

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
    """LayerNorm without affine, modulated; `modulation` is adaLN_modulation(state), (B, N, 2C)."""

    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(config.hidden_size, config.in_channels * config.patch_size**2)
        self.adaLN_modulation = nn.Sequential(nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DDT(nn.Module):
    """Decoupled Diffusion Transformer: a condition encoder (x, t, y) → state and a velocity decoder (x, state) → v.

    The decoder meets t and y only through the state, so everything it derives from the state (`decoder_modulations`)
    can be kept for as long as the state is.
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
    def encoder_blocks(self) -> list[Block]:
        return cast(list[Block], self.blocks[: self.config.num_encoder_blocks])

    @property
    def decoder_blocks(self) -> list[Block]:
        return cast(list[Block], self.blocks[self.config.num_encoder_blocks :])

    def forward(self, x: Tensor, t: Tensor, y: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The velocity at (x, t) for the labels y, and the encoder's state.

        Args:
            x: (B, in_channels, height, width), in the model's dtype; patch_size divides height and width.
            t: (B,) times in [0, 1], 0 noise, 1 data.
            y: (B,) int64 labels, num_classes for the null class.
            state: (B, N, C) from an earlier call: the encoder is skipped and neither t nor y is read.

        Returns:
            velocity, shaped as x, and state (B, N, C).

        Raises:
            ValueError: x or state of the wrong shape.
        """
        if state is None:
            state = self.encode(x, t, y)
        else:
            check_state(state, x, self.config)
        return self.decode(x, self.decoder_modulations(state)), state

    def encode(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The condition encoder: x (B, in_channels, height, width), t (B,), y (B,) → state (B, N, C)."""
        tokens, cos, sin = patchify(x, self.config)
        t_embedding = self.t_embedder(t)[:, None]
        condition = F.silu(t_embedding + self.y_embedder(y)[:, None])
        s = self.s_embedder(tokens)
        for block in self.encoder_blocks:
            s = block(s, block.adaLN_modulation(condition), cos, sin)
        return F.silu(t_embedding + s)

    def decoder_modulations(self, state: Tensor) -> Iterator[Tensor]:
        """What the decoder derives from the state (B, N, C): (B, N, 6C) a block, then (B, N, 2C), made one at a time.

        `list()` of it may be kept and passed to `decode` again and again; all are affine in the state.
        """
        for block in self.decoder_blocks:
            yield block.adaLN_modulation(state)
        yield self.final_layer.adaLN_modulation(state)

    def decode(self, x: Tensor, modulations: Iterable[Tensor]) -> Tensor:
        """The velocity decoder: x (B, in_channels, height, width) and `decoder_modulations` → velocity, shaped as x."""
        tokens, cos, sin = patchify(x, self.config)
        h = self.x_embedder(tokens)
        modulation = iter(modulations)
        for block in self.decoder_blocks:
            h = block(h, next(modulation), cos, sin)
        return unpatchify(self.final_layer(h, next(modulation)), x, self.config)
