"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

ModelType = TypeVar("ModelType", bound=nn.Module)


class EMA(Generic[ModelType]):
    """Keeps `model`, a float32 copy of the trained one, at ema = d * ema + (1 - d) * weights.

    After n updates d is min(decay, (1 + n) / (10 + n)): a young average forgets the initial weights, a grown one has
    the constant decay.
    """

    def __init__(self, model: ModelType, decay: float) -> None:
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the trained weights in; once after every optimiser step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
