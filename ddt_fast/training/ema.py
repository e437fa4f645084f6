"""Exponential moving average of a model's weights."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class EMA:
    """Float32 copies of a model's parameters, updated as ema = d * ema + (1 - d) * weights.

    After n = `num_updates` updates, d is min(decay, (1 + n) / (10 + n)): a young average forgets the initial weights
    quickly. `weights` are the averages by parameter name, sharded as the parameters are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Start from these averages, whole and by the same names, as if they had been updated many times."""
        for name, average in self.weights.items():
            whole = weights[name].to(average.device, average.dtype)
            if isinstance(average, DTensor):
                whole = distribute_tensor(whole, average.device_mesh, average.placements)
            average.copy_(whole)
        self.num_updates = 1_000_000

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the averages; call it once after every optimiser step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = [_local(average) for average in self.weights.values()]
        torch._foreach_lerp_(averages, [_local(parameter) for parameter in model.parameters()], 1 - decay)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
