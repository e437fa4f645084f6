"""Solvers as pure functions from the times of a run to the coefficients of its steps.

Every solver here is linear in x, the velocities and the noise, so one rule executes them all:

    x_{i+1} = x_coefficient * x_i + sum_k velocity_coefficients[k] * v_{i-k} + noise_coefficient * n,   n ~ N(0, I)

where v_{i-k} is the velocity of k steps ago (k = 0: now).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ddt_fast.sampling.noise import normal


@dataclass(frozen=True)
class StepCoefficients:
    """One solver step, as in the module's equation; velocity_coefficients are newest first."""

    velocity_coefficients: tuple[float, ...]
    x_coefficient: float = 1.0
    noise_coefficient: float = 0.0

    def advance(self, x: Tensor, velocities: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        """x at the next time, from the velocities, newest first, and noise of the generators, one per sample."""
        after = self.x_coefficient * x
        for weight, velocity in zip(self.velocity_coefficients, velocities, strict=False):
            after = after + weight * velocity
        if self.noise_coefficient:
            after = after + self.noise_coefficient * normal(x.shape[1:], generators).to(x.device)
        return after


def euler(times: Sequence[float]) -> list[StepCoefficients]:
    """x += v dt."""
    return [StepCoefficients((after - t,)) for t, after in pairwise(times)]


def linear_multistep(times: Sequence[float], order: int) -> list[StepCoefficients]:
    """The explicit linear multistep method, on times that may be uneven.

    Step i integrates, over [times[i], times[i + 1]], the polynomial through the last `order` velocities (fewer in the
    first steps). The weights sum to the step's length.
    """
    steps = []
    for i in range(len(times) - 1):
        nodes = [times[i - k] for k in range(min(order, i + 1))]
        steps.append(StepCoefficients(lagrange_integrals(nodes, times[i], times[i + 1])))
    return steps


def euler_maruyama(times: Sequence[float], diffusion: Callable[[float], float]) -> list[StepCoefficients]:
    """Euler-Maruyama for dx = (v + w(t) s / 2) dt + sqrt(w(t)) dW, which has the marginals of dx = v dt.

    The score is s = -noise / (1 - t), and noise = x - t v on the path x_t = t data + (1 - t) noise (SiT,
    arXiv 2401.08740, equations 4 and 9, with time running from noise to data). The last step adds no noise.

    Args:
        times: from 0 up to 1.
        diffusion: w(t) on [0, 1).
    """
    steps = []
    for t, after in pairwise(times):
        dt, w = after - t, diffusion(t)
        pull = 0.5 * w * dt / (1 - t)
        noise = math.sqrt(w * dt) if after < 1 else 0.0
        steps.append(StepCoefficients((dt + pull * t,), 1 - pull, noise))
    return steps


DIFFUSIONS: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "sigma": lambda t: 1 - t,
    "sigma_squared": lambda t: (1 - t) ** 2,
    "sine": lambda t: math.sin(math.pi * t) ** 2,
}


def lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> tuple[float, ...]:
    """For each node, the integral over [start, end] of the polynomial that is 1 there and 0 at the other nodes.

    Gauss-Legendre quadrature with two points is exact up to degree 3, and so for up to four nodes.
    """
    if len(nodes) > 4:
        raise ValueError(f"{len(nodes)} nodes; allowed: 1 to 4")
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    basis = [lagrange_weights(nodes, point) for point in points]
    return tuple(half * (a + b) for a, b in zip(*basis, strict=True))


def lagrange_weights(nodes: Sequence[float], t: float) -> tuple[float, ...]:
    """Weights w with sum_k w_k f(nodes[k]) = the value at t of the polynomial through (nodes[k], f(nodes[k]))."""
    return tuple(
        math.prod((t - other) / (node - other) for j, other in enumerate(nodes) if j != i)
        for i, node in enumerate(nodes)
    )
