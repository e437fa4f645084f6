"""What the sampler's FLOPs buy: error against cost, by solver and by what steps share, on the digits model.

    python -m benchmarks.pareto

writes pareto.json and pareto.png and prints what to take for a budget. Into the repository's own results it also writes
the package's table for `sample --budget`.

- The truth is the solution of the guided ODE: a fine run that evaluates everything, from the same noise. So the
  solver's error and the shortcuts' are on one scale. (`benchmarks.forecast` sees the shortcuts' alone.)
- One or two in a hundred samples lie near a fork, go another way after a small push, and make up most of the relative
  L2 error of all. So the median and the 90% quantile of the samples' own errors stand beside it.
- A Fréchet distance below the truth's is not a gain: such runs follow the guidance less, which draws digits away from
  the real ones' spread.
- Where guidance sets in between two steps, Euler and "lms" are off by up to one step's length. Their step counts here
  put the bound 0.3 midway between two steps, where a multistep solver is right by luck; with the published 250 it lies
  beside one. The steps of "pec" end at the bound.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import tables
from benchmarks.report.files import FOLDER
from benchmarks.sampler_errors import (
    BASE,
    PUBLISHED,
    SHARED,
    DigitsRuns,
    digits_mflop,
    read_options,
    run_study,
    sample_errors,
    write_record,
    xl2_tflop,
)
from ddt_fast.command import run_command
from ddt_fast.config import SamplingConfig
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling.budgets import BUDGETS_FILE
from ddt_fast.tune_sampler import default_order, fit_schedule

MULTISTEP = replace(BASE, solver="lms", order=3)
CORRECTED = replace(BASE, solver="pec", order=3)
QUADRATIC: dict[str, Any] = {"refresh_every": 2, "state_forecast": "quadratic"}
STEPS = (4, 6, 8, 10, 12, 15, 18, 21, 26, 32, 42, 64, 105)  # of "pec", and of the table for budgets
# By name: settings, and numbers of steps.
SERIES: dict[str, tuple[SamplingConfig, tuple[int, ...]]] = {
    "Euler": (BASE, (15, 25, 55, 105, 245)),
    "multistep 3": (MULTISTEP, (15, 25, 35, 55, 105)),
    "multistep 3, K 2 quadratic": (replace(MULTISTEP, **QUADRATIC), (15, 25, 35, 55, 105)),
    "corrected 2": (replace(CORRECTED, order=2), STEPS),
    "corrected 3": (CORRECTED, STEPS),
    "corrected 3, K 2 quadratic": (replace(CORRECTED, **QUADRATIC), (26, 42, 64, 105)),
    "corrected 3, M 2": (replace(CORRECTED, guidance_every=2), (18, 26, 42, 64)),
    "published": (PUBLISHED, (250,)),
    "published, K 2 held": (replace(PUBLISHED, refresh_every=2), (250,)),
    "published, K 6, M 10 linear": (replace(PUBLISHED, **SHARED), (250,)),
}
BUDGET_SCALES = (1.5, 2.0, 4.0)  # guidance scales of the table for budgets
BUDGET_ORDERS = (2, 3)
FITTED_STEPS = (6, 8, 10, 12, 15, 21)
BFLOAT16_STEPS = (10, 21, 64)
# Fields of a point's settings.
SETTINGS = (
    *("num_steps", "solver", "order", "last_step", "guidance_interval"),
    *("refresh_every", "state_forecast", "guidance_every", "guidance_forecast"),
)


def compared() -> Iterator[tuple[str, SamplingConfig]]:
    for name, (config, counts) in SERIES.items():
        for count in counts:
            yield name, replace(config, num_steps=count)


def measure(samples: int, truth_steps: int, keep: str | None) -> dict[str, Any]:
    """All that pareto.json holds beside the environment."""
    runs = DigitsRuns(samples, keep)
    fine = replace(CORRECTED, num_steps=truth_steps)
    truth = runs(fine)
    points = []
    for series, config in tqdm(list(compared()), unit="setting"):
        drawn, plan = runs(config), SamplingPlan.from_config(config)
        point = {"series": series, "network_evaluations": plan.network_evaluations, "tflop_xl2": xl2_tflop(config)}
        point |= {"mflop_digits": digits_mflop(plan), **sample_errors(drawn, truth), **runs.scores(drawn)}
        points.append(point | {"settings": {name: getattr(config, name) for name in SETTINGS}})
    fitted = list(fitted_rows(runs, truth))
    coarse = DigitsRuns(samples, keep, dtype=torch.bfloat16)
    settings = [replace(CORRECTED, num_steps=steps) for steps in BFLOAT16_STEPS]
    bfloat16 = [{"num_steps": config.num_steps, **sample_errors(coarse(config), truth)} for config in settings]
    half = replace(fine, num_steps=truth_steps // 2)
    return {
        "samples": samples,
        "guidance_scale": BASE.guidance_scale,
        "guidance_interval": BASE.guidance_interval,
        "truth": {
            "what": f"{tables.label(fine)}, everything evaluated",
            "own_error": sample_errors(runs(half), truth)["error"],
            "own_error_is": f"relative L2 distance of {half.num_steps} steps from it",
            **runs.scores(truth, "frechet_real", "accuracy_real"),
        },
        "points": points,
        "fitted": fitted,
        "bfloat16": bfloat16,
        "budgets": list(budget_rows(runs, truth_steps)),
    }


def budget_rows(runs: DigitsRuns, truth_steps: int) -> Iterator[dict[str, Any]]:
    """Errors of solver "pec" over guidance scales, each against the solution of its own ODE."""
    for scale in BUDGET_SCALES:
        guided = replace(CORRECTED, guidance_scale=scale)
        truth = runs(replace(guided, num_steps=truth_steps))
        for steps in tqdm(STEPS, unit="setting", desc=f"guidance {scale:g}"):
            for order in BUDGET_ORDERS:
                errors = sample_errors(runs(replace(guided, num_steps=steps, order=order)), truth)
                yield {"guidance_scale": scale, "num_steps": steps, "order": order, **errors}


def fitted_rows(runs: DigitsRuns, truth: Tensor) -> Iterator[dict[str, Any]]:
    """Errors of the schedules that `ddt_fast.tune_sampler` fits by its defaults, beside those of the steps that it
    starts from; None where it keeps none."""
    for steps in FITTED_STEPS:
        rule = replace(CORRECTED, num_steps=steps, order=default_order(steps))
        row: dict[str, Any] = {"num_steps": steps, "order": rule.order, "tflop_xl2": xl2_tflop(rule)}
        with TemporaryDirectory() as folder:
            started = time.perf_counter()
            tuned = fit_schedule(start=rule, output=Path(folder) / "tuned.json")
            row["seconds"] = time.perf_counter() - started
        row["rule"] = sample_errors(runs(rule), truth)
        yield row | {"fitted": None if tuned is None else sample_errors(runs(tuned.settings(rule)), truth)}


def budget_table(record: dict[str, Any]) -> dict[str, Any]:
    """The package's table, as `ddt_fast.sampling.budgets` reads it."""
    environment = record["environment"]
    commit, day = (environment["commit"] or "not known")[:12], environment["date"][:10]
    return {
        "evidence": f"{record['samples']} samples, benchmarks.pareto, commit {commit}, {day}",
        "rows": record["budgets"],
    }


NUMBERS = {
    "--samples": (256, 65, "samples of every run; 65 or more"),
    "--truth-steps": (300, 2 * max(STEPS), "steps of the fine run"),
}


def main(arguments: list[str] | None = None) -> None:
    options = read_options("pareto", __doc__, arguments, NUMBERS)
    record = run_study("pareto", options, partial(measure, options.samples, options.truth_steps))
    if Path(options.output_dir).resolve() == FOLDER:
        write_record(BUDGETS_FILE, budget_table(record))
    print("\n\n".join(tables.pareto(record)))


if __name__ == "__main__":
    run_command(main)
