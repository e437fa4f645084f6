"""What FusedDDT, bf16, int8 and the sampling engine save on a CPU, against the reference run the published way.

    python -m benchmarks.cpu_sampling --output benchmarks/results/cpu_sampling.json

XL/2 at 256 px with random weights. Three tables:

- forward: one guidance pair (batch 2), the reference in fp32 eager against FusedDDT in each precision, eager and
  compiled, with the velocity's error against the reference;
- sampling: 250 steps, time per image. A run is a sequence of steps of a few kinds; each kind is timed, and the run's
  time is put together from the medians by how often the plan has each. The published way is the reference in fp32,
  eager, both branches at every step;
- runs: whole runs of fewer steps, timed from end to end against the same composition, and how far their results are
  from the reference's. With random weights and few steps, refreshes are far apart for a velocity that is not smooth in
  t: these errors compare precisions, they do not say what a shortcut costs a trained model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.measure import relative_error
from benchmarks.models import PUBLISHED, SETTINGS, WEIGHTS, Model, compiled_copy, published_run, random_model
from benchmarks.step_costs import StepCosts, composed
from benchmarks.timing import interleave, timed
from ddt_fast.command import run_command
from ddt_fast.files import atomic_file
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.quantization import quantize_int8
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import Sampler
from ddt_fast.sampling.noise import seeded_noise

REFERENCE = "reference, fp32 eager"
MAX_ERROR = 0.1
"""Of a velocity, beyond which a variant is not timed: it is wrong, not imprecise."""


def variants(reference: DDT) -> dict[str, Model]:
    """Every way to run the model, the reference first."""
    fused = FusedDDT.from_reference(reference)
    eager = {"fp32": fused, "int8": quantize_int8(fused)}
    eager["bf16"] = FusedDDT.from_reference(reference).to(torch.bfloat16)
    models: dict[str, Model] = {REFERENCE: reference}
    for name in ("fp32", "bf16", "int8"):
        models[f"{name} eager"] = eager[name]
        models[f"{name} compiled"] = compiled_copy(eager[name])
    return models


@torch.no_grad()
def measure_forward(models: dict[str, Model], size: int, calls: int) -> list[dict[str, Any]]:
    """One guidance pair through every model: error, then time."""
    config = models[REFERENCE].config
    x, _ = seeded_noise([0], (config.in_channels, size, size))
    x, t, y = x.expand(2, -1, -1, -1).contiguous(), torch.full((2,), 0.5), torch.tensor([0, config.num_classes])

    def run(model: Model) -> Tensor:
        return model(x.to(next(model.parameters()).dtype), t, y)[0].float()

    expected = run(models[REFERENCE])
    errors, first_seconds = {}, {}
    for name, model in models.items():
        first_seconds[name] = timed(partial(run, model))
        errors[name] = relative_error(run(model), expected)
        if not errors[name] <= MAX_ERROR:
            raise ValueError(f"{name}: relative error {errors[name]:.2g}; not timed")
    timings = interleave({name: partial(run, model) for name, model in models.items()}, calls, warmup=0)
    base = timings[REFERENCE].median
    return [
        {
            "variant": name,
            "seconds": timing.as_dict(),
            "of_reference": timing.median / base,
            "relative_error": errors[name],
            "first_call_seconds": first_seconds[name],
        }
        for name, timing in timings.items()
    ]


@torch.no_grad()
def measure_sampling(
    reference: DDT, engines: dict[str, Model], size: int, batch_size: int, calls: int, run_steps: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The tables "sampling" and "runs"."""
    shape = (reference.config.in_channels, size, size)
    noise, _ = seeded_noise(range(batch_size), shape)
    labels = torch.arange(batch_size) % reference.config.num_classes
    one_step = partial(published_run, reference, noise, labels, replace(PUBLISHED, num_steps=1, last_step=None))
    names = [(engine, setting) for engine in engines for setting in SETTINGS]
    long: dict[tuple[str, str], StepCosts] = {}
    short: dict[tuple[str, str], StepCosts] = {}
    functions: dict[Any, Callable[[], object]] = {REFERENCE: one_step}
    for engine, setting in names:
        for costs, config in ((long, SETTINGS[setting]), (short, replace(SETTINGS[setting], num_steps=run_steps))):
            costs[engine, setting] = StepCosts(Sampler(engines[engine], config, batch_size, size, size), noise, labels)
        parts = short[engine, setting].functions() | long[engine, setting].functions()
        functions |= {(engine, setting, part): function for part, function in parts.items()}
        functions[engine, setting, "short start"] = short[engine, setting].start
    timings = interleave(functions, calls, warmup=2)
    step = timings[REFERENCE]
    published = PUBLISHED.num_steps * step.median / batch_size
    sampling: dict[str, Any] = {"published": {"seconds_per_image": published, "step": step.as_dict()}, "settings": []}
    runs: list[dict[str, Any]] = []
    run_config = replace(PUBLISHED, num_steps=run_steps)
    started = time.perf_counter()
    expected = published_run(reference, noise, labels, run_config)
    seconds = time.perf_counter() - started
    runs.append(_run_record(REFERENCE, "published", run_steps, seconds, run_steps * step.median, 0.0))
    for engine, setting in names:
        own = {
            part: timings[engine, setting, part]
            for part in long[engine, setting].counts | short[engine, setting].counts
        }
        total = composed(long[engine, setting].counts, own) / batch_size
        plan = long[engine, setting].sampler.plan
        sampling["settings"].append(
            {
                "engine": engine,
                "setting": setting,
                "seconds_per_image": total,
                "times_faster_than_published": published / total,
                "network_evaluations": plan.network_evaluations,
                "encoder_evaluations": plan.encoder_evaluations,
                "tflop_per_image": plan.flops(reference.config, size, size) / 1e12,
                "parts": [
                    {"part": part, "count": count, "seconds": own[part].as_dict()}
                    for part, count in long[engine, setting].counts.items()
                ],
            }
        )
        own["start"] = timings[engine, setting, "short start"]
        predicted = composed(short[engine, setting].counts, own)
        sampler = short[engine, setting].sampler
        sampler(noise, labels)  # compiles what the kinds of steps, timed one by one, did not
        started = time.perf_counter()
        result = sampler(noise, labels)
        seconds = time.perf_counter() - started
        error = relative_error(result, expected)
        runs.append(_run_record(engine, setting, run_steps, seconds, predicted, error))
    return sampling, runs


def _run_record(
    engine: str, setting: str, steps: int, seconds: float, predicted: float, error: float
) -> dict[str, Any]:
    return {
        "engine": engine,
        "setting": setting,
        "num_steps": steps,
        "seconds": seconds,
        "composed_seconds": predicted,
        "relative_error": error,
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_sampling.json"))
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time, for the published way too")
    parser.add_argument("--calls", type=int, default=5, help="of everything that is timed")
    parser.add_argument("--run-steps", type=int, default=24, help="steps of the whole runs")
    parser.add_argument("--only", nargs="+", help="variants to measure beside the reference, such as 'int8 compiled'")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    for name in ("batch_size", "calls", "run_steps", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: 1 or more")
    torch.set_num_threads(options.threads)
    # One process compiles the same functions for several dtypes and shapes; none may fall back to eager unseen.
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    record = {
        "environment": environment(),
        "model": "XL/2, 256 px",
        "weights": WEIGHTS,
        "batch_size": options.batch_size,
    }
    preset = PRESETS["xl2_256"]
    reference = random_model(preset.model)
    models = variants(reference)
    unknown = sorted(set(options.only or ()) - set(models))
    if unknown:
        raise ValueError(f"variant {unknown[0]!r} does not exist; allowed: {', '.join(models)}")
    if options.only:
        models = {name: models[name] for name in (REFERENCE, *options.only)}
    size = preset.data.sample_size
    record["forward"] = measure_forward(models, size, options.calls)
    for row in record["forward"]:
        print("{variant:28} {of_reference:.3f} of the reference's time, error {relative_error:.2g}".format(**row))
    engines: dict[str, Model] = {name: models[name] for name in ("int8 compiled", "bf16 compiled") if name in models}
    del models
    record["sampling"], record["runs"] = measure_sampling(
        reference, engines, size, options.batch_size, options.calls, options.run_steps
    )
    print("published: {seconds_per_image:.0f} s per image".format(**record["sampling"]["published"]))
    for row in record["sampling"]["settings"]:
        print("{engine}, {setting}: {seconds_per_image:.1f} s, {times_faster_than_published:.2f}x".format(**row))
    for row in record["runs"]:
        words = "{engine}, {setting}, {num_steps} steps: {seconds:.1f} s, composed {composed_seconds:.1f} s"
        print((words + ", error {relative_error:.2g}").format(**row))
    with atomic_file(options.output) as file:
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
