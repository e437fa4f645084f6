"""Fit the times and coefficients of a sampling run to one model, by Gauss-Newton through the sampler.

After arXiv 2505.21114 (learned solvers, by DDT's authors); here the start is solver "pec", the guidance difference has
coefficients of its own, and Gauss-Newton, which uses curvature, needs up to sixteen steps.

A run is x_{i+1} = x_i + sum_k a_ik v_{i-k} + (w - 1) sum_k d_ik (difference)_{j-k}. Its `Numbers`, times and
coefficients, follow from parameters that are zero at the solver's own. What is minimised is the mean distance of the
last x from the solution of the ODE, relative to the solution's norm; samples beyond the median have less weight the
farther away they are. Derivatives go backwards through the run, one evaluation of the network at a time: only x,
velocities and differences are kept of all steps. The Hessian is estimated from one random direction of each sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.config import SamplingConfig
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.sampling.plan import SamplingPlan
from ddt_fast.sampling.solvers import corrected_multistep

Vector = NDArray[np.float64]
Rows = list[list[float]]

KEPT = 4
"""Velocities and differences that a step can read: what `ddt_kernels.guided_step` takes."""

_DIFFERENCE = 1e-5  # of a logarithm, for derivatives of the solver's coefficients
_LONGEST_STEP = 0.8  # of a parameter
_TRIALS = 6


class Numbers:
    """The numbers of a run as one vector: times of the steps, coefficients of velocities, then those of differences.

    Parameters, as many: of every step, what is added to the logarithm of its length, before the lengths between two
    edges are scaled to fit there; of every coefficient, what is added to the solver's, in units of the step's length.
    """

    def __init__(self, config: SamplingConfig) -> None:
        """config: solver "pec", everything evaluated, with guidance."""
        steps, self.order = SamplingPlan.from_config(config).steps, config.order
        self.guided = [step.guided for step in steps]
        self.start = [*(step.t for step in steps), 1.0]
        changes = [i for i in range(1, len(steps)) if self.guided[i] != self.guided[i - 1]]
        self.parts = list(pairwise([0, *changes, len(steps)]))
        known = accumulate(self.guided)
        self.lengths = [min(i + 1, KEPT) for i in range(len(steps))]
        self.lengths += [min(count, KEPT) if guided else 0 for count, guided in zip(known, self.guided, strict=True)]
        self.places = [len(steps), *accumulate(self.lengths, initial=len(steps))][1:]  # of the rows in the vector
        self.size = self.places[-1]

    def vector(self, parameters: Vector) -> Vector:
        """The numbers for these parameters."""
        times = self._times(parameters)
        return np.concatenate([times[:-1], self._rows(times) + self._scales(times) * parameters[self.places[0] :]])

    def jacobian(self, parameters: Vector) -> Vector:
        """(numbers, parameters): derivatives of `vector`."""
        count, result = self.places[0], np.zeros((self.size, self.size))
        for k in range(count):
            change = np.zeros(self.size)
            change[k] = _DIFFERENCE
            difference = self.vector(parameters + change) - self.vector(parameters - change)
            result[:, k] = difference / (2 * _DIFFERENCE)
        result[count:, count:] = np.diag(self._scales(self._times(parameters)))
        return result

    def steps(self, vector: Vector) -> tuple[list[float], Rows, Rows]:
        """Times, and coefficients of velocities and of differences for every step."""
        count, values = self.places[0], vector.tolist()
        rows = [values[start:end] for start, end in pairwise(self.places)]
        return values[:count], rows[:count], rows[count:]

    def _times(self, parameters: Vector) -> list[float]:
        lengths = np.diff(self.start) * np.exp(parameters[: self.places[0]])
        times = [0.0]
        for first, end in self.parts:
            low, high, own = self.start[first], self.start[end], lengths[first:end]
            times += [*(low + (high - low) * np.cumsum(own[:-1]) / own.sum()), high]
        return times

    def _rows(self, times: list[float]) -> Vector:
        """The solver's coefficients, filled up with zeros."""
        always = [True] * len(self.guided)
        rows = corrected_multistep(times, self.order, always, always)
        rows += corrected_multistep(times, self.order, self.guided, self.guided)
        return np.array([n for row, size in zip(rows, self.lengths, strict=True) for n in (*row, *[0.0] * KEPT)[:size]])

    def _scales(self, times: list[float]) -> Vector:
        return np.repeat(np.tile(np.diff(times), 2), self.lengths)


@dataclass(frozen=True)
class Batch:
    """Samples to fit to: noise (B, C, H, W) float32, labels (B,), strength w - 1 (B, 1, 1, 1), solution as noise."""

    noise: Tensor
    labels: Tensor
    strength: Tensor
    solution: Tensor

    def residuals(self, x: Tensor) -> Tensor:
        """(B, D): the distance of x from the solution, over the solution's norm."""
        return (x - self.solution).flatten(1) / self.solution.flatten(1).norm(dim=1, keepdim=True)


class Run:
    """A run of a model by `Numbers`, and its derivatives."""

    def __init__(self, model: DDT | FusedDDT, numbers: Numbers) -> None:
        self.model, self.numbers = model, numbers
        self.dtype = next(model.parameters()).dtype

    @torch.no_grad()
    def __call__(self, vector: Vector, batch: Batch) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """x at the end, and in order x before every step, velocities and guidance differences."""
        times, cond, diff = self.numbers.steps(vector)
        x, before, velocities, differences = batch.noise, [], [], []
        for i, guided in enumerate(self.numbers.guided):
            before.append(x)
            velocity, difference = self._evaluate(x, x.new_full((len(x),), times[i]), batch.labels, guided)
            velocities.append(velocity)
            x = x + _combine(cond[i], velocities)
            if difference is not None:
                differences.append(difference)
                x = x + batch.strength * _combine(diff[i], differences)
        return x, before, velocities, differences

    def derivatives(self, vector: Vector, batch: Batch, directions: Callable[[Tensor], Tensor]) -> Tensor:
        """(K, B, numbers) float32: derivatives of the products of the last x with `directions`(x), (K, B, C, H, W)."""
        x, before, velocities, differences = self(vector, batch)
        times, cond, diff = self.numbers.steps(vector)
        back = directions(x)  # derivatives by the x that the loop is at
        zero = torch.zeros_like(back)
        by_velocity, by_difference = [zero] * len(velocities), [zero] * len(differences)
        result = x.new_zeros(*back.shape[:2], self.numbers.size)
        places, count, j = self.numbers.places, len(times), len(differences)
        for i in reversed(range(count)):
            _pass_back(back, cond[i], velocities, by_velocity, i, result[..., places[i] :])
            if self.numbers.guided[i]:
                j -= 1
                own = result[..., places[count + i] :]
                _pass_back(batch.strength * back, diff[i], differences, by_difference, j, own)
            inputs = before[i].clone().requires_grad_(), x.new_full((len(x),), times[i], requires_grad=True)
            with torch.enable_grad():
                velocity, difference = self._evaluate(*inputs, batch.labels, self.numbers.guided[i])
            outputs = (velocity,) if difference is None else (velocity, difference)
            arriving = by_velocity[i : i + 1] + ([] if difference is None else [by_difference[j]])
            for k in range(len(back)):
                one = [value[k] for value in arriving]
                by_x, by_t = torch.autograd.grad(outputs, inputs, one, retain_graph=k < len(back) - 1)
                back[k] += by_x
                result[k, :, i] = by_t
        return result

    def _evaluate(self, x: Tensor, t: Tensor, labels: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """The conditional velocity, and the guidance difference in a guided step, float32."""
        x = x.to(self.dtype)
        if not guided:
            return self.model(x, t, labels)[0].float(), None
        null = torch.full_like(labels, self.model.config.num_classes)
        both = self.model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, null]))[0]
        cond, uncond = both.float().chunk(2)
        return cond, cond - uncond


def _combine(weights: Sequence[float], values: list[Tensor]) -> Tensor:
    """The sum of the last values, newest first, with their weights."""
    total = weights[0] * values[-1]
    for weight, value in zip(weights[1:], values[-2::-1], strict=False):
        total = total + weight * value
    return total


def _pass_back(
    back: Tensor, weights: Sequence[float], values: list[Tensor], by_value: list[Tensor], newest: int, result: Tensor
) -> None:
    """Backwards through sum_k weights[k] values[newest - k]: add to the derivatives by the values, and write those by
    the weights."""
    for k, weight in enumerate(weights):
        result[..., k] = (back * values[newest - k]).flatten(2).sum(2)
        by_value[newest - k] = by_value[newest - k] + weight * back


class Fit:
    """Gauss-Newton with a damping that adapts (Levenberg-Marquardt).

    Args:
        run: the model and the form of its numbers.
        batches: this process's samples.
        total: returns the sum of a float64 tensor over all processes.
        gather: returns the vector of all processes from this one's.
        seed: of the random directions; another one for every process.

    Attributes:
        parameters: the best so far.
        distances: (samples of all processes,) float64, relative distances from the solution there.
    """

    def __init__(
        self,
        run: Run,
        batches: Sequence[Batch],
        total: Callable[[Tensor], Tensor],
        gather: Callable[[Tensor], Tensor],
        seed: int,
    ) -> None:
        self.run, self.batches, self.total, self.gather = run, batches, total, gather
        self.parameters = np.zeros(run.numbers.size)
        self.distances = self._measure(self.parameters)
        self._damping = 1e-2
        self._generator = torch.Generator().manual_seed(seed)

    def iterate(self) -> float:
        """One step of Gauss-Newton; the share of the mean distance that it took off, 0 if no trial was better."""
        hessian, gradient = self._expand()
        loss = self.distances.mean().item()
        for _ in range(_TRIALS):
            scales = np.diag(hessian)
            step = -np.linalg.solve(hessian + np.diag(self._damping * scales + 1e-5 * scales.mean()), gradient)
            parameters = self.parameters + step * min(1.0, _LONGEST_STEP / np.abs(step).max())
            distances = self._measure(parameters)
            gain = loss - distances.mean().item()
            if gain > 0:
                self.parameters, self.distances = parameters, distances
                self._damping = max(self._damping / 4, 1e-5)
                return gain / loss
            self._damping *= 5
        return 0.0

    def _measure(self, parameters: Vector) -> Tensor:
        """The distances, on the CPU."""
        vector = self.run.numbers.vector(parameters)
        found = [batch.residuals(self.run(vector, batch)[0]).norm(dim=1) for batch in self.batches]
        return self.gather(torch.cat(found).double().cpu())

    def _expand(self) -> tuple[Vector, Vector]:
        """The Hessian's estimate and the gradient of the loss, by the parameters."""
        numbers = self.run.numbers
        vector, jacobian = numbers.vector(self.parameters), numbers.jacobian(self.parameters)
        typical = self.distances.median().item()
        sums = torch.zeros(numbers.size + 1, numbers.size, dtype=torch.float64)
        for batch in self.batches:
            seen: list[Any] = []

            def directions(x: Tensor, batch: Batch = batch, seen: list[Any] = seen) -> Tensor:
                residuals = batch.residuals(x)
                random = torch.randn(residuals.shape, generator=self._generator).to(x)
                seen.append(residuals.norm(dim=1))
                norms = batch.solution.flatten(1).norm(dim=1, keepdim=True)
                return (torch.stack([random, residuals]) / norms).unflatten(2, x.shape[1:])

            rows = self.run.derivatives(vector, batch, directions).double().cpu()
            weights = (1 / seen[0].clamp_min(typical)).double().cpu()
            sums[:-1] += torch.einsum("bm,b,bn->mn", rows[0], weights, rows[0])
            sums[-1] += weights @ rows[1]
        sums = self.total(sums)
        return jacobian.T @ sums[:-1].numpy() @ jacobian, sums[-1].numpy() @ jacobian
