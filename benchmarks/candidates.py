"""The same quality for fewer FLOPs: what `benchmarks.pareto` recommends, over guidance settings, on the digits.

    python -m ddt_fast.train --training.seed 1 --output-dir runs/other
    python -m benchmarks.candidates --other-model runs/other/model

writes candidates.json and prints its tables. `benchmarks.pareto` compares solvers at the published guidance; here a few
stand against the published settings at several, each with its own truth: the solution of its ODE, from a fine run that
evaluates everything. The other model, of another seed and data order, tells what is one model's luck. Beside the
errors: Fréchet distances of many samples to all 1,797 real digits, in pixels, where the same seeds make differences
visible that are far below the noise of the distance.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import tables
from benchmarks.sampler_errors import (
    BASE,
    PUBLISHED,
    SHARED,
    DigitsRuns,
    read_options,
    run_study,
    sample_errors,
    xl2_tflop,
)
from ddt_fast.command import run_command
from ddt_fast.config import SamplingConfig
from ddt_fast.data.digits import digits
from ddt_fast.evaluation.metrics import frechet_distance, gaussian_statistics
from ddt_fast.model.settings import resolve_checkpoint

# By name: scale and interval.
GUIDANCE: dict[str, tuple[float, tuple[float, float]]] = {
    "none": (1.0, (0.0, 1.0)),
    "1.5 in (0.3, 1)": (1.5, (0.3, 1.0)),
    "2 in (0.3, 1)": (2.0, (0.3, 1.0)),
    "2 in (0.5, 1)": (2.0, (0.5, 1.0)),
    "2 in (0.3, 0.8)": (2.0, (0.3, 0.8)),
    "2 always": (2.0, (0.0, 1.0)),
    "4 in (0.3, 1)": (4.0, (0.3, 1.0)),
}
FRECHET_GUIDANCE = "2 in (0.3, 1)"  # the published one
OTHER_MODEL = ", another model"  # after the guidance of its rows

CORRECTED = replace(BASE, solver="pec", order=3)
TRUTH = replace(CORRECTED, num_steps=300)


def candidates() -> Iterator[tuple[str, SamplingConfig]]:
    """Names and settings; `guided` adds the guidance."""
    yield "Euler 250, published", PUBLISHED
    yield "Euler 250, K 2 held", replace(PUBLISHED, refresh_every=2)
    yield "Euler 250, K 6, M 10 linear", replace(PUBLISHED, **SHARED)
    for steps in (55, 35):
        config = replace(BASE, num_steps=steps, solver="lms", order=3, refresh_every=2, state_forecast="quadratic")
        yield f"multistep 3, {steps}, K 2 quadratic", config
    for steps, order in ((32, 3), (21, 3), (21, 2), (15, 3), (15, 2), (10, 2), (6, 2)):
        yield f"corrected {order}, {steps}", replace(CORRECTED, num_steps=steps, order=order)


# Stands for the truth where there are many samples.
FRECHET_REFERENCE = ("corrected 3, 64", replace(CORRECTED, num_steps=64))
FRECHET_CANDIDATES = (
    "Euler 250, K 6, M 10 linear",
    "multistep 3, 35, K 2 quadratic",
    "corrected 3, 21",
    "corrected 2, 10",
)
BLOCKS = 10  # of the many samples: differences between blocks are the standard errors


def guided(config: SamplingConfig, name: str) -> SamplingConfig:
    scale, interval = GUIDANCE[name]
    return replace(config, guidance_scale=scale, guidance_interval=interval)


def error_rows(runs: DigitsRuns, names: Iterable[str], suffix: str = "") -> Iterator[dict[str, Any]]:
    for name in names:
        truth = runs(guided(TRUTH, name))
        for candidate, settings in tqdm(list(candidates()), unit="setting", desc=f"guidance {name}{suffix}"):
            config = guided(settings, name)
            row = {"guidance": name + suffix, "candidate": candidate, "tflop_xl2": xl2_tflop(config)}
            yield row | sample_errors(runs(config), truth)


def frechet_rows(runs: DigitsRuns) -> list[dict[str, Any]]:
    """The reference, then the candidates: distance, and its difference from the reference's, with standard errors."""
    real = gaussian_statistics(_pixels(digits()[0]))
    settings = dict(candidates())
    rows: list[dict[str, Any]] = []
    reference: Any = None
    for name, config in (FRECHET_REFERENCE, *((name, settings[name]) for name in FRECHET_CANDIDATES)):
        config = guided(config, FRECHET_GUIDANCE)
        pixels = _pixels(runs(config))
        distance = frechet_distance(*gaussian_statistics(pixels), *real)
        blocks = np.array([frechet_distance(*gaussian_statistics(p), *real) for p in np.array_split(pixels, BLOCKS)])
        reference = reference or (distance, blocks)
        row = {"candidate": name, "tflop_xl2": xl2_tflop(config), "frechet": distance}
        row["frechet_sd"] = _standard_error(blocks)
        if rows:
            row |= {"difference": distance - reference[0], "difference_sd": _standard_error(blocks - reference[1])}
        rows.append(row)
    return rows


def _pixels(samples: Tensor) -> Any:
    """(N, 64), clipped as a saved image is."""
    return samples.double().clamp(-1, 1).flatten(1).numpy()


def _standard_error(blocks: Any) -> float:
    return float(blocks.std(ddof=1) / len(blocks) ** 0.5)


def measure(samples: int, frechet_samples: int, other_model: str | None, keep: str | None) -> dict[str, Any]:
    """All that candidates.json holds beside the environment."""
    errors = list(error_rows(DigitsRuns(samples, keep), GUIDANCE))
    if other_model is not None:
        runs = DigitsRuns(samples, keep, resolve_checkpoint(other_model))
        errors += error_rows(runs, [FRECHET_GUIDANCE], OTHER_MODEL)
    return {
        "samples": samples,
        "frechet_samples": frechet_samples,
        "frechet_guidance": FRECHET_GUIDANCE,
        "errors": errors,
        "frechet": frechet_rows(DigitsRuns(frechet_samples, keep)),
    }


NUMBERS = {
    "--samples": (256, 1, "samples whose errors are measured"),
    "--frechet-samples": (5_120, 65 * BLOCKS, "of the Fréchet distances; 650 or more"),
}


def main(arguments: list[str] | None = None) -> None:
    words = "a digits model of another seed, whose errors are measured too"
    options = read_options("candidates", __doc__, arguments, NUMBERS, other_model=words)
    counts = options.samples, options.frechet_samples
    record = run_study("candidates", options, partial(measure, *counts, options.other_model))
    print("\n\n".join(tables.candidates(record)))


if __name__ == "__main__":
    run_command(main)
