"""Everything a run continues from, as one nested dictionary of tensors and a few numbers beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ddt_fast.model.fused import FusedDDT
from ddt_fast.model.reference import DDT
from ddt_fast.training.ema import EMA
from ddt_fast.training.trained import TrainedDDT


@dataclass
class TrainingState:
    """What training changes: weights, their average, the optimiser's moments. Randomness is none of it: every step
    draws from a generator that its number seeds.

    Attributes:
        masters: the trained weights, float32.
        ema: averages of the denoiser's.
        optimizer: AdamW over all of masters' parameters.
        step: steps done.
    """

    masters: TrainedDDT
    ema: EMA
    optimizer: torch.optim.AdamW
    step: int = 0

    def tensors(self) -> dict[str, Any]:
        """The tensors themselves, not copies, by parameter names; sharded ones stay so."""
        for parameter in self.masters.parameters():
            if not self.optimizer.state[parameter]:
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        named = dict(self.masters.named_parameters())
        return {
            "weights": {name: parameter.detach() for name, parameter in named.items()},
            "ema": dict(self.ema.weights),
            "optimizer": {name: dict(self.optimizer.state[parameter]) for name, parameter in named.items()},
        }

    def projector(self) -> dict[str, Tensor] | None:
        """REPA's projector, whole, on the CPU; None without REPA. All processes must call it together."""
        if self.masters.projector is None:
            return None
        weights = self.masters.projector.state_dict()
        return {name: _whole(tensor).detach().to("cpu", copy=True) for name, tensor in weights.items()}

    def averaged_model(self) -> DDT | None:
        """The reference model with the averaged weights, whole, on the CPU, in the first process; None in the others.

        All processes must call it together.
        """
        first = dist.get_rank() == 0
        denoiser = self.masters.denoiser
        with torch.device("meta"):
            reference = DDT(denoiser.config)
            model = FusedDDT(denoiser.config) if isinstance(denoiser, FusedDDT) else reference
        if first:
            model.to_empty(device="cpu")
        for average, parameter in zip(self.ema.weights.values(), model.parameters(), strict=True):
            whole = _whole(average)
            if first:
                with torch.no_grad():
                    parameter.copy_(whole)
        if not first:
            return None
        if model is not reference:
            reference.load_state_dict(model.state_dict(), assign=True)
        return reference.eval().requires_grad_(False)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
