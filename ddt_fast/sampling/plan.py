"""A sampling run written out step by step, before any tensor exists.

`SamplingPlan.from_config` decides for every step which branches are evaluated, whether the encoder runs, and with which
weights cached states and guidance differences are combined; the engine only executes. Every saving is therefore
visible, countable and testable here:

- the unconditional branch is evaluated only where guidance needs it: inside the interval, if the scale is not 1;
- the encoder runs only at refreshes. For the unconditional branch it runs only in segments with a guided step (if the
  segment begins unguided, the branch's encoder runs at the refresh, but not its decoder) and, where a forecast begins
  there, in the one or two segments before;
- between refreshes, the decoder's modulations, which are affine in the state, are kept: no step recomputes them.

If both branches are refreshed together (guidance_every 1), they combine their states with the same weights; an
unconditional branch that is evaluated more rarely has a fresh state each time and keeps none.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import numpy as np
import torch

from ddt_fast.config import DDTConfig, SamplingConfig
from ddt_fast.model.flops import model_flops
from ddt_fast.sampling.schedule import edged_timesteps, timesteps
from ddt_fast.sampling.solvers import (
    DIFFUSIONS,
    StepCoefficients,
    corrected_multistep,
    euler,
    euler_maruyama,
    lagrange_weights,
    linear_multistep,
    with_guidance,
)

STATES_IN_FORECAST = {"hold": 1, "linear": 2, "quadratic": 3}


@dataclass(frozen=True)
class BranchStep:
    """What the conditional or unconditional branch does in a step.

    Attributes:
        encode: run the encoder at this step's (x, t); its state becomes the newest cached one.
        decode: run the decoder, for a velocity.
        state_weights: the decoder's state is sum_k state_weights[k] * (k-th newest cached state); they sum to 1.
    """

    encode: bool
    decode: bool
    state_weights: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class PlanStep:
    """One step: from x at time t to x at the next time.

    Attributes:
        t: time of the evaluation, in [0, 1).
        coefficients: the solver's coefficients, with guidance.
        cond, uncond: the two branches; uncond is None if the branch is idle.
    """

    t: float
    coefficients: StepCoefficients
    cond: BranchStep
    uncond: BranchStep | None

    @property
    def guided(self) -> bool:
        """Whether the step reads a guidance difference. If uncond.decode is set, the newest is this step's own."""
        return bool(self.coefficients.difference_coefficients)

    @property
    def branches(self) -> list[BranchStep]:
        """The branches that are not idle."""
        return [self.cond] if self.uncond is None else [self.cond, self.uncond]


@dataclass(frozen=True)
class SamplingPlan:
    """A sampling run as a tuple of steps, and what must be kept between them.

    Attributes:
        steps: in order of execution.
        state_history: the most cached states (or what is affine in them) that a branch needs.
        velocity_history: the most earlier velocities that a step needs.
        difference_history: the most earlier guidance differences that a step needs.
        cached_branches: branches whose modulations are kept from step to step: 2 if the unconditional one is refreshed
            together with the conditional one, else 1.
    """

    steps: tuple[PlanStep, ...]
    state_history: int
    velocity_history: int
    difference_history: int
    cached_branches: int

    @classmethod
    def from_config(cls, config: SamplingConfig) -> Self:
        """The plan for a sampling configuration; ValueError for refresh_steps "dp", which a probe of the model has to
        resolve first (`refresh.schedules.resolve_refresh_steps`)."""
        if config.refresh_steps == "dp":
            raise ValueError(
                'refresh_steps is "dp"; resolve_refresh_steps(model, config, ...) turns it into step numbers'
            )
        times, guided = _times(config)
        refreshes = config.refresh_steps or tuple(range(0, config.num_steps, config.refresh_every))
        decoding = _branch(times, [True] * config.num_steps, refreshes, config.state_forecast)
        cond = [branch for branch in decoding if branch is not None]
        evaluated = _every(guided, config.guidance_every)
        if config.guidance_every == 1:
            uncond = _branch(times, evaluated, refreshes, config.state_forecast, warm_up=True)
        else:
            # A held or extrapolated difference tolerates no unconditional state that is older than its velocity: if
            # this branch is evaluated rarely, its encoder runs each time.
            uncond = _branch(times, evaluated, [i for i, e in enumerate(evaluated) if e], "hold")
        coefficients = _coefficients(config, times, guided, evaluated)
        steps = tuple(map(PlanStep, times, coefficients, cond, uncond))
        branches = [branch for step in steps for branch in step.branches]
        return cls(
            steps=steps,
            state_history=max(len(branch.state_weights) for branch in branches),
            velocity_history=max(len(step.velocity_coefficients) for step in coefficients) - 1,
            difference_history=max(
                max(len(step.difference_coefficients) - is_evaluated, 0)
                for step, is_evaluated in zip(coefficients, evaluated, strict=True)
            ),
            cached_branches=2 if any(guided) and config.guidance_every == 1 else 1,
        )

    @property
    def network_evaluations(self) -> int:
        """Velocities computed per image (NFE): decoder runs of both branches."""
        return sum(branch.decode for step in self.steps for branch in step.branches)

    @property
    def encoder_evaluations(self) -> int:
        """Encoder runs per image, both branches."""
        return sum(branch.encode for step in self.steps for branch in step.branches)

    def cache_bytes(self, model: DDTConfig, height: int, width: int, dtype: torch.dtype) -> int:
        """Bytes per image kept between steps, which is also their peak: decoder modulations, and in float32 earlier
        velocities and guidance differences."""
        per_state = model.num_tokens(height, width) * (6 * model.num_decoder_blocks + 2) * model.hidden_size
        fields = self.velocity_history + self.difference_history
        states = self.state_history * self.cached_branches * per_state * dtype.itemsize
        return states + fields * model.in_channels * height * width * torch.float32.itemsize

    def flops(self, model: DDTConfig, height: int, width: int) -> int:
        """Matrix-multiplication FLOPs per image (1 multiply-add = 2), for a model input of height and width."""
        cost = model_flops(model, height, width)
        return self.encoder_evaluations * (cost.encoder + cost.modulations) + self.network_evaluations * cost.decoder


def _times(config: SamplingConfig) -> tuple[tuple[float, ...], list[bool]]:
    """The times of the steps and the end, and which steps are guided."""
    low, high = (float(np.float32(bound)) for bound in config.guidance_interval)
    has_guidance = config.guidance_scale != 1
    if config.schedule is not None:
        return (*config.schedule.times, 1.0), [has_guidance and bool(row) for row in config.schedule.differences]
    if config.solver == "pec":
        times = edged_timesteps(config.num_steps, (low, high) if has_guidance else None, config.timeshift)
        return times, [has_guidance and low <= t < high for t in times[:-1]]
    times = timesteps(config.num_steps, config.last_step, config.timeshift)
    return times, [has_guidance and low < t < high for t in times[:-1]]


def _coefficients(
    config: SamplingConfig, times: tuple[float, ...], guided: list[bool], evaluated: list[bool]
) -> list[StepCoefficients]:
    """The solver's steps, with guidance."""
    if config.solver == "pec":
        always, schedule = [True] * config.num_steps, config.schedule
        velocities = schedule.velocities if schedule else corrected_multistep(times, config.order, always, always)
        differences = schedule.differences if schedule else corrected_multistep(times, config.order, evaluated, guided)
        strength = config.guidance_scale - 1
        return [
            StepCoefficients(cond, tuple(strength * weight for weight in difference) if is_guided else ())
            for cond, difference, is_guided in zip(velocities, differences, guided, strict=True)
        ]
    history = 2 if config.guidance_forecast == "linear" else 1
    forecasts = _forecast(times, guided, evaluated, history)
    return with_guidance(_solver_steps(config, times), forecasts, evaluated, config.guidance_scale)


def _solver_steps(config: SamplingConfig, times: tuple[float, ...]) -> list[StepCoefficients]:
    if config.solver == "lms":
        return linear_multistep(times, config.order)
    if config.solver == "sde":
        diffusion = DIFFUSIONS[config.diffusion]
        return euler_maruyama(times, lambda t: config.diffusion_scale * diffusion(t))
    return euler(times)


def _every(active: list[bool], period: int) -> list[bool]:
    """The first active step, then every period-th."""
    numbers = accumulate(active)
    return [is_active and (number - 1) % period == 0 for is_active, number in zip(active, numbers, strict=True)]


def _forecast(
    times: tuple[float, ...], needed: list[bool], measured: list[bool], history: int
) -> list[tuple[float, ...]]:
    """For every needed step, the weights of the last `history` measured values, or of as many as there are, newest
    first; () for other steps. A step that measures uses its own value."""
    weights: list[tuple[float, ...]] = []
    nodes: list[float] = []
    for t, is_needed, is_measured in zip(times, needed, measured, strict=False):
        if is_measured:
            nodes = [t, *nodes][:history]
        weights.append(((1.0,) if is_measured else lagrange_weights(nodes, t)) if is_needed else ())
    return weights


def _branch(
    times: tuple[float, ...],
    decoded: list[bool],
    refreshes: tuple[int, ...] | list[int],
    forecast: str,
    warm_up: bool = False,
) -> list[BranchStep | None]:
    """One branch, step by step: encode at the refresh of every segment in which a step decodes; with warm_up, also in
    the segments before the first of them whose states its forecast needs."""
    history = STATES_IN_FORECAST[forecast]
    needed = [any(decoded[start:end]) for start, end in pairwise([*refreshes, len(decoded)])]
    extrapolates = history > 1 and any(decoded[i] for i in range(len(decoded)) if i not in refreshes)
    if warm_up and extrapolates and True in needed:
        first = needed.index(True)
        needed[max(0, first - history + 1) : first] = [True] * min(first, history - 1)
    encoded = [False] * len(decoded)
    for start, is_needed in zip(refreshes, needed, strict=True):
        encoded[start] = is_needed
    weights = _forecast(times, decoded, encoded, history)
    return [
        BranchStep(encode, decode, w or (1.0,)) if encode or decode else None
        for encode, decode, w in zip(encoded, decoded, weights, strict=True)
    ]
