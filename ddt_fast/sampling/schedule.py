"""The times of a sampling run, from t = 0 (noise) to t = 1 (data)."""

from itertools import pairwise

import torch


def timesteps(num_steps: int, last_step: float | None = None, timeshift: float = 1.0) -> tuple[float, ...]:
    """The num_steps + 1 times of a run; step i goes from times[i] to times[i + 1].

    They are linspace(0, 1 - last_step, num_steps) and 1, shifted by t / (t + (1 - t) timeshift), in float32 as in the
    released sampler: whether a step lies inside a guidance interval depends on these exact numbers. ValueError if times
    coincide in float32.

    Args:
        num_steps: solver steps.
        last_step: length of the final step before the shift; None is 1 / num_steps.
        timeshift: above 1, more steps are near the noise.
    """
    if last_step is None:
        last_step = 1.0 / num_steps
    t = torch.cat([torch.linspace(0.0, 1.0 - last_step, num_steps), torch.ones(1)])
    times: tuple[float, ...] = tuple((t / (t + (1 - t) * timeshift)).tolist())
    if any(after <= before for before, after in pairwise(times)):
        raise ValueError(
            f"timeshift {timeshift:g} and last_step {last_step:g} leave some of {num_steps} steps no time in float32; "
            "use a timeshift nearer to 1, a longer last step or fewer steps"
        )
    return times
