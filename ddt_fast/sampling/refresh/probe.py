"""The probe run: draw a few samples with a refresh at every step, and measure how similar the states are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.checks import require_int
from ddt_fast.config import SamplingConfig
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.plan import SamplingPlan

_STATE_BYTES = 2 * 2**30
_GRAM_BYTES = 2**28


@dataclass(frozen=True)
class Probe:
    """The result of a probe run.

    Attributes:
        times: (T,) the time of every step.
        similarity: (T, T) float64, mean cosine similarity of the states of two steps.
    """

    times: tuple[float, ...]
    similarity: NDArray[np.float64]


@torch.no_grad()
def probe_states(
    model: DDT | FusedDDT,
    config: SamplingConfig,
    height: int,
    width: int,
    num_samples: int = 8,
    progress: Callable[[], object] | None = None,
) -> Probe:
    """Draw samples with the settings of `config`, but evaluate every step in full, and compare the states of all steps.

    Sample i starts from the noise of seed i; labels are spread evenly over the classes. The similarity is the cosine of
    two states of the same token, averaged over the tokens of all samples. If guidance shares the unconditional states
    too (scale not 1, guidance_every 1), it is averaged over both branches at all steps, as in the released DDT.

    The states of all steps are kept on the model's device, in its dtype, for as many samples at a time as fit in 2 GiB,
    at least one. ValueError if num_samples is below 1, the size does not fit the model, or states are not finite.

    Args:
        model: the model, on the device and in the dtype to compute with.
        config: the sampling settings; refreshes and forecasts are ignored.
        height, width: size of the model's input.
        num_samples: 1 or more.
        progress: called after every step of every batch, `probe_calls` times in all.
    """
    plan = _full_plan(config)
    shape = (model.config.in_channels, height, width)
    batch_size = _batch_size(model, config, height, width, num_samples)
    labels = spread_labels(num_samples, model.config.num_classes)
    total = np.zeros((len(plan.steps), len(plan.steps)))
    tokens = 0
    for start in range(0, num_samples, batch_size):
        seeds = range(start, min(start + batch_size, num_samples))
        states = _run(model, plan, labels[start : seeds.stop], shape, seeds, _shares_both(config), progress)
        total += _summed_cosines(states)
        tokens += states.shape[1]
    return Probe(tuple(step.t for step in plan.steps), total / tokens)


def probe_calls(model: DDT | FusedDDT, config: SamplingConfig, height: int, width: int, num_samples: int = 8) -> int:
    """How often `probe_states` calls its progress."""
    return config.num_steps * -(-num_samples // _batch_size(model, config, height, width, num_samples))


def _full_plan(config: SamplingConfig) -> SamplingPlan:
    held: dict[str, Any] = {"state_forecast": "hold", "guidance_every": 1, "guidance_forecast": "hold"}
    return SamplingPlan.from_config(replace(config, refresh_every=1, refresh_steps=None, num_refreshes=None, **held))


def _shares_both(config: SamplingConfig) -> bool:
    """Whether the unconditional branch reuses states too; one evaluated only at every M-th step has fresh states."""
    return config.guidance_scale != 1 and config.guidance_every == 1


def _batch_size(model: DDT | FusedDDT, config: SamplingConfig, height: int, width: int, num_samples: int) -> int:
    require_int("num_samples", num_samples, 1)
    branches = 2 if _shares_both(config) else 1
    state = model.config.num_tokens(height, width) * model.config.hidden_size * next(model.parameters()).element_size()
    return min(num_samples, max(1, _STATE_BYTES // (config.num_steps * branches * state)))


def _run(
    model: DDT | FusedDDT,
    plan: SamplingPlan,
    labels: Tensor,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    both: bool,
    progress: Callable[[], object] | None,
) -> Tensor:
    """The states (T, tokens of all samples and branches, C) of one batch."""
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    x, generators = seeded_noise(seeds, shape)
    x, labels = x.to(device), labels.to(device)
    null = torch.full_like(labels, model.config.num_classes)
    tokens = (1 + both) * len(x) * model.config.num_tokens(*shape[1:])
    states = torch.empty(len(plan.steps), tokens, model.config.hidden_size, dtype=dtype, device=device)
    velocities: list[Tensor] = []
    differences: list[Tensor] = []
    for i, step in enumerate(plan.steps):
        x_in, t = x.to(dtype), torch.full((len(x),), step.t, device=device)
        v, state = model(x_in, t, labels)
        found = [state]
        velocities = [v.float(), *velocities][: plan.velocity_history + 1]
        if step.uncond is not None:
            unguided, state = model(x_in, t, null)
            differences = [v.float() - unguided.float(), *differences][: plan.difference_history + 1]
        elif both:
            state = model.encode(x_in, t, null)
        if both:
            found.append(state)
        torch.cat([state.flatten(0, 1) for state in found], out=states[i])
        x = step.coefficients.advance(x, velocities, differences, generators)
        if progress is not None:
            progress()
    return states


def spread_labels(count: int, num_classes: int) -> Tensor:
    """(count,) int64 labels, spread evenly over the classes."""
    return torch.arange(count) * num_classes // count


def _summed_cosines(states: Tensor) -> NDArray[np.float64]:
    """(T, T): the cosines of the states (T, P, C) of every two steps, summed over the P tokens. In float64, because a
    forecast's error is a small difference of such sums."""
    num_steps, _, width = states.shape
    total = torch.zeros(num_steps, num_steps, dtype=torch.float64, device=states.device)
    for part in states.split(max(1, _GRAM_BYTES // (num_steps * width * 8)), dim=1):
        directions = torch.nn.functional.normalize(part.double(), dim=-1).flatten(1)
        total += directions @ directions.T
    broken = (~total.diagonal().isfinite()).nonzero()
    if len(broken):
        raise ValueError(f"the state of step {int(broken[0])} is not finite; check the weights and the settings")
    return total.cpu().numpy()
