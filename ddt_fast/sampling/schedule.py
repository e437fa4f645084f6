"""The times of a sampling run, from t = 0 (noise) to t = 1 (data)."""

from itertools import accumulate, pairwise

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


_BEFORE = 0.55  # steps per time before the guidance interval, as a share of those in it
_FIRST, _LAST = 0.8, (0.55, 0.35)  # lengths of the first guided step and of the last two, as shares of an ordinary one


def edged_timesteps(num_steps: int, guided: tuple[float, float] | None, timeshift: float = 1.0) -> tuple[float, ...]:
    """The num_steps + 1 times of a run whose steps begin and end at the bounds of the guidance interval.

    Each part, before, inside and after the interval, is divided by itself: there a multistep solver's polynomials begin
    anew. The last two steps, which no later evaluation corrects, are short, and so is the first with guidance. Shifted
    as in `timesteps`. ValueError if there are fewer steps than parts, or times coincide in float32.

    Args:
        num_steps: solver steps.
        guided: the interval; None without guidance.
        timeshift: above 1, more steps are near the noise.
    """
    low, high = guided or (0.0, 1.0)
    bounds = sorted({0.0, low, high, 1.0})
    edges = [bound * timeshift / (1 - bound + bound * timeshift) for bound in bounds]  # before the shift
    shares = [
        (after - edge) * (_BEFORE if bound < low else 1.0)
        for bound, (edge, after) in zip(bounds, pairwise(edges), strict=False)
    ]
    if num_steps < len(shares):
        raise ValueError(f"num_steps is {num_steps}; expected {len(shares)} or more, one for each part of the times")
    u = [0.0]
    for part, count in enumerate(_apportion(num_steps, shares)):
        lengths = [1.0] * count
        if bounds[part] == low and count > 1:
            lengths[0] = _FIRST
        if part == len(shares) - 1:
            lengths[-2:] = _LAST[-count:]
        scale = (edges[part + 1] - edges[part]) / sum(lengths)
        u += [edges[part] + scale * length for length in accumulate(lengths[:-1])] + [edges[part + 1]]
    shifted = torch.tensor([t / (t + (1 - t) * timeshift) for t in u], dtype=torch.float64).float()
    for bound in bounds:
        shifted[(shifted - bound).abs().argmin()] = bound
    times = tuple(shifted.tolist())
    if any(after <= before for before, after in pairwise(times)):
        raise ValueError(
            f"timeshift {timeshift:g} and guidance_interval {low:g} to {high:g} leave some of {num_steps} steps no "
            "time in float32; use a timeshift nearer to 1, a wider interval or fewer steps"
        )
    return times


def _apportion(total: int, shares: list[float]) -> list[int]:
    """Whole numbers in proportion to the shares, each 1 or more, that sum to the total (at least the number of shares):
    every next one goes where the share per number is largest."""
    counts = [1] * len(shares)
    for _ in range(total - len(shares)):
        counts[max(range(len(shares)), key=lambda part: shares[part] / (counts[part] + 0.5))] += 1
    return counts
