"""Models to measure: random weights, the published sampling run, and gradients by released name."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddt_fast.config import DDTConfig, SamplingConfig
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.sampling.schedule import timesteps

Model = DDT | FusedDDT
PUBLISHED = SamplingConfig(
    num_steps=250, guidance_scale=2.0, guidance_interval=(0.3, 1.0), timeshift=1.0, last_step=0.04
)


def random_model(config: DDTConfig, std: float = 0.02, device: torch.device | str = "cpu") -> DDT:
    """A reference model in which every parameter counts: as initialised, the final layer is zero.

    std: of weights and embeddings. device: where they are drawn, each having numbers of its own.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        model = DDT(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            parameter.normal_(std=std, generator=generator)
    return model


@torch.no_grad()
def compiled_copy(model: FusedDDT) -> FusedDDT:
    """A compiled copy that shares the model's weights."""
    result = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    result.compile_parts()
    return result


def published_run(model: DDT, noise: Tensor, labels: Tensor, config: SamplingConfig) -> Tensor:
    """Euler as published: both branches in one batch of 2B at every step, whether guidance reads them or not;
    noise and result float32."""
    low, high = config.guidance_interval
    x, dtype = noise.clone(), next(model.parameters()).dtype
    y = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    for t, following in pairwise(timesteps(config.num_steps, config.last_step, config.timeshift)):
        velocity, _ = model(torch.cat([x, x]).to(dtype), torch.full((len(y),), t, device=x.device), y)
        cond, uncond = velocity.float().chunk(2)
        scale = config.guidance_scale if low < t < high else 1.0
        x = x + (uncond + scale * (cond - uncond)) * (following - t)
    return x


def lively_std(config: DDTConfig) -> float:
    """Of weights under which a narrow model too depends on its label, its guidance and its state about as much as a
    trained one: at 0.02 it hardly does, and a run with other settings would pass for the right one."""
    return 0.8 * config.hidden_size**-0.5


def released_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The model's gradients by released name: those of merged parameters are split as their weights are, and
    missing ones are zero."""
    weights = [parameter.data for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return model.state_dict()
    finally:
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.data = weight


def as_vector(tensors: dict[str, Tensor]) -> Tensor:
    """All of them end to end, in the order of their names."""
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


def weight_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
