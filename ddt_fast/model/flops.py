"""Matrix-multiplication FLOPs of a DDT (1 multiply-add = 2 FLOPs), for plans, MFU and rooflines."""

from dataclasses import dataclass

from ddt_fast.config import DDTConfig


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per image of each part of the model, per run of the part."""

    encoder: int
    """Patch embedding, (t, y) embedding and the encoder blocks."""
    modulations: int
    """What the decoder derives from a state: per token, six chunks for a block and two for the final layer."""
    decoder: int
    """Patch embedding, the decoder blocks and the final layer, without the modulations."""

    @property
    def total(self) -> int:
        """FLOPs of a full forward pass."""
        return self.encoder + self.modulations + self.decoder


def model_flops(config: DDTConfig, height: int, width: int) -> ModelFlops:
    """FLOPs for a (height, width) image or latent; ValueError if patch_size does not divide it."""
    n, c, f = config.num_tokens(height, width), config.hidden_size, config.mlp_hidden_size
    patch = 2 * n * config.in_channels * config.patch_size**2 * c
    block = 2 * n * (4 * c * c + 3 * c * f) + 4 * n * n * c
    conditioning = 2 * (256 * c + c * c)
    return ModelFlops(
        encoder=patch + conditioning + config.num_encoder_blocks * (block + 2 * 6 * c * c),
        modulations=2 * n * c * (6 * config.num_decoder_blocks + 2) * c,
        decoder=2 * patch + config.num_decoder_blocks * block,
    )
