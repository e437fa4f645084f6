"""What the sampler's FLOPs buy: error and Fréchet distance against cost over all of its settings, on the digits model.

    python -m benchmarks.pareto --output-dir benchmarks/results

writes pareto.json and pareto.png and prints what to take for a budget.

The truth is the solution of the guided ODE, a fine multistep run that evaluates everything, from the same noise. So the
solver's error, from too few steps, and the shortcuts', from states and guidance differences that are held or forecast,
are on one scale. (`benchmarks.forecast` compares with the run of the same steps that evaluates everything: it sees the
shortcuts' error alone.) Another guidance interval is another ODE with other samples: an error against this truth would
say nothing of it, so intervals are judged by the Fréchet distance and the class accuracy.

One or two in a hundred samples lie near a fork, go another way after a small push, and make up most of the relative L2
error of all: it says more of them than of the typical sample. So the median and the 90% quantile of the samples' own
errors stand beside it.

- The grid is screened with a few samples: the error of all, and the median.
- Whatever is near the front there by either, and the settings that have a name, are run again with many samples:
  errors, pixel Fréchet distance, class accuracy. Fronts and recommendations are of these.

A Fréchet distance below the truth's is no gain: such runs follow the guidance less, which draws digits away from the
real ones' spread. Near the front it differs by little more than noise.

Where guidance sets in between two steps, a solver is off by up to one step's length, right by luck where the bound lies
well. Step counts of the grid (but 10) put the bound 0.3 midway between two steps, where a multistep solver is right:
what is compared is then not luck. With the published 250 steps it lies beside one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.digits_runs import (
    KEEP_HELP,
    DigitsRuns,
    SampleErrors,
    digits_model,
    kept_samples,
    sample_errors,
    xl2_flops,
)
from benchmarks.environment import environment
from benchmarks.fronts import dominating, front, near_front, recommend
from benchmarks.pareto_figure import plot
from benchmarks.pareto_settings import BASE, MEASURES, STEPS, grid, label, named
from benchmarks.report.files import ResultsFile
from benchmarks.report.other_tables import pareto as pareto_tables
from benchmarks.tables import write_record
from ddt_fast.checks import require_int
from ddt_fast.command import CommandParser, run_command
from ddt_fast.config import SamplingConfig
from ddt_fast.files import output_folder
from ddt_fast.model import FusedDDT
from ddt_fast.sampling import SamplingPlan

NEAR = 1.15
"""Times the front's error or median, in the screening, up to which settings are run again."""

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
        screening: errors of few samples.
        errors: of many; None where not measured.
        frechet, accuracy: `DigitsScore`'s, of many samples.
    """

    config: SamplingConfig
    name: str
    network_evaluations: int
    tflop_xl2: float
    mflop_digits: float
    screening: SampleErrors | None = None
    errors: SampleErrors | None = None
    frechet: float | None = None
    accuracy: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; what was not measured is left out."""
        c = self.config
        names = ("num_steps", "solver", "order", "last_step", "refresh_every", "state_forecast", "guidance_every")
        settings = {name: getattr(c, name) for name in (*names, "guidance_forecast", "guidance_interval")}
        if c.solver != "lms":
            del settings["order"]
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, SampleErrors):
                prefix = "screening_" if name == "screening" else ""
                values |= {prefix + measure: error for measure, error in asdict(value).items()}
            elif name != "config" and value not in (None, ""):
                values[name] = value
        return values | {"settings": settings}

    def loss(self, name: str) -> float:
        """Of MEASURES, or "frechet", of many samples."""
        return _known(self.frechet) if name == "frechet" else getattr(self.errors, name)


class Measurement:
    """All of it.

    Args:
        steps: of the grid.
        screen_samples, samples: of the screening, and of what is run again (65 or more).
        truth_steps: of the fine run; an odd multiple of 5 puts the guidance bound 0.3 midway between two.
        keep: as `DigitsRuns` takes it.

    Attributes:
        points: of the grid and the named settings.
        intervals: some settings in other guidance intervals.
        truth: what the truth is, and how far one of half the steps is from it.
        scores: Fréchet distance and accuracy of the truth, and of real digits.
    """

    def __init__(
        self, steps: Sequence[int], screen_samples: int, samples: int, truth_steps: int, keep: Path | None
    ) -> None:
        # Not compiled: settings differ in the shapes of what they keep, and each would be compiled anew.
        model = FusedDDT.from_reference(digits_model())
        self._screen, self._final = DigitsRuns(model, screen_samples, keep), DigitsRuns(model, samples, keep)
        fine = replace(BASE, num_steps=truth_steps, solver="lms", order=4)
        half = replace(fine, num_steps=10 * (truth_steps // 20) + 5)
        truth = self._screen(fine)
        self.truth = {
            "what": f"{label(fine)}, everything evaluated",
            "own_error": sample_errors(self._screen(half), truth).error,
            "own_error_is": f"relative L2 distance of {half.num_steps} steps from it",
        }
        self.points = [self._point(config) for config in grid(steps)]
        for point in tqdm(self.points, unit="setting", desc="screening"):
            point.screening = sample_errors(self._screen(point.config), truth)
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
        screened = [point for point in self.points if point.screening is not None]
        chosen: set[int] = set()
        for measure in ("error", "error_median"):
            errors = [getattr(point.screening, measure) for point in screened]
            chosen.update(i for costs in _both_costs(screened) for i in near_front(costs, errors, NEAR))
        return [screened[i] for i in sorted(chosen)] + [point for point in self.points if point.name]

    def _score(self, point: Point, truth: torch.Tensor | None) -> None:
        samples = self._final(point.config)
        score = self._final.score(samples)
        point.errors = None if truth is None else sample_errors(samples, truth)
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
        return [point for point in self.points if point.errors is not None]


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _both_costs(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.tflop_xl2 for point in points], [point.mflop_digits for point in points]


def fronts(finalists: Sequence[Point]) -> dict[str, list[int]]:
    """Fronts, as numbers of finalists, by loss and cost."""
    costs = dict(zip(("tflop_xl2", "mflop_digits"), _both_costs(finalists), strict=True))
    return {
        f"{loss} over {cost}": front(costs[cost], [point.loss(loss) for point in finalists])
        for loss in (*MEASURES, "frechet")
        for cost in costs
    }


def recommended(finalists: Sequence[Point]) -> list[tuple[str, float, int]]:
    """(measure, budget in TFLOP per image at XL/2 256 px, number of a finalist): of each measure a setting once, for
    the least budget."""
    costs = _both_costs(finalists)[0]
    rows = []
    for measure in MEASURES:
        losses = [point.loss(measure) for point in finalists]
        chosen: dict[int, float] = {}
        for budget in BUDGETS:
            index = recommend(costs, losses, budget, TOLERANCE)
            if index is not None:
                chosen.setdefault(index, budget)
        rows += [(measure, budget, index) for index, budget in chosen.items()]
    return rows


def better_than_named(finalists: Sequence[Point]) -> list[tuple[int, int | None]]:
    """(a named finalist, the cheapest that errs no more by any measure), None where there is none."""
    costs = _both_costs(finalists)[0]
    rows: list[tuple[int, int | None]] = []
    for i, point in enumerate(finalists):
        if point.name:
            better = [{*dominating(costs, [p.loss(measure) for p in finalists], i)} for measure in MEASURES]
            rows.append((i, min(set.intersection(*better), key=lambda j: costs[j], default=None)))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, plot, print."""
    parser = CommandParser(prog="python -m benchmarks.pareto", description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="benchmarks/results")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="numbers of steps of the grid")
    parser.add_argument("--screen-samples", type=int, default=32, help="samples that the grid is screened with")
    parser.add_argument("--samples", type=int, default=256, help="samples of what is run again; 65 or more")
    parser.add_argument("--truth-steps", type=int, default=305, help="steps of the fine run")
    parser.add_argument("--keep", help=KEEP_HELP)
    options = parser.parse_args(arguments)
    require_int("--screen-samples", options.screen_samples, 1)
    require_int("--samples", options.samples, 65)
    for steps in options.steps:
        require_int("--steps", steps, 1)
    require_int("--truth-steps", options.truth_steps, max(options.steps) + 1)
    folder = output_folder(options.output_dir)
    record: dict[str, Any] = {"environment": environment()}
    counts = options.steps, options.screen_samples, options.samples, options.truth_steps
    measurement = Measurement(*counts, kept_samples(options.keep))
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
            {"by": measure, "budget_tflop_xl2": budget, "point": number[id(finalists[i])]}
            for measure, budget, i in recommended(finalists)
        ],
        "better_than_named": [
            {"point": number[id(finalists[i])], "cheapest": None if j is None else number[id(finalists[j])]}
            for i, j in better_than_named(finalists)
        ],
        "intervals": [point.as_dict() for point in measurement.intervals],
    }
    path = folder / "pareto.json"
    write_record(path, record)
    plot(record, folder / "pareto.png")
    print("\n\n".join(pareto_tables(ResultsFile(path))))


if __name__ == "__main__":
    run_command(main)
