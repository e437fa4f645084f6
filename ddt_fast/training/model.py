"""The model to train: a DDT and, for REPA, the projector of its features."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ddt_fast.model.base import DDTBase
from ddt_fast.model.fused import FusedDDT
from ddt_fast.training.repa import Projector


class TrainingModel(nn.Module):
    """A DDT whose forward pass also returns what REPA compares with DINOv2's features: the output of encoder block
    `block`, counted from 1, through the projector; None without one. It computes in `dtype`, to which x is cast."""

    def __init__(self, denoiser: DDTBase, projector: Projector | None = None, block: int | None = 8) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.projector = projector
        self.block = None if projector is None else block
        self.dtype = torch.float32

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, channels, height, width), t (B,) float32, y (B,) int64 → velocity as x, projected features or None."""
        velocity, _, features = self.denoiser.forward_with_features(x.to(self.dtype), t, y, self.block)
        return velocity, None if self.projector is None else self.projector(features)

    def compile_parts(self) -> None:
        """Compile in place: a FusedDDT in parts, whose blocks share one compiled function; the reference as a whole."""
        if isinstance(self.denoiser, FusedDDT):
            self.denoiser.compile_parts()
        else:
            self.compile(dynamic=False)

    def shardable_parts(self) -> list[nn.Module]:
        """The modules that FSDP gathers one after another, inner ones first; each is used only by calling it."""
        blocks = cast(nn.ModuleList, self.denoiser.blocks)
        projector: list[Any] = [] if self.projector is None else [self.projector]
        if isinstance(self.denoiser, FusedDDT):
            # Not decoder_modulation: a function that may be compiled calls it, and FSDP's hooks cannot be compiled.
            return [*blocks, self.denoiser.encoder_modulation, *projector]
        # A block of the reference gets its modulation from outside.
        parts = [getattr(block, name) for block in blocks for name in ("attn", "mlp", "adaLN_modulation")]
        return [*parts, *projector]
