"""Matrix-multiplication FLOPs of a DDT (1 multiply-add = 2 FLOPs), for plans, MFU and rooflines."""

from __future__ import annotations

from dataclasses import dataclass

from ddt_fast.config import DDTConfig


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one image through each part of the model, per run of that part.

    Attributes:
        encoder: patch embedding, (t, y) embedding and the encoder blocks.
        modulations: all the decoder derives from a state: six chunks a block, two for the final layer, per token.
        decoder: patch embedding, the decoder blocks and the final layer, modulations given.
    """

    encoder: int
    modulations: int
    decoder: int

    @property
    def total(self) -> int:
        """One full forward."""
        return self.encoder + self.modulations + self.decoder


def model_flops(config: DDTConfig, height: int, width: int) -> ModelFlops:
    """FLOPs of one (height, width) image or latent; ValueError when patch_size does not divide it."""
    n, c, f = config.num_tokens(height, width), config.hidden_size, config.mlp_hidden_size
    patch = 2 * n * config.in_channels * config.patch_size**2 * c
    block = 2 * n * (4 * c * c + 3 * c * f) + 4 * n * n * c
    conditioning = 2 * (256 * c + c * c)
    return ModelFlops(
        encoder=patch + conditioning + config.num_encoder_blocks * (block + 2 * 6 * c * c),
        modulations=2 * n * c * (6 * config.num_decoder_blocks + 2) * c,
        decoder=2 * patch + config.num_decoder_blocks * block,
    )
