"""Executes sampling plans."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ddt_fast.config import SamplingConfig
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.sampling.plan import BranchStep, SamplingPlan

Progress = Callable[[int, Tensor], object]


@torch.no_grad()
def sample(
    model: DDT | FusedDDT,
    noise: Tensor,
    labels: Tensor,
    config: SamplingConfig,
    *,
    generators: Sequence[torch.Generator] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw samples: integrate the model's velocity from noise (t = 0) to data (t = 1).

    Args:
        model: on the device and in the dtype to compute in.
        noise: (B, in_channels, height, width), standard normal.
        labels: (B,) int64, 0 to num_classes - 1.
        config: the sampling settings.
        generators: one CPU generator a sample, from which the "sde" solver draws; unused by the other solvers.
        progress: called after every step with the number of steps done and the current x (B, ..) float32.

    Returns:
        Samples shaped as noise, float32, on the model's device; latents for a latent model, [-1, 1] pixels otherwise.

    Raises:
        ValueError: noise or labels of the wrong shape, labels out of range, not one generator a sample.
    """
    plan = SamplingPlan.from_config(config)
    parameter = next(model.parameters())
    _check_inputs(model, noise, labels, plan, generators)
    if config.cuda_graphs:
        _warn_eager(parameter.device)
    x = noise.to(parameter.device, torch.float32)
    labels = labels.to(parameter.device)
    cond = _Branch(model, labels, plan)
    uncond = _Branch(model, torch.full_like(labels, model.config.num_classes), plan)
    velocities: list[Tensor] = []
    differences: list[Tensor] = []
    for i, step in enumerate(plan.steps):
        v = cond.run(step.cond, x, step.t)
        v_uncond = uncond.run(step.uncond, x, step.t) if step.uncond else None
        assert v is not None
        if v_uncond is not None:
            differences = [v - v_uncond, *differences][: plan.difference_history]
        if step.guided:
            v = v + (step.guidance_scale - 1) * _combine(step.difference_weights, differences)
        velocities = [v, *velocities][: plan.velocity_history]
        c = step.coefficients
        x = c.x_coefficient * x + _combine(c.velocity_coefficients, velocities)
        if c.noise_coefficient:
            assert generators is not None
            x = x + c.noise_coefficient * normal(x.shape[1:], generators).to(x.device)
        if progress is not None:
            progress(i + 1, x)
    return x


def normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, (len(generators), *shape) float32 on the CPU; each sample from its own CPU generator."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


class _Branch:
    """The conditional or the unconditional half of a run: its labels and what it keeps between refreshes."""

    def __init__(self, model: DDT | FusedDDT, labels: Tensor, plan: SamplingPlan) -> None:
        self.model = model
        self.labels = labels
        self.history = plan.state_history
        self.reuse = plan.reuses_states
        self.modulations: list[Iterable[Tensor]] = []

    def run(self, step: BranchStep, x: Tensor, t: float) -> Tensor | None:
        """The velocity (B, ..) in float32, or None where the step only encodes."""
        dtype = next(self.model.parameters()).dtype
        x = x.to(dtype)
        if step.encode:
            times = torch.full((x.shape[0],), t, device=x.device)
            fresh = self.model.decoder_modulations(self.model.encode(x, times, self.labels))
            # Nothing kept: each modulation is made when its block reads it and freed after.
            self.modulations = [list(fresh) if self.reuse else fresh, *self.modulations][: self.history]
        if not step.decode:
            return None
        if len(step.state_weights) == 1:
            return self.model.decode(x, self.modulations[0]).float()
        # Modulations are affine in the state and the weights sum to 1, so this is the modulation of the forecast state.
        forecast = (_combine(step.state_weights, per_layer) for per_layer in zip(*self.modulations, strict=True))
        return self.model.decode(x, forecast).float()


def _combine(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """sum_k weights[k] * values[k]; there may be more values than weights."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=False):
        total = total + weight * value
    return total


def _warn_eager(device: torch.device) -> None:
    reason = "this engine has none yet" if device.type == "cuda" else f"the model is on {device.type}, not on CUDA"
    warnings.warn(f"cuda_graphs asked for, but {reason}; sampling eagerly", stacklevel=4)


def _check_inputs(
    model: DDT | FusedDDT,
    noise: Tensor,
    labels: Tensor,
    plan: SamplingPlan,
    generators: Sequence[torch.Generator] | None,
) -> None:
    channels, classes = model.config.in_channels, model.config.num_classes
    if noise.ndim != 4 or noise.shape[0] < 1 or noise.shape[1] != channels:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; wanted (B, {channels}, height, width), B 1 or more")
    model.config.num_tokens(*noise.shape[2:])
    if labels.shape != noise.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}; wanted ({noise.shape[0]},) torch.int64")
    if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}; allowed: 0 to {classes - 1}")
    stochastic = any(step.coefficients.noise_coefficient for step in plan.steps)
    if stochastic and (generators is None or len(generators) != noise.shape[0]):
        count = 0 if generators is None else len(generators)
        raise ValueError(f"the sde solver has {count} generators for {noise.shape[0]} samples; wanted one each")
