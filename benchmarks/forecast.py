"""What shortcuts cost in accuracy: error curves on the trained digits model.

    python -m benchmarks.forecast --output-dir benchmarks/results

writes forecast.json and forecast.png. Every setting draws the same samples; its errors are relative L2 distances of
the final samples from those of the run that evaluates everything (every step refreshed, both branches inside the
guidance interval): of all samples, and the median and the 90% quantile of the samples' own. Beside them stand the
digits' scores and the FLOPs the same plan would take at XL/2, 256 px.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, get_args

import torch
from tqdm import tqdm

from benchmarks.sampler_errors import PUBLISHED, SHARED, DigitsRuns, read_options, run_study, sample_errors, xl2_tflop
from ddt_fast import SamplingConfig
from ddt_fast.command import run_command
from ddt_fast.config import GuidanceForecast, StateForecast

LINEAR = replace(PUBLISHED, state_forecast="linear", guidance_forecast="linear")


def settings() -> Iterator[tuple[str, str, float, SamplingConfig]]:
    """(group, series, place on the group's axis, configuration) of every run."""
    for scale, name in ((2.0, "w 2"), (1.0, "no guidance")):
        guided = replace(PUBLISHED, guidance_scale=scale)
        for forecast in get_args(StateForecast):
            for every in (2, 3, 4, 6, 10, 16):
                yield f"encoder, {name}", forecast, every, replace(guided, refresh_every=every, state_forecast=forecast)
    for forecast in get_args(GuidanceForecast):
        for every in (2, 4, 6, 10, 16):
            yield "guidance", forecast, every, replace(PUBLISHED, guidance_every=every, guidance_forecast=forecast)
    for every, guidance in ((4, 6), (6, 6), (6, 10), (10, 10)):
        config = replace(LINEAR, refresh_every=every, guidance_every=guidance)
        yield "both", f"K {every}, M {guidance}, linear", every, config
    for scale in (1.5, 2.0, 3.0, 4.0):
        config = replace(PUBLISHED, guidance_scale=scale)
        yield "guidance scale", "hold K 2", scale, replace(config, refresh_every=2)
        yield "guidance scale", "K 6, M 10, linear", scale, replace(config, **SHARED)


def measure(num_samples: int, keep: str | None) -> dict[str, Any]:
    """Every setting, and every truth it is compared with (series "everything")."""
    runs = DigitsRuns(num_samples, keep)
    truths: dict[SamplingConfig, torch.Tensor] = {}
    results = []
    for group, series, at, config in tqdm(list(settings()), unit="setting"):
        everything = replace(config, refresh_every=1, refresh_steps=None, state_forecast="hold")
        everything = replace(everything, guidance_every=1, guidance_forecast="hold")
        new = everything not in truths
        for name, run in [("everything", everything)] * new + [(series, config)]:
            samples = runs(run)
            truth = truths.setdefault(everything, samples)
            result = {"group": group, "series": name, "at": at, **sample_errors(samples, truth), **runs.scores(samples)}
            results.append(result | {"tflop_per_image_xl2_256": xl2_tflop(run), "settings": asdict(run)})
    return {"num_samples": num_samples, "results": results}


def main(arguments: list[str] | None = None) -> None:
    options = read_options("forecast", __doc__, arguments, {"--num-samples": (256, 65, "65 or more")})
    run_study("forecast", options, partial(measure, options.num_samples))


if __name__ == "__main__":
    run_command(main)
