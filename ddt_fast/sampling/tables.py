"""A plan as the engine runs it: what a step does, and what it reads.

What a step *does* is a `StepKind`. A plan has few kinds, and each may be captured as one CUDA graph. What a step
*reads* (its time, coefficients and weights) is a row of a table, found by a step counter on the same device: no kernel
launch depends on the step.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ddt_fast.sampling.plan import SamplingPlan
from ddt_kernels import guided_step_coefficients


@dataclass(frozen=True)
class StepKind:
    """What a step does.

    The modulations of `SamplingPlan.cached_branches` branches are kept in one slot for each state that the forecast
    reads; a refresh overwrites the oldest.

    Attributes:
        encode: branches to refresh, into `slot`: 0, 1 (conditional) or 2 (both).
        slot: the slot of the newest modulations; 0 if nothing depends on it.
        decode: branches to decode from kept modulations: 1 or 2.
        forecast: decode from a weighted sum of all slots, not from `slot` alone.
        fresh_uncond: evaluate the unconditional branch, encoder and decoder, and keep nothing of it.
        guided: the step reads a guidance difference.
    """

    encode: int
    slot: int
    decode: int
    forecast: bool
    fresh_uncond: bool
    guided: bool


@dataclass
class StepTables:
    """What steps read, one row per step, on the device.

    Attributes:
        times: (steps,) float32.
        coefficients: (steps, 10) float32, `ddt_kernels.guided_step`'s.
        slot_weights: (steps, slots) float32: decode with sum_k slot_weights[step, k] * (modulations in slot k).
    """

    times: Tensor
    coefficients: Tensor
    slot_weights: Tensor


def step_kinds(plan: SamplingPlan) -> list[StepKind]:
    """The kind of every step of a plan."""
    kinds = []
    for step, newest in zip(plan.steps, _newest_slots(plan), strict=True):
        # Branches that are refreshed together read their states with the same weights.
        together, decoded = plan.cached_branches == 2, step.uncond is not None and step.uncond.decode
        forecast = len(step.cond.state_weights) > 1
        kinds.append(
            StepKind(
                encode=step.cond.encode * (2 if together and step.uncond is not None else 1),
                slot=0 if forecast else newest,
                decode=2 if together and decoded else 1,
                forecast=forecast,
                fresh_uncond=step.uncond is not None and not together,
                guided=step.guided,
            )
        )
    return kinds


def step_tables(plan: SamplingPlan, device: torch.device) -> StepTables:
    """The tables of a plan, on `device`."""
    slot_weights = torch.zeros(len(plan.steps), plan.state_history)
    for row, step, newest in zip(slot_weights, plan.steps, _newest_slots(plan), strict=True):
        for age, weight in enumerate(step.cond.state_weights):
            row[(newest - age) % plan.state_history] = weight
    coefficients = [
        guided_step_coefficients(
            step.coefficients.velocity_coefficients,
            step.coefficients.difference_coefficients,
            step.coefficients.x_coefficient,
            step.coefficients.noise_coefficient,
        )
        for step in plan.steps
    ]
    return StepTables(
        times=torch.tensor([step.t for step in plan.steps], device=device),
        coefficients=torch.tensor(coefficients, dtype=torch.float32, device=device),
        slot_weights=slot_weights.to(device),
    )


def _newest_slots(plan: SamplingPlan) -> list[int]:
    """For every step, the slot of the newest modulations: refreshes take the slots in turn."""
    refreshes = accumulate(step.cond.encode for step in plan.steps)
    return [(count - 1) % plan.state_history for count in refreshes]
