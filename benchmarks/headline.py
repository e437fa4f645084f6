"""Images per second and seconds per image of DDT-XL/2, from the few kinds of steps: `python -m benchmarks.headline`.

A plan has a handful of kinds of steps. Each is timed for about a second, in rounds that run one after another as in a
run, and its median multiplied by how often the plan has it; what precedes the first step is added. Plans share the
kinds that they have in common. Where a whole run is short, one is timed too, and the difference reported.

For XL/2 at 256 and 512 px in bf16 with random weights, on a CPU a tiny model: every step refreshed, every 6th, where
dynamic programming puts as many refreshes, and `--fast`; as CUDA graphs, and for one image eagerly. Needs PyTorch,
Triton and numpy alone. The file of --output is complete after every measurement:

    headline   a row for every plan; seconds_per_batch: composed; whole_run: {seconds, difference: relative} or null
    steps      the timing of every kind of step, whatever plan has it
    missing    [{case, reason}]: what does not fit in memory, or failed, or had no time
"""

import argparse
import gc
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_sampling import SETTINGS, TINY
from benchmarks.cpu_sampling import step_words
from benchmarks.environment import environment, gpu_state
from benchmarks.harness import DEVICE, DTYPE, ON_GPU, timed, timing, words_of
from benchmarks.models import PUBLISHED, random_model
from benchmarks.report import tables
from ddt_fast.config import DDTConfig, SamplingConfig
from ddt_fast.files import write_json
from ddt_fast.model import FusedDDT
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.refresh.schedules import resolve_refresh_steps
from ddt_fast.sampling.tables import StepKind, step_kinds

XL2 = PRESETS["xl2_256"].model
# A round takes as long, so that the host's wait at its end counts for nothing; steps of seconds have fewest rounds.
ROUND_SECONDS, MIN_ROUNDS, MAX_ROUNDS = 0.05, 2, 20
WHOLE_RUN_SECONDS = 3.0  # a run that takes longer is not checked
# The plan with most kinds of steps first: one sampler, and one capture, serves most of the others.
PLANS = ("refresh 6", "refresh 1", "--fast", "refresh dp")


@dataclass(frozen=True)
class Case:
    """One model at one size and batch size, run as CUDA graphs or eagerly."""

    name: str
    config: DDTConfig
    side: int  # of the latents
    batch_size: int
    graphs: bool

    @property
    def title(self) -> str:
        return f"{self.name}, B {self.batch_size}, {'CUDA graphs' if self.graphs else 'eager'}"


# The most wanted first: time may run out.
GPU_CASES = (
    *(Case("XL/2 256 px", XL2, 32, batch, True) for batch in (1, 64, 256)),
    *(Case("XL/2 512 px", XL2, 64, batch, True) for batch in (1, 64, 256)),
    Case("XL/2 256 px", XL2, 32, 1, False),
)
CPU_CASES = tuple(Case("tiny, 4+2 blocks, C 192, 16x16 latents", TINY, 16, batch, False) for batch in (2,))


def calls_and_rounds(seconds: float, wanted: float, num_steps: int) -> tuple[int, int]:
    """Of a step that takes so many seconds: calls in a round, and rounds that take about the wanted seconds in all.
    A round has no more calls than a run has steps: the tables have no further rows."""
    calls = max(1, min(num_steps, int(ROUND_SECONDS / seconds)))
    least = MIN_ROUNDS if seconds < wanted / 2 else 1  # beside the first, which counts where it is a round
    return calls, max(least, min(MAX_ROUNDS, round(wanted / (calls * seconds))))


def start_key(plan: SamplingPlan) -> str:
    """What the time before the first step depends on: the encoder's modulations for all refreshes are computed."""
    return f"start, {plan.encoder_evaluations} encoder evaluations in {len(plan.steps)} steps"


def step_keys(plan: SamplingPlan) -> dict[str, StepKind]:
    """The kinds of steps, by what their time depends on. How much history the update reads makes less than 0.1%."""
    return {step_words(kind): kind for kind in step_kinds(plan)}


def counts(plan: SamplingPlan) -> dict[str, int]:
    """How often a run has each of its parts."""
    return {start_key(plan): 1} | Counter(map(step_words, step_kinds(plan)))


class Headline:
    """Measures cases and writes the record after every measurement.

    seconds: that timing a kind of step should take. num_steps: of all plans but `--fast`. time_limit: seconds from now
    after which nothing more is started.
    """

    def __init__(self, output: Path, seconds: float, num_steps: int, time_limit: float) -> None:
        self.output, self.seconds, self.deadline = output, seconds, time.monotonic() + time_limit
        self.base = replace(PUBLISHED, num_steps=num_steps, last_step=0.04 if num_steps >= 50 else None)
        self.settings: dict[str, SamplingConfig] = {}
        self.record: dict[str, Any] = {"environment": environment(), "num_steps": num_steps, "gpu_before": gpu_state()}
        self.record |= {"headline": [], "steps": [], "missing": []}

    def write(self) -> None:
        write_json(self.output, self.record)

    def miss(self, title: str, reason: str) -> None:
        print(f"{title}: {reason}", flush=True)
        self.record["missing"].append({"case": title, "reason": reason})
        self.write()

    def setting(self, name: str, model: FusedDDT, side: int) -> SamplingConfig:
        """Settings by name. Refreshes by dynamic programming are placed once, by a probe at the first size."""
        if name not in self.settings:
            self.settings[name] = resolve_refresh_steps(model, SETTINGS[name](self.base), side, side)
        return self.settings[name]

    def measure(self, cases: tuple[Case, ...]) -> None:
        models: dict[DDTConfig, FusedDDT] = {}
        for case in cases:
            if case.config not in models:
                models[case.config] = FusedDDT.from_reference(random_model(case.config, device=DEVICE).to(DTYPE))
            timings: dict[str, dict[str, Any]] = {}
            for name in PLANS:
                title = f"{case.title}, {name}"
                if time.monotonic() > self.deadline:
                    self.miss(title, "not started in time")
                    continue
                try:
                    Plan(self, case, models[case.config], name, timings).measure()
                except Exception as error:  # memory, a compiler, a kernel: reported, and the run continues
                    self.miss(title, words_of(error))
                gc.collect()
                if ON_GPU:
                    torch.cuda.empty_cache()
            self.record["gpu_after"] = gpu_state()
            self.write()


class Plan:
    """One plan of a case. timings: what the case has timed so far, by key; added to."""

    def __init__(
        self, headline: Headline, case: Case, model: FusedDDT, name: str, timings: dict[str, dict[str, Any]]
    ) -> None:
        self.headline, self.case, self.model, self.name, self.timings = headline, case, model, name, timings
        self.config = headline.setting(name, model, case.side)
        self.plan = SamplingPlan.from_config(self.config)
        noise, _ = seeded_noise(range(case.batch_size), (4, case.side, case.side))
        self.noise, self.labels = noise.to(DEVICE), torch.arange(case.batch_size, device=DEVICE)
        self.counts, self.kinds = counts(self.plan), step_keys(self.plan)

    def sampler(self, graphs: bool) -> Sampler:
        config, side = replace(self.config, cuda_graphs=graphs), self.case.side
        return Sampler(self.model, config, self.case.batch_size, side, side)

    def total(self) -> float:
        return sum(count * self.timings[part]["seconds"]["median"] for part, count in self.counts.items())

    def measure(self) -> None:
        new = [part for part in self.counts if part not in self.timings]
        captured, whole = any(part in self.kinds for part in new), None
        if new:
            # Graphs are captured for steps alone: what precedes them is run eagerly.
            sampler = self.sampler(self.case.graphs and captured)
            for part in new:
                self._time(sampler, part)
            if captured and self.short:
                whole = self._whole_run(sampler)
            del sampler  # before another takes memory
        if not captured and self.short and self.name == "--fast":
            whole = self._whole_run(self.sampler(self.case.graphs))
        self._report(whole)

    @property
    def short(self) -> bool:
        return self.total() <= WHOLE_RUN_SECONDS

    def _whole_run(self, sampler: Sampler) -> dict[str, float]:
        seconds = timed(partial(sampler, self.noise, self.labels))
        return {"seconds": seconds, "difference": seconds / self.total() - 1}

    def _time(self, sampler: Sampler, part: str) -> None:
        seconds = self._time_step(sampler, self.kinds[part]) if part in self.kinds else self._time_start(sampler)
        # The engine as it is, not as it was asked for: the sampler runs eagerly where capture fails.
        self.timings[part] = {"engine": sampler.engine, "step": part, "seconds": seconds}
        size = {"case": self.case.name, "batch_size": self.case.batch_size, "first_timed_for": self.name}
        self.headline.record["steps"].append(size | self.timings[part])
        self.headline.write()

    def _report(self, whole: dict[str, float] | None) -> None:
        total, batch, side = self.total(), self.case.batch_size, self.case.side
        flops = batch * self.plan.flops(self.case.config, side, side)
        row = {
            "case": self.case.name,
            "batch_size": batch,
            "engine": self.timings[next(iter(self.kinds))]["engine"],
            "plan": self.name,
            "seconds_per_batch": total,
            "images_per_second": batch / total,
            "tflop_per_image": flops / batch / 1e12,
            "tflops": flops / total / 1e12,
            "counts": self.counts,
            "whole_run": whole,
        }
        self.headline.record["headline"].append(row)
        self.headline.write()
        print(f"{self.case.title}, {self.name}: {batch / total:.4g} img/s, {total:.4g} s a batch", flush=True)

    @torch.no_grad()
    def _time_start(self, sampler: Sampler) -> dict[str, Any]:
        return timing([timed(partial(self._start, sampler)) for _ in range(1 + MIN_ROUNDS)][1:])

    def _start(self, sampler: Sampler) -> None:
        sampler.buffers.start(self.noise, self.labels)
        for step in range(len(self.plan.steps)):
            sampler.buffers.prepare_conditions(step)

    @torch.no_grad()
    def _time_step(self, sampler: Sampler, kind: StepKind) -> dict[str, Any]:
        """Calls follow each other as in a run. A capture has run every kind before; eagerly, the first call may compile
        and does not count."""
        calls = 1

        def round_of_calls() -> float:
            sampler.buffers.x.copy_(self.noise)
            sampler.buffers.rewind()
            return timed(partial(sampler._execute, kind), calls)

        self._start(sampler)
        if not self.case.graphs:
            round_of_calls()
        first = round_of_calls()
        calls, rounds = calls_and_rounds(first, self.headline.seconds, len(self.plan.steps))
        return timing([first] * (calls == 1) + [round_of_calls() for _ in range(rounds)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1.0, help="for timing one kind of step")
    parser.add_argument("--num-steps", type=int, default=PUBLISHED.num_steps, help="of all plans but --fast")
    parser.add_argument("--time-limit", type=float, default=1e9, metavar="SECONDS", help="start nothing later")
    options = parser.parse_args()
    headline = Headline(options.output, options.seconds, options.num_steps, options.time_limit)
    headline.measure(GPU_CASES if ON_GPU else CPU_CASES)
    print("\n\n".join(tables.headline(headline.record)))


if __name__ == "__main__":
    main()
