"""The times and solver of flow matching as a diffusers scheduler; scheduler_config.json holds `SamplingConfig`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from ddt_fast.checks import require_arguments
from ddt_fast.config import SamplingConfig, Schedule
from ddt_fast.pipeline.component import Component, check_saving, takes_fields_of
from ddt_fast.sampling.plan import SamplingPlan
from ddt_fast.wording import kind_of

_SETTINGS = [setting.name for setting in fields(SamplingConfig)]


@dataclass
class DDTSchedulerOutput(BaseOutput):
    """Attributes: prev_sample, x at the next time, of the same shape, float32."""

    prev_sample: Tensor


class DDTScheduler(SchedulerMixin, Component):  # type: ignore[misc]
    """The default sampling settings of a pipeline; and, for your own loops, one step at a time:

        scheduler.set_timesteps(50)
        for t in scheduler.timesteps:
            x = scheduler.step(velocity(x, t), t, x).prev_sample

    Args: as `SamplingConfig`. Times run from 0, noise, to 1, data. The pipeline uses the settings of guidance and of
        the encoder's refreshes; `step` takes a velocity. So solver "pec" has one history here, where the pipeline keeps
        one for the conditional velocity and one for the guidance difference; and a schedule is the pipeline's alone.

    Raises:
        ValueError: a value is not allowed.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    @takes_fields_of(SamplingConfig)
    def __init__(self, **settings: Any) -> None:
        require_arguments(type(self).__name__, settings, _SETTINGS)
        if isinstance(settings.get("schedule"), Schedule):
            self.register_to_config(schedule=asdict(settings["schedule"]))  # as scheduler_config.json has it
        self.timesteps = torch.empty(0)
        self._plan = SamplingPlan((), 0, 0, 0, 0)
        self._index = 0
        self._velocities: list[Tensor] = []
        self.set_timesteps(self.sampling_config.num_steps)

    def save_pretrained(self, save_directory: str | PathLike[Any], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As diffusers' `SchedulerMixin.save_pretrained`: write scheduler_config.json into the folder. ValueError if an
        argument is unknown, or there is a file of that name; OSError if the folder cannot be written."""
        # diffusers' push_to_hub passes safe_serialization, which is for weights.
        allowed = ("save_directory", "push_to_hub", "subfolder", "safe_serialization")
        folder = check_saving(save_directory, kwargs, *allowed)
        super().save_pretrained(str(folder), push_to_hub, **kwargs)

    @property
    def sampling_config(self) -> SamplingConfig:
        """The settings."""
        return SamplingConfig.saved({name: self.config[name] for name in _SETTINGS})

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Start a run of so many steps (None: the scheduler's own number): set `timesteps` to its times,
        (num_inference_steps,) float32, on the device (None: the CPU)."""
        # `step` uses no refreshes and no schedule, which may be for another number of steps.
        own = replace(self.sampling_config, schedule=None)
        config = own.override(num_steps=num_inference_steps, refresh_every=1)
        self._plan = SamplingPlan.from_config(config)
        self.timesteps = torch.tensor([step.t for step in self._plan.steps], device=device)
        self._index, self._velocities = 0, []

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample, unchanged: flow matching does not scale it."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDTSchedulerOutput | tuple[Tensor]:
        """From x at this time to x at the next. ValueError if a timestep is out of turn, or generators are on another
        device.

        Args:
            model_output: (B, ...) velocity at (sample, timestep), with guidance if you use it.
            timestep: the next of `timesteps`, in order.
            sample: (B, ...) x.
            generator: for the "sde" solver, one or one per sample, on the CPU or on the sample's device; None for
                torch's own on the CPU.
        """
        steps = self._plan.steps
        if self._index >= len(steps) or abs(float(timestep) - steps[self._index].t) > 1e-6:
            due = f"{steps[self._index].t:g}" if self._index < len(steps) else "none, call set_timesteps"
            raise ValueError(f"timestep is {float(timestep):g}; allowed at step {self._index}: {due}")
        coefficients = steps[self._index].coefficients
        self._velocities = [model_output.float(), *self._velocities][: self._plan.velocity_history + 1]
        generators = per_sample(generator, len(sample), sample.device) if coefficients.noise_coefficient else []
        x = coefficients.advance(sample.float(), self._velocities, [], generators)
        self._index += 1
        return DDTSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = t data + (1 - t) noise; data and noise (B, ...), timesteps (B,)."""
        t = timesteps.to(original_samples).view(-1, *[1] * (original_samples.ndim - 1))
        return t * original_samples + (1 - t) * noise

    def __len__(self) -> int:
        return int(self.config["num_steps"])


def per_sample(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int, device: torch.device
) -> list[torch.Generator]:
    """One generator per sample. A single generator serves the samples in turn, so that the first sample does not depend
    on their number; None is torch's default generator on the CPU. ValueError unless there are `count` generators, all
    on the CPU or all on `device`, where samples are drawn."""
    if generator is None:
        generator = torch.default_generator
    generators: list[Any] = list(generator) if isinstance(generator, (list, tuple)) else [generator] * count
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise ValueError(f"generator is {kind_of(one)}; expected torch.Generator, or a list of them")
        if one.device.type != "cpu" and one.device != device:
            own = "" if device.type == "cpu" else f", or one on {device}, where samples are drawn"
            cpu = "torch.Generator('cpu'), whose noise is the same on every machine"
            raise ValueError(f"generator is on {one.device}; expected {cpu}{own}")
    if len(generators) != count:
        raise ValueError(f"{len(generators)} generators for {count} images; expected one, or one per image")
    places = sorted({str(one.device) for one in generators})
    if len(places) > 1:
        raise ValueError(f"generators are on {' and '.join(places)}; expected all on one device")
    return generators
