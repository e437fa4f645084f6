"""What every DDT shares: images outside, tokens inside, and the steps that samplers call one by one.

Shapes: B batch, N tokens, C hidden size, p patch size; W_e and W_d, widths of the encoder's condition and of the
decoder's modulations. Source: arXiv 2504.05741.
"""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddt_fast.config import DDTConfig

Rotary = tuple[Tensor, Tensor]
"""`rotary_tables`: cos and sin."""

Forecast = tuple[Tensor, Tensor]
"""Weights (steps, K) float32 of K kept modulations, and the number of the step, an integer tensor (1,)."""


class DDTBase(nn.Module):
    """A condition encoder (x, t, y) → state and a velocity decoder (x, state) → v.

    The decoder sees t and y only through the state, so everything it derives from the state (`decoder_modulations`)
    can be kept as long as the state; the encoder's own modulations (`condition`) depend only on t and y.
    """

    config: DDTConfig
    t_embedder: nn.Module
    gradient_checkpointing: bool = False
    """With gradients, keep only the inputs of the blocks, and run each block again in the backward pass: less memory, a
    third more work."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The velocity at (x, t) for the labels y, shaped like x, and the encoder's state, (B, N, C). ValueError if x
        or state has the wrong shape.

        Args:
            x: (B, in_channels, height, width), in the model's dtype; patch_size divides height and width.
            t: (B,) times in [0, 1], 0 noise, 1 data.
            y: (B,) int64 labels, num_classes for the null class.
            state: from an earlier call: the encoder is skipped, and t and y are not read.
        """
        if state is None:
            state = self.encode(x, t, y)
        else:
            check_state(state, x, self.config)
        return self.decode(x, self.decoder_modulations(state)), state

    def forward_with_features(
        self, x: Tensor, t: Tensor, y: Tensor, block: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`forward`, and the output of an encoder block, (B, N, C), for representation alignment (REPA, arXiv
        2410.06940). block: 1 to num_encoder_blocks, or None for none."""
        state, features = self._encode_image(x, t, y, block)
        return self.decode(x, self.decoder_modulations(state)), state, features

    def encode(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The condition encoder: x (B, in_channels, height, width), t (B,), y (B,) → state (B, N, C)."""
        return self._encode_image(x, t, y, None)[0]

    def _encode_image(self, x: Tensor, t: Tensor, y: Tensor, block: int | None) -> tuple[Tensor, Tensor | None]:
        t_embedding = self.t_embedder(t)[:, None]
        tokens = patchify(x, self.config)
        return self._encode(tokens, t_embedding, self.condition(t_embedding, y), self.rotary(x), block)

    def decode(self, x: Tensor, modulations: Tensor) -> Tensor:
        """The velocity decoder: x (B, in_channels, height, width), `decoder_modulations` → velocity, shaped like x."""
        return unpatchify(self.decode_tokens(patchify(x, self.config), modulations, self.rotary(x)), x, self.config)

    def rotary(self, x: Tensor) -> Rotary:
        """The rotary tables for images of x's size, on x's device."""
        p = self.config.patch_size
        return rotary_tables(self.config.head_dim, x.shape[2] // p, x.shape[3] // p, device=x.device)

    @property
    @abstractmethod
    def condition_size(self) -> int:
        """W_e."""

    @property
    def modulation_size(self) -> int:
        """W_d = (6 decoder blocks + 2) C."""
        return (6 * self.config.num_decoder_blocks + 2) * self.config.hidden_size

    @abstractmethod
    def condition(self, t_embedding: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        """What the encoder derives from t and y alone: t_embedding (B, 1, C), from `t_embedder`, y (B,) → (B, 1, W_e),
        written to `out`, for inference, if given."""

    def encode_tokens(self, tokens: Tensor, t_embedding: Tensor, condition: Tensor, rotary: Rotary) -> Tensor:
        """The condition encoder on `patchify`'s tokens (B, N, in_channels p p), t_embedding (B or 1, 1, C) and
        `condition` (B, 1, W_e) → state (B, N, C)."""
        return self._encode(tokens, t_embedding, condition, rotary, None)[0]

    @abstractmethod
    def _encode(
        self, tokens: Tensor, t_embedding: Tensor, condition: Tensor, rotary: Rotary, features_after: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """`encode_tokens`, and the tokens after `features_after` blocks, if given."""

    @abstractmethod
    def decoder_modulations(self, state: Tensor, out: Tensor | None = None) -> Tensor:
        """All that the decoder derives from the state (B, N, C), and affine in it: (B, N, W_d), six chunks per block
        and then two for the final layer, which may be kept and used many times. Written to `out`, contiguous, for
        inference, if given."""

    @abstractmethod
    def decode_tokens(
        self, tokens: Tensor, modulations: Tensor, rotary: Rotary, forecast: Forecast | None = None
    ) -> Tensor:
        """The velocity decoder on `patchify`'s tokens of x (B, N, in_channels p p) and modulations (B, N, W_d) → the
        velocity's tokens, shaped like x's.

        forecast: decode with sum_k weights[step, k] modulations[k], of K kept ones (K, B, N, W_d), without terms of
        weight 0; for inference. If the weights sum to 1, these are the modulations of the same combination of states.
        """

    def _call(self, block: nn.Module, *arguments: Any) -> Any:
        """block(*arguments), with gradient checkpointing if it is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)


def rotary_tables(head_dim: int, rows: int, columns: int, device: torch.device | str | None = None) -> Rotary:
    """cos and sin of the 2-D rotary embedding, each (rows * columns, head_dim / 2) float32, one angle per pair.

    Pairs alternate: even pairs turn with the column (x), odd pairs with the row (y), and pairs 2k and 2k + 1 have
    frequency 10000^(-4k / head_dim). Positions span 0 to 16 at every size, so all resolutions have the same range.
    """
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 4, device=device, dtype=torch.float32) / head_dim)
    x = torch.linspace(0, 16, columns, device=device)
    y = torch.linspace(0, 16, rows, device=device)
    y, x = torch.meshgrid(y, x, indexing="ij")
    angles = torch.stack([x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies], dim=-1).flatten(1)
    return angles.cos(), angles.sin()


def patchify(x: Tensor, config: DDTConfig) -> Tensor:
    """x (B, in_channels, height, width) → its patches (B, N, in_channels * p * p), with features in (channel, row,
    column) order; ValueError for any other shape."""
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, {config.in_channels}, height, width)")
    config.num_tokens(*x.shape[2:])
    return F.unfold(x, kernel_size=config.patch_size, stride=config.patch_size).transpose(1, 2)


def unpatchify(tokens: Tensor, like: Tensor, config: DDTConfig) -> Tensor:
    """The inverse of `patchify`: (B, N, in_channels * p * p) → an image with the size of `like`."""
    p = config.patch_size
    return F.fold(tokens.transpose(1, 2), like.shape[2:], kernel_size=p, stride=p)


def check_state(state: Tensor, x: Tensor, config: DDTConfig) -> None:
    """ValueError unless `state` is (B, N, C) for x."""
    expected = (x.shape[0], config.num_tokens(*x.shape[2:]), config.hidden_size)
    if state.shape != expected:
        raise ValueError(f"state has shape {tuple(state.shape)}; expected {expected} for x {tuple(x.shape)}")
