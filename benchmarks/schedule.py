"""How long the steps of `gpu_run.py` take, by arithmetic, against their limits: `python -m benchmarks.schedule`.

Assumptions are in `Rates`: by default half of the speed that today's code is expected to reach on an H200, every kernel
compiled anew, and every case and plan of the headline measured. Steps that follow those of
`gpu_run.LIMITS` take what is left.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks import bench_kernels
from benchmarks.bench_sampling import SETTINGS
from benchmarks.gpu_run import LIMITS, STOP_SECONDS
from benchmarks.headline import GPU_CASES, PLANS, WHOLE_RUN_SECONDS, XL2, Case, calls_and_rounds, counts, step_keys
from benchmarks.models import PUBLISHED
from benchmarks.report.tables import table
from ddt_fast.model.flops import model_flops
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling.tables import StepKind
from ddt_fast.training.throughput import training_flops


@dataclass(frozen=True)
class Rates:
    """What a slow machine reaches.

    Attributes:
        sampling_flops: FLOP/s in bf16. 11.4 images a second of 36.5 TFLOP are expected, refresh every 6: half of it.
        training_flops: FLOP/s in bf16; 550 images a second are expected: half of it.
        float32_flops: of plain PyTorch without TF32; 50 TFLOP/s are common.
        graph_step, eager_step: seconds that a step takes at least. 0.28 s for an image of 250 steps is the goal; some
            400 launches at 20 µs each are 8 ms: twice both.
        start: until a process has imported what it needs. model: to make XL/2 and its copies.
        binary: to compile one Triton kernel. capture: a sampler's buffers and graphs, beside running every kind once.
    """

    sampling_flops: float = 208e12
    training_flops: float = 275 * training_flops(XL2, 32, 32, True)
    float32_flops: float = 25e12
    graph_step: float = 2 * 0.28 / 250
    eager_step: float = 2 * 8e-3
    start: float = 10.0
    model: float = 10.0
    binary: float = 2.0
    capture: float = 2.0


# Binaries by step: of the kernels that it runs and the tiles it tries, beyond those that Triton's cache has from the
# steps before. The check's 60 s are its own promise.
BINARIES = {"attention": 12, "swiglu": 14, "headline": 16, "training_step": 10}
# Classes of calls that are verified for the first time in a step, beyond the check's: by size, granularity and pass.
VERIFIED = {"attention": 10, "swiglu": 6, "headline": 58, "training_step": 12}
VERIFICATION_SECONDS = 0.15  # of one, besides compiling: its kernels and plain PyTorch on 8 million elements
VERIFIER_SECONDS = 5.0  # until the process that does it answers
CHECK_SECONDS = 60.0
START_SECONDS = 0.5  # of what precedes the first step of a run, three times
PROBE_SECONDS = 10.0  # for the refresh steps by dynamic programming: 250 steps of 8 images, and a search on the CPU
# Of a portfolio: to draw, verify and time one implementation in one case, forward or with the backward pass.
IMPLEMENTATION_SECONDS = 0.4
# Inception and the autoencoder in float64, to be verified; each timed for 2 to 3 s.
SCORING_SECONDS = 25.0


def step_seconds(kind: StepKind, case: Case, rates: Rates) -> float:
    cost = model_flops(case.config, case.side, case.side)
    flops = kind.encode * (cost.encoder + cost.modulations) + kind.decode * cost.decoder
    least = rates.graph_step if case.graphs else rates.eager_step
    return max(least, case.batch_size * flops / rates.sampling_flops)


def case_seconds(case: Case, seconds: float, rates: Rates) -> float:
    """Of one case of the headline, every kind of step timed for `seconds`, as `headline.Plan` does it."""
    known: set[str] = set()
    total = 0.0
    for name in PLANS:
        config = SETTINGS[name](PUBLISHED)
        if config.refresh_steps == "dp":  # stands in: it also has a segment that begins without guidance
            config = replace(config, refresh_steps=None, num_refreshes=None, refresh_every=7)
        plan = SamplingPlan.from_config(config)
        times = {part: step_seconds(kind, case, rates) for part, kind in step_keys(plan).items()}
        run = sum(count * times.get(part, 0.0) for part, count in counts(plan).items())
        new = times.keys() - known
        known |= new
        checked = run <= WHOLE_RUN_SECONDS and bool(new or name == "--fast")
        if new or checked:  # a sampler runs every kind eagerly, and to capture it does so again
            total += rates.capture + sum(times.values()) + case.graphs * sum(times.values())
        for part in new:
            calls, rounds = calls_and_rounds(times[part], seconds, len(plan.steps))
            total += times[part] * (1 + (not case.graphs) + calls * rounds)
        total += START_SECONDS + run * checked
    return total


def training_seconds(rates: Rates, batch: int = 32, calls: int = 5) -> float:
    """FusedDDT and the reference in float32: a first backward pass, one to compare, one to warm up, and two for memory,
    beside the calls."""
    flops = batch * training_flops(XL2, 32, 32, True)
    return rates.start + 2 * rates.model + (5 + calls) * (flops / rates.float32_flops + flops / rates.training_flops)


def forecast(rates: Rates = Rates(), headline_seconds: float = 1.0) -> dict[str, float]:
    """Seconds by step of `gpu_run.LIMITS`, without the profile, which is asked for."""

    def portfolio(name: str) -> float:
        cases = [c for c in bench_kernels.CASES if c.title.startswith(f"kernels: {name} forward")]
        sizes = 2 / len(bench_kernels.SHAPES)  # 256 and 512 px on a GPU
        return rates.start + sizes * sum(len(case.variants) for case in cases) * IMPLEMENTATION_SECONDS

    seconds = {
        "check": CHECK_SECONDS,
        "attention": portfolio("attention"),
        "swiglu": portfolio("swiglu"),
        "headline": rates.start
        + rates.model
        + PROBE_SECONDS
        + sum(case_seconds(case, headline_seconds, rates) for case in GPU_CASES),
        "training_step": training_seconds(rates),
        "scoring": rates.start + SCORING_SECONDS,
    }
    return {
        name: time
        + rates.binary * BINARIES.get(name, 0)
        + (name in VERIFIED) * VERIFIER_SECONDS
        + VERIFICATION_SECONDS * VERIFIED.get(name, 0)
        for name, time in seconds.items()
    }


def schedule(minutes: float = 9.0, rates: Rates = Rates()) -> Iterator[tuple[str, float, float, float]]:
    """For every step: its name, the seconds it takes, its limit, and what is left after it."""
    left = 60 * minutes - STOP_SECONDS
    for name, seconds in forecast(rates).items():
        limit = min(LIMITS[name], left)
        left -= min(seconds, limit)
        yield name, seconds, limit, left


def main() -> None:
    print(table("step | s | limit, s | left, s", schedule()))


if __name__ == "__main__":
    main()
