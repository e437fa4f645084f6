"""What FusedDDT, bf16, int8 and the sampling engine save on a CPU, against the reference run the published way.

    python -m benchmarks.cpu_sampling --output benchmarks/results/cpu_sampling.json

XL/2 at 256 px with random weights. Three tables:

- forward: one guidance pair (batch 2), FusedDDT in each precision, eager and compiled, against the reference in fp32
  eager, with the velocity's error;
- sampling: 250 steps, time per image, put together from the medians of the few kinds of steps by how often the plan has
  each. The published way is the reference in fp32, eager, both branches at every step;
- runs: whole runs of fewer steps, timed from end to end against the same composition, and how far their results are
  from the reference's. With random weights and refreshes so far apart, these errors compare precisions; they do not say
  what a shortcut costs a trained model.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.harness import interleave, relative_error, timed
from benchmarks.models import PUBLISHED, Model, compiled_copy, published_run, random_model
from benchmarks.report import tables
from ddt_fast.checks import require, require_int
from ddt_fast.config import SamplingConfig
from ddt_fast.files import write_json
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.quantization import quantize_int8
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import Sampler
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.tables import StepKind

Timing = dict[str, Any]  # see `harness.timing`
REFERENCE = "reference, fp32 eager"
WEIGHTS = "random: matrices and embeddings N(0, 0.02), the final layer's and adaLN's too, norms 1, biases 0"
MAX_ERROR = 0.1  # of a velocity, beyond which a variant is not timed: it is wrong, not imprecise
FORECAST = {"state_forecast": "linear", "guidance_every": 10, "guidance_forecast": "linear"}
SETTINGS = {
    "refresh 1": PUBLISHED,
    "refresh 6": replace(PUBLISHED, refresh_every=6),
    "refresh 6, guidance every 10, linear": replace(PUBLISHED, refresh_every=6, **FORECAST),  # type: ignore[arg-type]
}


class StepCosts:
    """The parts that a sampler's run on a batch is made of, to be timed or profiled one by one, by name. The sampler's
    buffers are written to."""

    def __init__(self, sampler: Sampler, noise: Tensor, labels: Tensor) -> None:
        self.sampler, self.noise, self.labels = sampler, noise, labels
        self.parts = [step_words(kind) for kind in sampler.kinds]

    @property
    def counts(self) -> dict[str, int]:
        """How often a run has each part."""
        return {"start": 1} | Counter(self.parts)

    def functions(self) -> dict[str, Callable[[], object]]:
        """By part: a function that does it once. "start" is all that precedes the first step, and the encoder's
        modulations for all steps."""
        self.start()
        steps = {part: partial(self.step, self.parts.index(part)) for part in self.parts}
        return {"start": self.start, **steps}

    @torch.no_grad()
    def start(self) -> None:
        self.sampler.buffers.start(self.noise, self.labels)
        for step in range(len(self.parts)):
            self.sampler.buffers.prepare_conditions(step)

    @torch.no_grad()
    def step(self, number: int) -> None:
        buffers = self.sampler.buffers
        buffers.x.copy_(self.noise)
        buffers.step.fill_(number)
        self.sampler._advance(self.sampler.kinds[number])


def step_words(kind: StepKind) -> str:
    """What a step does; which slot a refresh writes to does not change its time."""
    parts = [f"encode {kind.encode}"] if kind.encode else []
    parts.append(f"decode {kind.decode}" + (" forecast" if kind.forecast else ""))
    if kind.fresh_uncond:
        parts.append("unconditional afresh")
    return ", ".join(parts) + ("" if kind.guided else ", unguided")


def composed(counts: dict[str, int], timings: dict[str, Timing]) -> float:
    """Seconds of a run that has each part so often."""
    return sum(count * timings[part]["median"] for part, count in counts.items())


def variants(reference: DDT) -> dict[str, Model]:
    """Every way to run the model, the reference first."""
    fused = FusedDDT.from_reference(reference)
    eager = {"fp32": fused, "bf16": FusedDDT.from_reference(reference).to(torch.bfloat16)}
    models: dict[str, Model] = {REFERENCE: reference}
    for name, model in (eager | {"int8": quantize_int8(fused)}).items():
        models |= {f"{name} eager": model, f"{name} compiled": compiled_copy(model)}
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
    return [
        {
            "variant": name,
            "seconds": timing,
            "of_reference": timing["median"] / timings[REFERENCE]["median"],
            "relative_error": errors[name],
            "first_call_seconds": first_seconds[name],
        }
        for name, timing in timings.items()
    ]


class SamplingRuns:
    """The parts of every run, timed in turn, by engine, setting and number of steps: PUBLISHED's 250 and `run_steps`.
    A step of either run is timed once."""

    def __init__(
        self, reference: DDT, engines: dict[str, Model], size: int, batch_size: int, calls: int, run_steps: int
    ) -> None:
        self.reference, self.size, self.batch_size, self.run_steps = reference, size, batch_size, run_steps
        self.noise, _ = seeded_noise(range(batch_size), (reference.config.in_channels, size, size))
        self.labels = torch.arange(batch_size) % reference.config.num_classes
        self.costs: dict[tuple[str, str, int], StepCosts] = {}
        one_step = replace(PUBLISHED, num_steps=1, last_step=None)
        functions: dict[Any, Callable[[], object]] = {REFERENCE: partial(self.published, one_step)}
        for engine, setting, steps in product(engines, SETTINGS, (run_steps, PUBLISHED.num_steps)):
            config = replace(SETTINGS[setting], num_steps=steps)
            costs = StepCosts(Sampler(engines[engine], config, batch_size, size, size), self.noise, self.labels)
            self.costs[engine, setting, steps] = costs
            for part, function in costs.functions().items():
                functions[engine, setting, steps if part == "start" else part] = function
        self.timings = interleave(functions, calls, warmup=2)

    def published(self, config: SamplingConfig) -> Tensor:
        return published_run(self.reference, self.noise, self.labels, config)

    def runs_of(self, num_steps: int) -> Iterator[tuple[str, str, StepCosts, dict[str, Timing]]]:
        """Engine, setting, and the timings of the parts of every run of that many steps."""
        for (engine, setting, steps), costs in self.costs.items():
            if steps == num_steps:
                keys = {part: (engine, setting, steps if part == "start" else part) for part in costs.counts}
                yield engine, setting, costs, {part: self.timings[key] for part, key in keys.items()}

    def sampling(self) -> dict[str, Any]:
        step = self.timings[REFERENCE]
        published = PUBLISHED.num_steps * step["median"] / self.batch_size
        settings = []
        for engine, setting, costs, own in self.runs_of(PUBLISHED.num_steps):
            total, plan = composed(costs.counts, own) / self.batch_size, costs.sampler.plan
            settings.append(
                {
                    "engine": engine,
                    "setting": setting,
                    "seconds_per_image": total,
                    "times_faster_than_published": published / total,
                    "network_evaluations": plan.network_evaluations,
                    "encoder_evaluations": plan.encoder_evaluations,
                    "tflop_per_image": plan.flops(self.reference.config, self.size, self.size) / 1e12,
                    "parts": [{"part": p, "count": count, "seconds": own[p]} for p, count in costs.counts.items()],
                }
            )
        return {"published": {"seconds_per_image": published, "step": step}, "settings": settings}

    def runs(self) -> Iterator[dict[str, Any]]:
        names = ("engine", "setting", "num_steps", "seconds", "composed_seconds", "relative_error")
        steps, results = self.run_steps, list[Tensor]()
        config = replace(PUBLISHED, num_steps=steps)
        seconds = timed(lambda: results.append(self.published(config)))
        predicted = steps * self.timings[REFERENCE]["median"]
        yield dict(zip(names, (REFERENCE, "published", steps, seconds, predicted, 0.0), strict=True))
        for engine, setting, costs, own in self.runs_of(steps):
            predicted, run = composed(costs.counts, own), partial(costs.sampler, self.noise, self.labels)
            run()  # compiles what the kinds of steps, timed one by one, did not
            seconds = timed(lambda run=run: results.append(run()))  # type: ignore[misc]
            error = relative_error(results[-1], results[0])
            yield dict(zip(names, (engine, setting, steps, seconds, predicted, error), strict=True))


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    from ddt_fast.command import CommandParser  # needs jsonargparse, which a GPU machine may lack

    parser = CommandParser(prog="python -m benchmarks.cpu_sampling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_sampling.json"))
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time, for the published way too")
    parser.add_argument("--calls", type=int, default=5, help="of everything that is timed")
    parser.add_argument("--run-steps", type=int, default=24, help="steps of the whole runs")
    parser.add_argument("--only", nargs="+", help="variants to measure beside the reference, such as 'int8 compiled'")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    for name in ("batch_size", "calls", "run_steps", "threads"):
        require_int(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    names = [REFERENCE, *(f"{dtype} {mode}" for dtype in ("fp32", "bf16", "int8") for mode in ("eager", "compiled"))]
    for name in options.only or ():
        require(name in names, "--only", name, ", ".join(names))
    torch.set_num_threads(options.threads)
    # One process compiles the same functions for several dtypes and shapes; none may fall back to eager unseen.
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    record: dict[str, Any] = {"environment": environment(), "model": "XL/2, 256 px", "weights": WEIGHTS}
    record["batch_size"], preset = options.batch_size, PRESETS["xl2_256"]
    reference, size = random_model(preset.model), preset.data.sample_size
    models = {k: m for k, m in variants(reference).items() if k in (REFERENCE, *(options.only or names))}
    record["forward"] = measure_forward(models, size, options.calls)
    engines: dict[str, Model] = {name: models[name] for name in ("int8 compiled", "bf16 compiled") if name in models}
    del models
    runs = SamplingRuns(reference, engines, size, options.batch_size, options.calls, options.run_steps)
    record |= {"sampling": runs.sampling(), "runs": list(runs.runs())}
    write_json(options.output, record)
    print("\n\n".join(tables.cpu_sampling(record)))


if __name__ == "__main__":
    from ddt_fast.command import run_command

    run_command(main)
