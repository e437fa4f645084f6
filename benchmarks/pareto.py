"""What the sampler's FLOPs buy: error and Fréchet distance against cost over all of its settings, on the digits model.

    python -m benchmarks.pareto --output-dir benchmarks/results

writes pareto.json and pareto.png and prints what to take for a budget.

The truth is the solution of the guided ODE, a fine multistep run that evaluates everything, from the same noise. So the
solver's error, from too few steps, and the shortcuts', from states and guidance differences that are held or forecast,
are on one scale. (`benchmarks.forecast` compares with the run of the same steps that evaluates everything: it sees the
shortcuts' error alone.) Another guidance interval is another ODE with other samples: an error against this truth would
say nothing of it, so intervals are judged by the Fréchet distance and the class accuracy.

- The grid is screened with a few samples: relative L2 error of the final samples.
- Whatever is near the front there, and the settings that have a name, are run again with many samples: error, pixel
  Fréchet distance, class accuracy. Fronts and recommendations are of these. Errors of few samples and of many do not
  compare: one or two in a hundred samples lie near a fork, go another way after a small push, and make up most of the
  error, so that it says more of them than of the typical sample.

A Fréchet distance below the truth's is no gain: such runs follow the guidance less, which draws digits away from the
real ones' spread. Near the front it differs by little more than noise.

Where guidance sets in between two steps, a solver is off by up to one step's length, right by luck where the bound lies
well. Step counts of the grid (but 10) put the bound 0.3 midway between two steps, where a multistep solver is right:
what is compared is then not luck. With the published 250 steps it lies beside one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cpu_sampling import relative_error
from benchmarks.digits_runs import DigitsRuns, digits_model, xl2_flops
from benchmarks.environment import environment
from benchmarks.fronts import dominating, front, near_front, recommend
from benchmarks.pareto_figure import plot
from benchmarks.tables import table, write_record
from ddt_fast.checks import require_int
from ddt_fast.command import CommandParser, run_command
from ddt_fast.config import SamplingConfig, Solver, StateForecast
from ddt_fast.files import output_folder
from ddt_fast.model import FusedDDT
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling.fast import fast_settings

PUBLISHED = PRESETS["xl2_256"].sampling
BASE = replace(PUBLISHED, last_step=None)
"""Even steps: the published last one is ten times as long as the others, for the solver's error alone a bad choice."""

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
"""Times the front's error, in the screening, up to which settings are run again."""

BUDGETS = (2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 25.0, 50.0, 100.0)
"""TFLOP per image at XL/2, 256 px."""

TOLERANCE = 1.1
"""Times the least error within a budget, up to which the cheapest setting is recommended."""

INTERVALS = ((0.0, 1.0), (0.15, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 0.8), (0.3, 0.6))


@dataclass
class Point:
    """A setting, what it costs per image, and how far its samples are from the truth.

    Attributes:
        config: the setting.
        name: of those that are known by one; else empty.
        tflop_xl2: at XL/2, 256 px.
        mflop_digits: of the digits model.
        screening_error, error: relative L2, of few samples and of many; None where not measured.
        frechet, accuracy: `DigitsScore`'s, of many samples.
    """

    config: SamplingConfig
    name: str
    network_evaluations: int
    tflop_xl2: float
    mflop_digits: float
    screening_error: float | None = None
    error: float | None = None
    frechet: float | None = None
    accuracy: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; what was not measured is left out."""
        c = self.config
        names = ("num_steps", "solver", "order", "last_step", "refresh_every", "state_forecast", "guidance_every")
        settings = {name: getattr(c, name) for name in (*names, "guidance_forecast", "guidance_interval")}
        if c.solver != "lms":
            del settings["order"]
        values = {name: value for name, value in vars(self).items() if name != "config" and value not in (None, "")}
        return values | {"settings": settings}


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


def label(config: SamplingConfig) -> str:
    """A setting in a few words."""
    solver = "Euler" if config.solver == "euler" else f"multistep {config.order}"
    words = [solver, f"{config.num_steps} steps"]
    if config.refresh_every > 1:
        words.append(f"K {config.refresh_every} {config.state_forecast}")
    if config.guidance_every > 1:
        words.append(f"M {config.guidance_every} {config.guidance_forecast}")
    return ", ".join(words)


class Measurement:
    """All of it.

    Args:
        steps: of the grid.
        screen_samples, samples: of the screening, and of what is run again (65 or more).
        truth_steps: of the fine run; an odd multiple of 5 puts the guidance bound 0.3 midway between two.

    Attributes:
        points: of the grid and the named settings.
        intervals: some settings in other guidance intervals.
        truth: what the truth is, and how far one of half the steps is from it.
        scores: Fréchet distance and accuracy of the truth, and of real digits.
    """

    def __init__(self, steps: Sequence[int], screen_samples: int, samples: int, truth_steps: int) -> None:
        # Not compiled: settings differ in the shapes of what they keep, and each would be compiled anew.
        model = FusedDDT.from_reference(digits_model())
        self._screen, self._final = DigitsRuns(model, screen_samples), DigitsRuns(model, samples)
        fine = replace(BASE, num_steps=truth_steps, solver="lms", order=4)
        half = replace(fine, num_steps=10 * (truth_steps // 20) + 5)
        truth = self._screen(fine)
        self.truth = {
            "what": f"{label(fine)}, everything evaluated",
            "own_error": relative_error(self._screen(half), truth),
            "own_error_is": f"relative L2 distance of {half.num_steps} steps from it",
        }
        self.points = [self._point(config) for config in grid(steps)]
        for point in tqdm(self.points, unit="setting", desc="screening"):
            point.screening_error = relative_error(self._screen(point.config), truth)
        self.points += [self._point(config, name) for name, config in named()]
        truth = self._final(fine)
        score = self._final.score(truth)
        self.scores = {
            "frechet": score.frechet,
            "accuracy": score.accuracy,
            "frechet_real": score.frechet_real,
            "accuracy_real": score.accuracy_real,
        }
        for point in tqdm(self._finalists(), unit="setting", desc="finalists"):
            self._score(point, truth)
        self.intervals = [self._point(config) for config in self._other_intervals()]
        for point in tqdm(self.intervals, unit="setting", desc="intervals"):
            self._score(point, None)

    def _point(self, config: SamplingConfig, name: str = "") -> Point:
        plan = SamplingPlan.from_config(config)
        flops = xl2_flops(plan) / 1e12, self._final.flops(plan) / 1e6
        return Point(config, name, plan.network_evaluations, *flops)

    def _finalists(self) -> list[Point]:
        """Near the front of the screening by either cost, or named."""
        screened = [point for point in self.points if point.screening_error is not None]
        errors = [_known(point.screening_error) for point in screened]
        chosen = {i for costs in _both_costs(screened) for i in near_front(costs, errors, NEAR)}
        return [screened[i] for i in sorted(chosen)] + [point for point in self.points if point.name]

    def _score(self, point: Point, truth: torch.Tensor | None) -> None:
        samples = self._final(point.config)
        score = self._final.score(samples)
        point.error = None if truth is None else relative_error(samples, truth)
        point.frechet, point.accuracy = score.frechet, score.accuracy

    def _other_intervals(self) -> Iterator[SamplingConfig]:
        """Multistep with 25 steps, everything evaluated and with shortcuts, in each interval."""
        everything = replace(BASE, num_steps=25, solver="lms", order=3)
        some = replace(
            everything, refresh_every=2, state_forecast="quadratic", guidance_every=2, guidance_forecast="linear"
        )
        for config in (everything, some):
            for interval in INTERVALS:
                yield replace(config, guidance_interval=interval)

    @property
    def finalists(self) -> list[Point]:
        """The points that were run with many samples."""
        return [point for point in self.points if point.error is not None]


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _both_costs(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.tflop_xl2 for point in points], [point.mflop_digits for point in points]


def fronts(finalists: Sequence[Point]) -> dict[str, list[int]]:
    """Fronts, as numbers of finalists, by loss and cost."""
    losses = {"error": [_known(p.error) for p in finalists], "frechet": [_known(p.frechet) for p in finalists]}
    costs = dict(zip(("tflop_xl2", "mflop_digits"), _both_costs(finalists), strict=True))
    return {f"{loss} over {cost}": front(costs[cost], losses[loss]) for loss in losses for cost in costs}


def recommended(finalists: Sequence[Point]) -> list[tuple[float, int]]:
    """(budget in TFLOP per image at XL/2 256 px, number of a finalist), a setting once, for the least budget."""
    costs, errors = _both_costs(finalists)[0], [_known(p.error) for p in finalists]
    chosen: dict[int, float] = {}
    for budget in BUDGETS:
        index = recommend(costs, errors, budget, TOLERANCE)
        if index is not None:
            chosen.setdefault(index, budget)
    return [(budget, index) for index, budget in chosen.items()]


def better_than_named(finalists: Sequence[Point]) -> list[tuple[int, int | None, int | None]]:
    """(a named finalist, the one of least error that costs no more, the cheapest that errs no more), None where it is
    on the front itself."""
    costs, errors = _both_costs(finalists)[0], [_known(p.error) for p in finalists]
    rows: list[tuple[int, int | None, int | None]] = []
    for i, point in enumerate(finalists):
        if point.name:
            better = dominating(costs, errors, i)
            cheapest = min(better, key=lambda j: costs[j], default=None)
            rows.append((i, better[0] if better else None, cheapest))
    return rows


def report(measurement: Measurement) -> str:
    """The tables."""
    points = measurement.finalists
    published = next(p for p in points if p.name == "published")

    def row(point: Point) -> list[object]:
        accuracy = f"{_known(point.accuracy):.1%}"
        return [label(point.config), point.tflop_xl2, point.error, point.frechet, accuracy]

    measures = ["TFLOP per image", "error", "Fréchet", "accuracy"]
    chosen = [[f"{budget:g}", *row(points[i])] for budget, i in recommended(points)]
    compared = []
    for i, least, cheapest in better_than_named(points):
        best = "on the front" if least is None else "{}: {:.2g} at {:.3g}".format(*_short(points[least]))
        less = "" if cheapest is None else "{}: {:.2g} at {:.3g}".format(*_short(points[cheapest]))
        compared.append([points[i].name, *row(points[i])[1:], best, less])
    intervals = [
        [f"{p.config.guidance_interval[0]:g} to {p.config.guidance_interval[1]:g}", *row(p)[:2], *row(p)[3:]]
        for p in measurement.intervals
    ]
    truth, scores = measurement.truth, measurement.scores
    return "\n\n".join(
        [
            f"Truth: {truth['what']} (own error about {truth['own_error']:.1g}); Fréchet distance "
            f"{scores['frechet']:.3f}, class accuracy {scores['accuracy']:.1%}. TFLOP at XL/2, 256 px, where the "
            f"published setting takes {published.tflop_xl2:.1f}.",
            f"Recommended: the cheapest within {TOLERANCE:g} times the least error that a budget affords\n\n"
            + table(["budget, TFLOP", "setting", *measures], chosen),
            "What people run, and what beats it\n\n"
            + table(["name", *measures, "least error for no more FLOPs", "fewest FLOPs for no more error"], compared),
            "Guidance intervals: other ODEs, judged by their samples\n\n"
            + table(["interval", "setting", "TFLOP per image", "Fréchet", "accuracy"], intervals),
        ]
    )


def _short(point: Point) -> tuple[str, float, float]:
    return point.name or label(point.config), _known(point.error), point.tflop_xl2


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, plot, print."""
    parser = CommandParser(prog="python -m benchmarks.pareto", description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="benchmarks/results")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="numbers of steps of the grid")
    parser.add_argument("--screen-samples", type=int, default=32, help="samples that the grid is screened with")
    parser.add_argument("--samples", type=int, default=256, help="samples of what is run again; 65 or more")
    parser.add_argument("--truth-steps", type=int, default=305, help="steps of the fine run")
    options = parser.parse_args(arguments)
    require_int("--screen-samples", options.screen_samples, 1)
    require_int("--samples", options.samples, 65)
    for steps in options.steps:
        require_int("--steps", steps, 1)
    require_int("--truth-steps", options.truth_steps, max(options.steps) + 1)
    folder = output_folder(options.output_dir)
    record: dict[str, Any] = {"environment": environment()}
    measurement = Measurement(options.steps, options.screen_samples, options.samples, options.truth_steps)
    finalists = measurement.finalists
    number = {id(point): i for i, point in enumerate(measurement.points)}
    record |= {
        "screen_samples": options.screen_samples,
        "samples": options.samples,
        "guidance_scale": BASE.guidance_scale,
        "truth": measurement.truth | measurement.scores,
        "points": [point.as_dict() for point in measurement.points],
        "fronts": {name: [number[id(finalists[i])] for i in indices] for name, indices in fronts(finalists).items()},
        "recommended": [
            {"budget_tflop_xl2": budget, "point": number[id(finalists[i])]} for budget, i in recommended(finalists)
        ],
        "intervals": [point.as_dict() for point in measurement.intervals],
    }
    write_record(folder / "pareto.json", record)
    plot(record, folder / "pareto.png")
    print(report(measurement))


if __name__ == "__main__":
    run_command(main)
