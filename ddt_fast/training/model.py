"""The model to train: a DDT and, for REPA, the projector of its features."""

from typing import cast

import torch
from torch import Tensor, nn

from ddt_fast.model.base import DDTBase
from ddt_fast.model.fused import FusedDDT
from ddt_fast.model.reference import DDT
from ddt_fast.training.repa import Projector


class TrainingModel(nn.Module):
    """A DDT whose forward pass also returns what REPA compares with DINOv2's features.

    Args:
        denoiser: the DDT.
        projector: projects the output of one of its encoder blocks; None without REPA.
        block: that block, counted from 1.

    Attributes:
        dtype: dtype of the computation; inputs are cast to it, except for the time.
    """

    def __init__(self, denoiser: DDTBase, projector: Projector | None = None, block: int = 8) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.projector = projector
        self.block = block
        self.dtype = torch.float32

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, channels, height, width), t (B,) float32, y (B,) int64 → velocity as x, projected features or None."""
        block = None if self.projector is None else self.block
        velocity, _, features = self.denoiser.forward_with_features(x.to(self.dtype), t, y, block)
        return velocity, None if self.projector is None else self.projector(features)

    def compile_parts(self) -> None:
        """Compile in place: a FusedDDT in parts, whose blocks share one compiled function; the reference as a whole."""
        if isinstance(self.denoiser, FusedDDT):
            self.denoiser.compile_parts()
        else:
            self.compile(dynamic=False)

    def shardable_parts(self) -> list[nn.Module]:
        """The modules that FSDP gathers one after another, inner ones first; each is used only by calling it."""
        blocks = list(cast(nn.ModuleList, self.denoiser.blocks))
        parts: list[nn.Module] = []
        if isinstance(self.denoiser, DDT):
            for block in blocks:
                # A block's modulation is computed outside the block.
                parts += [cast(nn.Module, getattr(block, name)) for name in ("attn", "mlp", "adaLN_modulation")]
        else:
            denoiser = cast(FusedDDT, self.denoiser)
            # Not decoder_modulation: a function that may be compiled calls it, and FSDP's hooks cannot be compiled.
            parts = [*blocks, denoiser.encoder_modulation]
        return parts if self.projector is None else [*parts, self.projector]
