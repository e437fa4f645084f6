"""The times and solver of flow matching as a diffusers scheduler; scheduler_config.json holds `SamplingConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from ddt_fast.config import Diffusion, GuidanceForecast, SamplingConfig, Solver, StateForecast
from ddt_fast.sampling.noise import normal
from ddt_fast.sampling.plan import SamplingPlan


@dataclass
class DDTSchedulerOutput(BaseOutput):
    """Attributes: prev_sample, x at the next time, shaped as it was, float32."""

    prev_sample: Tensor


class DDTScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """How samples are drawn, unless a call of the pipeline says otherwise; and one step after another for own loops:

        scheduler.set_timesteps(50)
        for t in scheduler.timesteps:
            x = scheduler.step(velocity(x, t), t, x).prev_sample

    Args: as `SamplingConfig`. Times run from 0, noise, to 1, data. The settings of guidance and of the encoder's
        refreshes concern the pipeline; `step` is handed a velocity.

    Raises:
        ValueError: a value that is not allowed.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_steps: int = 250,
        guidance_scale: float = 2.0,
        guidance_interval: Sequence[float] = (0.3, 1.0),
        timeshift: float = 1.0,
        last_step: float | None = 0.04,
        solver: Solver = "euler",
        order: int = 2,
        diffusion: Diffusion = "sigma",
        diffusion_scale: float = 1.0,
        refresh_every: int = 1,
        refresh_steps: Sequence[int] | Literal["dp"] | None = None,
        num_refreshes: int | None = None,
        state_forecast: StateForecast = "hold",
        guidance_every: int = 1,
        guidance_forecast: GuidanceForecast = "hold",
        cuda_graphs: bool = False,
    ) -> None:
        self.timesteps = torch.empty(0)
        self._plan = SamplingPlan((), 0, 0, 0, 0)
        self._index = 0
        self._velocities: list[Tensor] = []
        self.set_timesteps(self.sampling_config.num_steps)

    @property
    def sampling_config(self) -> SamplingConfig:
        """The settings."""
        return SamplingConfig(**{field.name: self.config[field.name] for field in fields(SamplingConfig)})

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Start a run: `timesteps` become its times, (num_inference_steps,) float32, on the device.

        Args:
            num_inference_steps: None for the scheduler's own number.
            device: None for the CPU.
        """
        # Of the settings only those of times and solver matter to `step`.
        own = {name: self.config[name] for name in ("timeshift", "last_step", "solver", "order")}
        noise = {name: self.config[name] for name in ("diffusion", "diffusion_scale")}
        steps = self.config["num_steps"] if num_inference_steps is None else num_inference_steps
        self._plan = SamplingPlan.from_config(SamplingConfig(num_steps=steps, **own, **noise))
        self.timesteps = torch.tensor([step.t for step in self._plan.steps], device=device)
        self._index, self._velocities = 0, []

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is: flow matching scales nothing."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDTSchedulerOutput | tuple[Tensor]:
        """From x at this time to x at the next.

        Args:
            model_output: (B, ...) velocity at (sample, timestep), guided where guidance is wanted.
            timestep: the next one of `timesteps`; steps are taken in their order.
            sample: (B, ...) x.
            generator: CPU generators of the "sde" solver, one or one a sample; None for torch's own.

        Raises:
            ValueError: a timestep out of turn.
        """
        steps = self._plan.steps
        if self._index >= len(steps) or abs(float(timestep) - steps[self._index].t) > 1e-6:
            due = f"{steps[self._index].t:g}" if self._index < len(steps) else "none, call set_timesteps"
            raise ValueError(f"timestep is {float(timestep):g}; allowed at step {self._index}: {due}")
        coefficients = steps[self._index].coefficients
        self._velocities = [model_output.float(), *self._velocities][: self._plan.velocity_history]
        x = coefficients.x_coefficient * sample.float()
        for weight, velocity in zip(coefficients.velocity_coefficients, self._velocities, strict=False):
            x = x + weight * velocity
        if coefficients.noise_coefficient:
            generators = per_sample(generator, len(sample))
            x = x + coefficients.noise_coefficient * normal(sample.shape[1:], generators).to(x.device)
        self._index += 1
        return DDTSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = t data + (1 - t) noise; data and noise (B, ...), timesteps (B,)."""
        t = timesteps.to(original_samples).view(-1, *[1] * (original_samples.ndim - 1))
        return t * original_samples + (1 - t) * noise

    def __len__(self) -> int:
        return int(self.config["num_steps"])


def per_sample(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """One CPU generator a sample. One for all of them is drawn from for one sample after the other, so that the first
    sample is the same whatever their number; None is torch's default generator.

    Raises:
        ValueError: another number of generators, or one that is not on the CPU.
    """
    if generator is None:
        generator = torch.default_generator
    if not isinstance(generator, (torch.Generator, list, tuple)):
        raise ValueError(f"generator is a {type(generator).__name__}; wanted torch.Generator, or a list of them")
    generators = [generator] * count if isinstance(generator, torch.Generator) else list(generator)
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise ValueError(f"generator is a {type(one).__name__}; wanted torch.Generator, one or one per image")
        if one.device.type != "cpu":
            raise ValueError(
                f"generator is on {one.device}; wanted torch.Generator('cpu'), whose noise is the same on every machine"
            )
    if len(generators) != count:
        raise ValueError(f"{len(generators)} generators for {count} images; wanted one, or one per image")
    return generators
