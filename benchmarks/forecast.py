"""What shortcuts cost in accuracy: error curves on the trained digits model.

    python -m benchmarks.forecast --output-dir benchmarks/results

writes forecast.json and forecast.png. Every setting draws the same samples; its errors are relative L2 distances of
the final samples from those of the run that evaluates everything (every step refreshed, both branches inside the
guidance interval): of all samples, and the median and the 90% quantile of the samples' own. Beside them stand the
digits' scores and the FLOPs the same plan would take at XL/2, 256 px.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from benchmarks.digits_runs import KEEP_HELP, DigitsRuns, digits_model, kept_samples, sample_errors, xl2_flops
from benchmarks.environment import environment
from benchmarks.figures import figure
from ddt_fast import SamplingConfig
from ddt_fast.command import run_command
from ddt_fast.config import GuidanceForecast, StateForecast
from ddt_fast.files import output_folder, write_json
from ddt_fast.model import FusedDDT
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling.fast import fast_settings

BASE = SamplingConfig(num_steps=250, guidance_scale=2.0, guidance_interval=(0.3, 1.0), last_step=0.04)
LINEAR = replace(BASE, state_forecast="linear", guidance_forecast="linear")


@dataclass(frozen=True)
class Result:
    """One setting: what it is, its errors, the digits' scores, and its cost at XL/2, 256 px."""

    group: str
    series: str
    at: float
    error: float
    error_median: float
    error_p90: float
    accuracy: float
    frechet: float
    tflop_per_image_xl2_256: float
    settings: dict[str, Any]


def settings() -> Iterator[tuple[str, str, float, SamplingConfig]]:
    """(group, series, place on the group's axis, configuration) of every run."""
    for scale, name in ((2.0, "w 2"), (1.0, "no guidance")):
        guided = replace(BASE, guidance_scale=scale)
        for forecast in get_args(StateForecast):
            for every in (2, 3, 4, 6, 10, 16):
                yield f"encoder, {name}", forecast, every, replace(guided, refresh_every=every, state_forecast=forecast)
    for forecast in get_args(GuidanceForecast):
        for every in (2, 4, 6, 10, 16):
            yield "guidance", forecast, every, replace(BASE, guidance_every=every, guidance_forecast=forecast)
    for every, guidance in ((4, 6), (6, 6), (6, 10), (10, 10)):
        config = replace(LINEAR, refresh_every=every, guidance_every=guidance)
        yield "both", f"K {every}, M {guidance}, linear", every, config
    for steps in (25, 50, 100, 250):
        config = replace(BASE, num_steps=steps, last_step=None if steps < 50 else 0.04)
        yield "steps", "hold K 2", steps, replace(config, refresh_every=2)
        yield "steps", "hold K 6", steps, replace(config, refresh_every=6)
        yield "steps", "--fast", steps, fast_settings(config)
    for scale in (1.5, 2.0, 3.0, 4.0):
        config = replace(BASE, guidance_scale=scale)
        yield "guidance scale", "hold K 2", scale, replace(config, refresh_every=2)
        yield "guidance scale", "--fast", scale, fast_settings(config)


def truth_of(config: SamplingConfig) -> SamplingConfig:
    """The same run with everything evaluated."""
    return replace(
        config,
        refresh_every=1,
        refresh_steps=None,
        state_forecast="hold",
        guidance_every=1,
        guidance_forecast="hold",
    )


def measure(num_samples: int, keep: Path | None) -> list[Result]:
    """Every setting, and every truth it is compared with (series "everything")."""
    draw = DigitsRuns(FusedDDT.from_reference(digits_model()), num_samples, keep)
    truths: dict[SamplingConfig, torch.Tensor] = {}
    results = []
    # Settings with the same truth follow each other in no particular order: keep them all.
    for group, series, at, config in tqdm(list(settings()), unit="setting"):
        truth_config = truth_of(config)
        runs = [(series, config)]
        if truth_config not in truths:
            runs.insert(0, ("everything", truth_config))
        for name, run in runs:
            samples = draw(run)
            truth = truths.setdefault(truth_config, samples)
            score = draw.score(samples)
            results.append(
                Result(
                    group=group,
                    series=name,
                    at=at,
                    **asdict(sample_errors(samples, truth)),
                    accuracy=score.accuracy,
                    frechet=score.frechet,
                    tflop_per_image_xl2_256=xl2_flops(SamplingPlan.from_config(run)) / 1e12,
                    settings=asdict(run),
                )
            )
    return results


def plot(results: list[Result], file: Path) -> None:
    """Error over each group's axis, and error, Fréchet distance and accuracy over FLOPs."""
    title = "Shortcuts on the trained digits model: final samples against the run that evaluates everything"
    with figure(file, 2, 4, (19, 9), title) as axes:
        panels = {
            "encoder, w 2": "encoder at every K-th step, w 2",
            "encoder, no guidance": "encoder at every K-th step, no guidance",
            "guidance": "guidance at every M-th step, w 2",
            "steps": "solver steps",
            "guidance scale": "guidance scale w, 250 steps",
        }
        for axis, (group, heading) in zip(axes, panels.items(), strict=False):
            for series in dict.fromkeys(r.series for r in results if r.group == group and r.series != "everything"):
                chosen = [r for r in results if r.group == group and r.series == series]
                median = sorted((r.at, r.error_median) for r in chosen)
                (line,) = axis.plot(*zip(*median, strict=True), marker="o", label=series)
                overall = sorted((r.at, r.error) for r in chosen)
                axis.plot(*zip(*overall, strict=True), color=line.get_color(), linestyle=":", alpha=0.6)
            axis.set(yscale="log", title=heading, ylabel="relative error: median, dotted: of all samples")
            axis.set_xscale("log")
            ticks = sorted({r.at for r in results if r.group == group and r.series != "everything"})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend()
        at_w2 = [r for r in results if r.settings["num_steps"] == 250 and r.settings["guidance_scale"] == 2.0]
        quantities = (
            ("error_median", "median relative error"),
            ("frechet", "pixel Fréchet distance"),
            ("accuracy", "class accuracy"),
        )
        for axis, (name, label) in zip(axes[len(panels) :], quantities, strict=True):
            for group in ("encoder, w 2", "guidance", "both"):
                for forecast, marker in (("hold", "x"), ("linear", "o"), ("quadratic", "^")):
                    chosen = [r for r in at_w2 if r.group == group and forecast in r.series]
                    if chosen:
                        points = [(r.tflop_per_image_xl2_256, getattr(r, name)) for r in chosen]
                        axis.scatter(
                            *zip(*points, strict=True), marker=marker, label=f"{group.split(',')[0]}, {forecast}"
                        )
            everything = next(r for r in at_w2 if r.series == "everything")
            if name == "error_median":
                axis.set_yscale("log")
            else:
                axis.axhline(getattr(everything, name), color="grey", linewidth=1, label="everything evaluated")
            axis.set(xlabel="TFLOP per image at XL/2, 256 px", title=f"{label}, 250 steps, w 2", ylabel=label)
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")


def main() -> None:
    """Measure, write, plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecast", description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="benchmarks/results")
    parser.add_argument("--num-samples", type=int, default=256, help="65 or more")
    parser.add_argument("--keep", help=KEEP_HELP)
    options = parser.parse_args()
    folder = output_folder(options.output_dir)
    record = {"environment": environment(), "num_samples": options.num_samples}
    results = measure(options.num_samples, kept_samples(options.keep))
    write_json(folder / "forecast.json", record | {"results": [asdict(result) for result in results]})
    plot(results, folder / "forecast.png")


if __name__ == "__main__":
    run_command(main)
