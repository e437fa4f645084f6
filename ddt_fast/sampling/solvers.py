"""Solvers as pure functions from the times of a run to the coefficients of its steps.

Every solver here is linear in x, the velocities and the noise, so one rule executes them all:

    x_{i+1} = x_coefficient * x_i + sum_k velocity_coefficients[k] * v_{i-k}
              + sum_k difference_coefficients[k] * d_k + noise_coefficient * n,   n ~ N(0, I)

where v_{i-k} is the conditional velocity of k steps ago (k = 0: now), and d_k the k-th newest guidance difference
v_cond - v_uncond. `euler`, `linear_multistep` and `euler_maruyama` know one velocity; `with_guidance` makes it of both.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ddt_fast.sampling.noise import normal


@dataclass(frozen=True)
class StepCoefficients:
    """One solver step, as in the module's equation; coefficients are newest first."""

    velocity_coefficients: tuple[float, ...]
    difference_coefficients: tuple[float, ...] = ()
    x_coefficient: float = 1.0
    noise_coefficient: float = 0.0

    def advance(
        self,
        x: Tensor,
        velocities: Sequence[Tensor],
        differences: Sequence[Tensor],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """x at the next time, from velocities and guidance differences, newest first, and noise of the generators, one
        per sample."""
        after = self.x_coefficient * x
        for weights, values in (
            (self.velocity_coefficients, velocities),
            (self.difference_coefficients, differences),
        ):
            for weight, value in zip(weights, values, strict=False):
                after = after + weight * value
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
        steps.append(StepCoefficients((dt + pull * t,), (), 1 - pull, noise))
    return steps


def with_guidance(
    steps: Sequence[StepCoefficients], weights: Sequence[Sequence[float]], evaluated: Sequence[bool], scale: float
) -> list[StepCoefficients]:
    """The steps, with the velocity of step i being v_cond + (scale - 1) sum_k weights[i][k] d_k, d_k as of step i.

    Args:
        steps: the solver's, with at most four velocities each.
        weights: for every step, of the newest differences; () without guidance.
        evaluated: for every step, whether it evaluates a difference.
        scale: w.
    """
    guided, count = [], 0
    shares: list[dict[int, float]] = []  # of the last velocities: of the differences, numbered from the first
    for step, own, is_evaluated in zip(steps, weights, evaluated, strict=True):
        count += is_evaluated
        shares = [{count - 1 - k: (scale - 1) * weight for k, weight in enumerate(own)}, *shares[:3]]
        total: dict[int, float] = {}
        for coefficient, share in zip(step.velocity_coefficients, shares, strict=False):
            for number, weight in share.items():
                total[number] = total.get(number, 0.0) + coefficient * weight
        newest_first = tuple(total.get(number, 0.0) for number in range(count - 1, min(total, default=count) - 1, -1))
        guided.append(replace(step, difference_coefficients=newest_first))
    return guided


def corrected_multistep(
    times: Sequence[float], order: int, evaluated: Sequence[bool], used: Sequence[bool]
) -> list[tuple[float, ...]]:
    """Predict, evaluate, correct: the coefficients of one quantity's values, newest first, () where it has none.

    A step predicts as Adams-Bashforth of `order` does: it integrates the polynomial through the last values. The next
    evaluation corrects that: it adds the integral of the parabola through the newest three values (Adams-Moulton), less
    what was predicted. The evaluation is at the predicted x, and no value is computed twice. A polynomial ends before
    values so close that their rounding errors would be magnified: a step after a very short one has a lower order.

    Args:
        times: of the steps, and the end of the last one; they may be uneven.
        order: values the prediction uses, 1 to 3; fewer at the beginning.
        evaluated: for every step, whether it has a new value.
        used: for every step, whether the quantity moves x there.
    """
    rows: list[tuple[float, ...]] = []
    nodes: list[float] = []  # times of the values, newest first
    predicted: list[tuple[list[float], tuple[float, float]]] = []  # not corrected yet: nodes, and the step's span
    for span, is_evaluated, is_used in zip(pairwise(times), evaluated, used, strict=True):
        integrals = []  # sign, nodes, span
        if is_evaluated:
            nodes = [span[0], *nodes][:4]
            for before, earlier in predicted:
                integrals += [(1, _spread(nodes[:3], earlier), earlier), (-1, before, earlier)]
            predicted = []
        if is_used:
            through = _spread(nodes[:order], span)
            integrals.append((1, through, span))
            predicted.append((through, span))
        row: dict[float, float] = defaultdict(float)
        for sign, through, (start, end) in integrals:
            for node, weight in zip(through, lagrange_integrals(through, start, end), strict=True):
                row[node] += sign * weight
        rows.append(tuple(row[node] for node in nodes[: len(row)]))
    return rows


def _spread(nodes: list[float], span: tuple[float, float]) -> list[float]:
    """The nodes, newest first, up to the first that is closer to the one before than a twentieth of the span."""
    closest = (span[1] - span[0]) / 20
    distances = [newer - older for newer, older in pairwise(nodes)]
    return nodes[: next((i for i, distance in enumerate(distances, 1) if distance < closest), len(nodes))]


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
