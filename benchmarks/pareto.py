"""What the sampler's FLOPs buy: error and Fréchet distance against cost over all of its settings, on the digits model.

    python -m benchmarks.pareto --output-dir benchmarks/results

writes pareto.json and pareto.png and prints what to take for a budget.

The truth is the solution of the guided ODE, a fine multistep run that evaluates everything, from the same noise. So the
solver's error, from too few steps, and the shortcuts', from states and guidance differences that are held or forecast,
are on one scale. (`benchmarks.forecast` compares with the run of the same steps that evaluates everything: it sees the
shortcuts' error alone.) Another guidance interval is another ODE with other samples, so intervals are judged by the
Fréchet distance and the class accuracy.

One or two in a hundred samples lie near a fork, go another way after a small push, and make up most of the relative L2
error of all. So the median and the 90% quantile of the samples' own errors stand beside it.

- The grid is screened with a few samples: the error of all, and the median.
- Whatever is near the front there by either, and the settings that have a name, are run again with many samples:
  errors, pixel Fréchet distance, class accuracy. Fronts and recommendations are of these.

A Fréchet distance below the truth's is not a gain: such runs follow the guidance less, which draws digits away from the
real ones' spread. Near the front it differs by little more than noise.

Where guidance sets in between two steps, a solver is off by up to one step's length, right by luck where the bound lies
well. Step counts of the grid (except 10) put the bound 0.3 midway between two steps, where a multistep solver is right.
With the published 250 steps it lies beside one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.report.figures import draw
from benchmarks.report.tables import pareto as pareto_tables
from benchmarks.sampler_errors import (
    BASE,
    MEASURES,
    PUBLISHED,
    DigitsRuns,
    command_parser,
    dominating,
    front,
    kept_samples,
    label,
    near_front,
    recommend,
    sample_errors,
    write_record,
    xl2_tflop,
)
from ddt_fast.checks import require_int
from ddt_fast.command import run_command
from ddt_fast.config import SamplingConfig, Solver, StateForecast
from ddt_fast.files import output_folder
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling.fast import fast_settings

STEPS = (10, 15, 25, 35, 55, 105, 245)
SOLVERS: tuple[tuple[Solver, int], ...] = (("euler", 2), ("lms", 2), ("lms", 3), ("lms", 4))
"""And their orders, which Euler does not read."""

FORECASTS: tuple[StateForecast, ...] = ("linear", "quadratic")
PERIODS = (2, 3, 4, 6, 10, 16)
"""Of the encoder and of guidance."""

MANY_STEPS = 40
"""Beyond which shortcuts are tried with order 3 alone: there orders differ little, and Euler's own error hides a
shortcut's."""

NEAR = 1.15
"""Times the front's error or median, in the screening, up to which settings are run again."""

BUDGETS = (2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 25.0, 50.0, 100.0)
"""TFLOP per image at XL/2, 256 px."""

TOLERANCE = 1.1
"""Times the least error within a budget, up to which the cheapest setting is recommended."""

INTERVALS = ((0.0, 1.0), (0.15, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 0.8), (0.3, 0.6))
COSTS = ("tflop_xl2", "mflop_digits")


def grid(steps: Sequence[int]) -> Iterator[SamplingConfig]:
    """Every solver with everything evaluated, and with shortcuts."""
    for count in steps:
        for solver, order in SOLVERS:
            config = replace(BASE, num_steps=count, solver=solver, order=order)
            yield config
            if count <= MANY_STEPS or (solver, order) == ("lms", 3):
                yield from shortcuts(config)


def shortcuts(config: SamplingConfig) -> Iterator[SamplingConfig]:
    """The encoder, guidance, or both at every K-th step; where both, guidance one notch more rarely, or as often."""
    # Too few refreshes are all noise; where there are very many, the next period does as well for less.
    periods = [p for p in PERIODS if 5 <= config.num_steps / p <= 45]
    few_steps = config.num_steps <= MANY_STEPS
    for i, period in enumerate(periods):
        if few_steps:
            if i == 0:
                # Held values are here for comparison: they lose to forecast ones at every period.
                yield replace(config, refresh_every=period)
                yield replace(config, guidance_every=period)
            yield replace(config, guidance_every=period, guidance_forecast="linear")
        for forecast in FORECASTS:
            once = replace(config, refresh_every=period, state_forecast=forecast)
            yield once
            for guidance in periods[i : i + 2] if few_steps else periods[i + 1 : i + 2]:
                yield replace(once, guidance_every=guidance, guidance_forecast="linear")


def named() -> Iterator[tuple[str, SamplingConfig]]:
    """What people run: as published, the paper's sharing, and --fast."""
    yield "published", PUBLISHED
    yield "published, K 2 held", replace(PUBLISHED, refresh_every=2)
    for steps in (250, 100, 50):
        yield f"--fast, Euler {steps}", fast_settings(replace(PUBLISHED, num_steps=steps))
    for steps in (50, 25):
        config = replace(BASE, num_steps=steps, solver="lms", order=2)
        yield f"multistep 2, {steps}", config
        yield f"--fast, multistep 2, {steps}", fast_settings(config)


def other_intervals() -> Iterator[SamplingConfig]:
    """Multistep with 25 steps, everything evaluated and with shortcuts, in each guidance interval."""
    everything = replace(BASE, num_steps=25, solver="lms", order=3)
    some = replace(everything, refresh_every=2, state_forecast="quadratic")
    for config in (everything, replace(some, guidance_every=2, guidance_forecast="linear")):
        for interval in INTERVALS:
            yield replace(config, guidance_interval=interval)


@dataclass
class Point:
    """Settings, and what pareto.json says of them: costs, errors ("screening_..." of few samples), scores."""

    config: SamplingConfig
    values: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        names = ["num_steps", "solver", "last_step", "refresh_every", "state_forecast", "guidance_every"]
        names += ["guidance_forecast", "guidance_interval", *["order"] * (self.config.solver == "lms")]
        return self.values | {"settings": {name: getattr(self.config, name) for name in names}}


class Measurement:
    """All runs. See `main` for the arguments; attributes: `points` of the grid and the named settings, of which
    `finalists` (numbers) were run with many samples, `intervals`, and `truth`."""

    def __init__(
        self, steps: Sequence[int], screen_samples: int, samples: int, truth_steps: int, keep: Path | None
    ) -> None:
        screen, self._final = DigitsRuns(screen_samples, keep), DigitsRuns(samples, keep)
        fine = replace(BASE, num_steps=truth_steps, solver="lms", order=4)
        half = replace(fine, num_steps=10 * (truth_steps // 20) + 5)
        truth = screen(fine)
        self.points = [self._point(config) for config in grid(steps)]
        for point in tqdm(self.points, unit="setting", desc="screening"):
            errors = sample_errors(screen(point.config), truth)
            point.values |= {f"screening_{name}": error for name, error in errors.items()}
        self.truth: dict[str, Any] = {
            "what": f"{label(fine)}, everything evaluated",
            "own_error": sample_errors(screen(half), truth)["error"],
            "own_error_is": f"relative L2 distance of {half.num_steps} steps from it",
        }
        chosen: set[int] = set()
        for cost in COSTS:
            costs = [point.values[cost] for point in self.points]
            for measure in ("screening_error", "screening_error_median"):
                chosen.update(near_front(costs, [point.values[measure] for point in self.points], NEAR))
        self.finalists = sorted(chosen)
        for name, config in named():
            self.finalists.append(len(self.points))
            self.points.append(self._point(config, name))
        truth = self._final(fine)
        score = self._final.score(truth)
        scores = ("frechet", "accuracy", "frechet_real", "accuracy_real")
        self.truth |= {name: getattr(score, name) for name in scores}
        for number in tqdm(self.finalists, unit="setting", desc="finalists"):
            self._score(self.points[number], truth)
        self.intervals = [self._point(config) for config in other_intervals()]
        for point in tqdm(self.intervals, unit="setting", desc="intervals"):
            self._score(point, None)

    def _point(self, config: SamplingConfig, name: str = "") -> Point:
        plan = SamplingPlan.from_config(config)
        costs = {"tflop_xl2": xl2_tflop(config), "mflop_digits": self._final.flops(plan) / 1e6}
        values = {"name": name} if name else {}
        return Point(config, values | {"network_evaluations": plan.network_evaluations} | costs)

    def _score(self, point: Point, truth: torch.Tensor | None) -> None:
        samples = self._final(point.config)
        score = self._final.score(samples)
        point.values |= {} if truth is None else sample_errors(samples, truth)
        point.values |= {"frechet": score.frechet, "accuracy": score.accuracy}

    def column(self, name: str) -> list[float]:
        """A value of every finalist."""
        return [self.points[number].values[name] for number in self.finalists]

    def fronts(self) -> dict[str, list[int]]:
        """Numbers of points, by loss and cost."""
        return {
            f"{loss} over {cost}": [self.finalists[i] for i in front(self.column(cost), self.column(loss))]
            for loss in (*MEASURES, "frechet")
            for cost in COSTS
        }

    def recommended(self) -> list[dict[str, Any]]:
        """By each measure, every recommended setting once, for the least budget."""
        rows = []
        for measure in MEASURES:
            chosen: dict[int, float] = {}
            for budget in BUDGETS:
                i = recommend(self.column("tflop_xl2"), self.column(measure), budget, TOLERANCE)
                if i is not None:
                    chosen.setdefault(i, budget)
            rows += [
                {"by": measure, "budget_tflop_xl2": budget, "point": self.finalists[i]} for i, budget in chosen.items()
            ]
        return rows

    def better_than_named(self) -> list[dict[str, int | None]]:
        """For every named setting the cheapest that errs no more by any measure, if there is one."""
        rows: list[dict[str, int | None]] = []
        costs = self.column("tflop_xl2")
        for i, number in enumerate(self.finalists):
            if "name" in self.points[number].values:
                better = set.intersection(*(dominating(costs, self.column(measure), i) for measure in MEASURES))
                medians = self.column("error_median")
                cheapest = min(better, key=lambda j: (costs[j], medians[j]), default=None)
                rows.append({"point": number, "cheapest": None if cheapest is None else self.finalists[cheapest]})
        return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, plot, print."""
    parser = command_parser("pareto", __doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="numbers of steps of the grid")
    parser.add_argument("--screen-samples", type=int, default=32, help="samples that the grid is screened with")
    parser.add_argument("--samples", type=int, default=256, help="samples of what is run again; 65 or more")
    parser.add_argument(
        "--truth-steps",
        type=int,
        default=305,
        help="steps of the fine run; an odd multiple of 5 puts the guidance bound 0.3 midway between two",
    )
    options = parser.parse_args(arguments)
    require_int("--screen-samples", options.screen_samples, 1)
    require_int("--samples", options.samples, 65)
    for steps in options.steps:
        require_int("--steps", steps, 1)
    require_int("--truth-steps", options.truth_steps, max(options.steps) + 1)
    path = output_folder(options.output_dir) / "pareto.json"
    record: dict[str, Any] = {"environment": environment()}
    counts = options.steps, options.screen_samples, options.samples, options.truth_steps
    measured = Measurement(*counts, kept_samples(options.keep))
    record |= {
        "screen_samples": options.screen_samples,
        "samples": options.samples,
        "guidance_scale": BASE.guidance_scale,
        "truth": measured.truth,
        "points": [point.as_dict() for point in measured.points],
        "fronts": measured.fronts(),
        "recommended": measured.recommended(),
        "better_than_named": measured.better_than_named(),
        "intervals": [point.as_dict() for point in measured.intervals],
    }
    write_record(path, record)
    draw(path)
    print("\n\n".join(pareto_tables(record)))


if __name__ == "__main__":
    run_command(main)
