"""Everything that a run continues from: a nested dictionary of tensors, and a few numbers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddt_fast.config import DDTConfig
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.weights import CLASS_TABLE, read_weight_sets
from ddt_fast.training.ema import EMA
from ddt_fast.training.model import TrainingModel
from ddt_fast.wording import plural, tell


@dataclass
class TrainingState:
    """What training changes: float32 weights, the average of the denoiser's, the optimiser's moments, the number of
    steps done. Random generators are not part of it: every step seeds its own by its number."""

    masters: TrainingModel
    ema: EMA
    optimizer: torch.optim.AdamW
    step: int = 0

    def tensors(self) -> dict[str, Any]:
        """The tensors themselves, not copies, by parameter name; sharded ones stay sharded."""
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
        """REPA's projector, whole, on the CPU; None without REPA. All processes call it together."""
        if self.masters.projector is None:
            return None
        weights = self.masters.projector.state_dict()
        return {name: _whole(tensor).detach().to("cpu", copy=True) for name, tensor in weights.items()}

    def averaged_model(self) -> DDT | None:
        """The reference model with the averaged weights, whole, on the CPU, in the first process; None in the others.
        All processes call it together."""
        averages: dict[str, Tensor] = {}
        for name, average in self.ema.weights.items():
            whole = _whole(average)
            if dist.get_rank() == 0:
                averages[name] = whole.detach().to("cpu", copy=True)
        if not averages:
            return None
        denoiser = self.masters.denoiser
        with torch.device("meta"):
            model = DDT(denoiser.config)
        weights = released_weights(denoiser.config, isinstance(denoiser, FusedDDT), averages)
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)


def read_start(checkpoint: str, model: TrainingModel) -> dict[str, Tensor]:
    """Load the weights that training starts from into the model, and REPA's projector if both have one; return the
    averages to start from, by the names of model.denoiser's parameters.

    A released .ckpt holds trained weights and their average; if there is only an average, as in most model folders, the
    weights start there too. Where it has another number of classes, their embeddings stay the model's own, and only
    the null class's is taken. What was found is reported on stderr. ValueError if this is not a checkpoint, or has
    another architecture.

    checkpoint: a model folder, .safetensors, .ckpt, or hub id. model: on any device, not sharded yet.
    """
    sets = read_weight_sets(checkpoint, model.denoiser.config, any_classes=True)
    averaged, trained = sets.ema or sets.raw, sets.raw or sets.ema
    found = ["trained weights" if sets.raw else "averaged weights only: training starts there too"]
    if sets.raw:
        found.append("their average" if sets.ema else "no average: it starts there too")
    denoiser = model.denoiser
    there, here = len(averaged[CLASS_TABLE]) - 1, denoiser.config.num_classes
    if there != here:
        found.append(f"{plural(there, 'class')} there, {here} here: fresh class embeddings")
        own = denoiser.state_dict()[CLASS_TABLE].detach().clone()
        averaged, trained = (_with_classes(own, weights) for weights in (averaged, trained))
    denoiser.load_state_dict(averaged)
    average = {name: parameter.detach().clone() for name, parameter in denoiser.named_parameters()}
    denoiser.load_state_dict(trained)
    if model.projector is not None:
        found.append("REPA's projector" if sets.projector else "no projector for REPA: a fresh one")
        if sets.projector:
            model.projector.load_state_dict(sets.projector)
    tell(f"starting from {checkpoint}: {', '.join(found)}")
    return average


def _with_classes(own: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with a model's own embeddings of its classes; the null class's stays."""
    return {**weights, CLASS_TABLE: torch.cat([own[:-1], weights[CLASS_TABLE][-1:].to(own)])}


def released_weights(config: DDTConfig, fused: bool, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by the names in `DDT` and released checkpoints, from those by its own names, which are merged
    in a `fused` one. ValueError if the parameters have other names."""
    with torch.device("meta"):
        model = FusedDDT(config) if fused else DDT(config)
    names = [name for name, _ in model.named_parameters()]
    if parameters.keys() != set(names):
        raise ValueError(f"{sorted(parameters.keys() ^ set(names))[0]} is missing, or is not a weight of such a model")
    for name in names:
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, nn.Parameter(parameters[name], requires_grad=False))
    return model.state_dict()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
