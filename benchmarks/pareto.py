"""What the sampler's FLOPs buy: error and Fréchet distance against cost over all of its settings, on the digits model.

    python -m benchmarks.pareto --output-dir benchmarks/results

writes pareto.json and pareto.png and prints what to take for a budget.

- The truth is the solution of the guided ODE: a fine multistep run that evaluates everything, from the same noise. So
  the solver's error and the shortcuts' are on one scale. (`benchmarks.forecast` sees the shortcuts' alone.) Another
  guidance interval is another ODE: intervals are judged by the Fréchet distance and the class accuracy.
- One or two in a hundred samples lie near a fork, go another way after a small push, and make up most of the relative
  L2 error of all. So the median and the 90% quantile of the samples' own errors stand beside it.
- The grid is screened with a few samples. Whatever is near the front there by the error of all or the median, and the
  settings that have a name, are run again with many: fronts and recommendations are of these.
- A Fréchet distance below the truth's is not a gain: such runs follow the guidance less, which draws digits away from
  the real ones' spread. Near the front it differs by little more than noise.
- Where guidance sets in between two steps, a solver is off by up to one step's length. Step counts of the grid (except
  10) put the bound 0.3 midway between two steps, where a multistep solver is right; with 250 it lies beside one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from tqdm import tqdm

from benchmarks.report import tables
from benchmarks.report.tables import MEASURES, label
from benchmarks.sampler_errors import (
    BASE,
    PUBLISHED,
    DigitsRuns,
    digits_mflop,
    read_options,
    run_study,
    sample_errors,
    xl2_tflop,
)
from ddt_fast.checks import require_int
from ddt_fast.command import run_command
from ddt_fast.config import SamplingConfig, Solver, StateForecast
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling.fast import fast_settings

STEPS = (10, 15, 25, 35, 55, 105, 245)
# Solvers and their orders, which Euler does not read.
SOLVERS: tuple[tuple[Solver, int], ...] = (("euler", 2), ("lms", 2), ("lms", 3), ("lms", 4))
FORECASTS: tuple[StateForecast, ...] = ("linear", "quadratic")
PERIODS = (2, 3, 4, 6, 10, 16)  # of the encoder and of guidance

# Beyond which shortcuts are tried with order 3 alone: there orders differ little, and Euler's own error hides a
# shortcut's.
MANY_STEPS = 40
NEAR = 1.15  # times the front's error or median, in the screening, up to which settings are run again
BUDGETS = (2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 25.0, 50.0, 100.0)  # TFLOP per image at XL/2, 256 px
TOLERANCE = 1.1  # times the least error within a budget, up to which the cheapest setting is recommended
INTERVALS = ((0.0, 1.0), (0.15, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 0.8), (0.3, 0.6))
COSTS = ("tflop_xl2", "mflop_digits")

# Settings, and what pareto.json says of them: costs, errors ("screening_..." of few samples), scores.
Point = dict[str, Any]


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


# Fields of a point's settings, beside a multistep solver's order.
SETTINGS = (
    *("num_steps", "solver", "last_step", "guidance_interval"),
    *("refresh_every", "state_forecast", "guidance_every", "guidance_forecast"),
)


def point(name: str, config: SamplingConfig) -> Point:
    """What pareto.json says of settings before they are run; "" is no name."""
    plan = SamplingPlan.from_config(config)
    names = (*SETTINGS, "order") if config.solver == "lms" else SETTINGS
    return ({"name": name} if name else {}) | {
        "network_evaluations": plan.network_evaluations,
        "tflop_xl2": xl2_tflop(config),
        "mflop_digits": digits_mflop(plan),
        "settings": {name: getattr(config, name) for name in names},
    }


def near_fronts(points: Sequence[Point]) -> set[int]:
    """The numbers of those that are near a front of the screening, by either cost and error."""
    pairs = product(COSTS, ("screening_error", "screening_error_median"))
    return {i for cost, loss in pairs for i in front(column(points, cost), column(points, loss), NEAR)}


def column(points: Sequence[Point], name: str) -> list[float]:
    return [point[name] for point in points]


# Of many (cost, loss) points, lower being better in both, those worth having; equal points count once, as the first.


def front(costs: Sequence[float], losses: Sequence[float], factor: float = 1.0) -> list[int]:
    """The Pareto front, by number and ascending cost: the points that no other beats. With a factor above 1 also those
    near it, which lose less than `factor` times the least of those that cost at most as much."""
    chosen, least = [], float("inf")
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i], i)):
        if losses[i] < factor * least:
            chosen.append(i)
        least = min(least, losses[i])
    return chosen


def dominating(costs: Sequence[float], losses: Sequence[float], point: int) -> set[int]:
    """The points that cost at most as much as `point` and lose less, or cost less and lose at most as much."""
    other = (costs[point], losses[point])
    pairs = list(zip(costs, losses, strict=True))
    return {i for i, pair in enumerate(pairs) if pair != other and pair[0] <= other[0] and pair[1] <= other[1]}


def recommend(costs: Sequence[float], losses: Sequence[float], budget: float, tolerance: float) -> int | None:
    """The cheapest point whose loss is at most `tolerance` times the least that the budget affords; None where it
    affords nothing. A tolerance of 1 buys the last percent at any price."""
    affordable = [i for i in range(len(costs)) if costs[i] <= budget]
    least = min((losses[i] for i in affordable), default=0.0)
    enough = (i for i in affordable if losses[i] <= tolerance * least)
    return min(enough, key=lambda i: (costs[i], losses[i], i), default=None)


def measure(steps: Sequence[int], few: int, samples: int, truth_steps: int, keep: str | None) -> dict[str, Any]:
    """All that pareto.json holds beside the environment."""
    screen, final = DigitsRuns(few, keep), DigitsRuns(samples, keep)
    fine = replace(BASE, num_steps=truth_steps, solver="lms", order=4)
    half = replace(fine, num_steps=10 * (truth_steps // 20) + 5)
    truth = screen(fine)
    own_error = sample_errors(screen(half), truth)["error"]
    configs = list(grid(steps))
    points = [point("", config) for config in configs]
    for config, values in tqdm(list(zip(configs, points, strict=True)), unit="setting", desc="screening"):
        errors = sample_errors(screen(config), truth)
        values |= {f"screening_{name}": error for name, error in errors.items()}
    finalists = sorted(near_fronts(points))
    for name, config in named():
        finalists.append(len(points))
        configs.append(config)
        points.append(point(name, config))
    truth = final(fine)
    for number in tqdm(finalists, unit="setting", desc="finalists"):
        drawn = final(configs[number])
        points[number] |= sample_errors(drawn, truth) | final.scores(drawn)
    others = tqdm(list(other_intervals()), unit="setting", desc="intervals")
    return {
        "screen_samples": few,
        "samples": samples,
        "guidance_scale": BASE.guidance_scale,
        "truth": {
            "what": f"{label(fine)}, everything evaluated",
            "own_error": own_error,
            "own_error_is": f"relative L2 distance of {half.num_steps} steps from it",
            **final.scores(truth, "frechet_real", "accuracy_real"),
        },
        "points": points,
        **choices(points, finalists),
        "intervals": [point("", config) | final.scores(final(config)) for config in others],
    }


def choices(points: Sequence[Point], finalists: Sequence[int]) -> dict[str, Any]:
    """Of the finalists, by number: the fronts by loss and cost; by each measure of the error every recommended setting
    once, for the least budget; and for every setting that has a name the cheapest that errs no more by any measure."""
    chosen = [points[number] for number in finalists]
    costs, losses = column(chosen, "tflop_xl2"), {name: column(chosen, name) for name in (*MEASURES, "frechet")}
    fronts = {
        f"{loss} over {cost}": [finalists[i] for i in front(column(chosen, cost), losses[loss])]
        for loss, cost in product(losses, COSTS)
    }
    recommended: dict[tuple[str, int], float] = {}
    for measure, budget in product(MEASURES, BUDGETS):
        best = recommend(costs, losses[measure], budget, TOLERANCE)
        if best is not None:
            recommended.setdefault((measure, finalists[best]), budget)
    cheapest: list[dict[str, int | None]] = []
    for i, number in enumerate(finalists):
        if "name" in points[number]:
            better = set.intersection(*(dominating(costs, losses[measure], i) for measure in MEASURES))
            j = min(better, key=lambda j: (costs[j], losses["error_median"][j]), default=None)
            cheapest.append({"point": number, "cheapest": None if j is None else finalists[j]})
    return {
        "fronts": fronts,
        "recommended": [{"by": m, "budget_tflop_xl2": b, "point": p} for (m, p), b in recommended.items()],
        "better_than_named": cheapest,
    }


TRUTH_HELP = "steps of the fine run; an odd multiple of 5 puts the guidance bound 0.3 midway between two"
NUMBERS = {
    "--steps": (list(STEPS), 1, "numbers of steps of the grid"),
    "--screen-samples": (32, 1, "samples that the grid is screened with"),
    "--samples": (256, 65, "samples of what is run again; 65 or more"),
    "--truth-steps": (305, 1, TRUTH_HELP),
}


def main(arguments: list[str] | None = None) -> None:
    options = read_options("pareto", __doc__, arguments, NUMBERS)
    require_int("--truth-steps", options.truth_steps, max(options.steps) + 1)
    counts = options.steps, options.screen_samples, options.samples, options.truth_steps
    print("\n\n".join(tables.pareto(run_study("pareto", options, partial(measure, *counts)))))


if __name__ == "__main__":
    run_command(main)
