"""The harness of all bench_*.py: cases are verified, timed in turn, and written to one results file. README.md says how
it times, what it refuses to time, and what the file holds.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from benchmarks.environment import environment, gpu_state, load_average, now
from ddt_fast.device import cpu_has_bf16, dtype_name
from ddt_fast.files import read_json, write_json
from ddt_kernels import Cost

FORMAT = 1
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

# Relative error, by the bytes of an element, above which plain PyTorch itself counts as wrong.
MAX_BASELINE_ERROR = {2: 0.1, 4: 1e-3, 8: 1e-6}
# On a CPU calls are repeated until one timing takes as long, so that reading the clock costs nothing beside it.
MIN_SECONDS, MAX_REPEATS = 1e-3, 50
# Calls that `do_bench` times, and for how long in every round.
SHORT_SECONDS, BENCH_MILLISECONDS = 0.02, 10
MIN_ROUNDS, MAX_ROUNDS = 5, 50

Run = Callable[["Inputs"], Sequence[Tensor]]  # does the work once and returns what is verified
Key = TypeVar("Key", bound=Hashable)


# Cases


@dataclass(frozen=True)
class Inputs:
    """What one call reads: the arguments, of which those to be differentiated require a gradient, and the gradients of
    the outputs (empty where no gradient is timed)."""

    tensors: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] = ()

    def to(self, dtype: torch.dtype) -> "Inputs":
        def copy(tensor: Tensor) -> Tensor:
            made = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
            return made.clone().requires_grad_(tensor.requires_grad)

        return Inputs(tuple(map(copy, self.tensors)), tuple(map(copy, self.gradients)))


@dataclass(frozen=True)
class Variant:
    """One way to do a case's work."""

    make: Callable[[], Any]  # prepares the run (imports, compilation); not timed
    ours: bool = False  # this repository's; otherwise a peer, which may not work on this machine
    check: Callable[[Any, Inputs], Sequence[Tensor]] | None = None  # of what was made; None: what the run returns
    expected: Run | None = None  # the right result, where it differs from the case's
    cost: Cost | None = None  # where it differs from the case's
    note: str = ""  # for the results


@dataclass(frozen=True)
class Workload:
    """A case with its tensors."""

    inputs: Callable[[], Inputs]  # of a call; the same at every call
    variants: Mapping[str, Variant | str]  # by name, the baseline first; a string: why that one is missing here
    expected: Run  # the right result, in higher precision
    dtype: torch.dtype  # what the work is done in
    cost: Cost | None = None  # of one call, for the roofline
    images: int | None = None  # that one call makes or reads
    tolerance: float | None = None  # largest relative error allowed; None: as `allowed_errors`
    clean_up: Callable[[], object] = lambda: None  # called when the case is over


@dataclass(frozen=True)
class Case:
    group: str  # "kernels", "model", ...
    name: str
    size: str
    variants: tuple[str, ...]  # names of those that `build` makes, the baseline's first
    build: Callable[[], Workload]
    seconds: float = 1.0  # that timing should take in all
    rounds: int | None = None  # None: as many as the time allows, 5 to 50

    @property
    def title(self) -> str:
        return f"{self.group}: {self.name}, {self.size}"


def forward(function: Callable[..., Any]) -> Run:
    """Calls `function` on the tensors, for inference."""

    @torch.no_grad()
    def run(inputs: Inputs) -> Sequence[Tensor]:
        return _outputs(function(*inputs.tensors))

    return run


def forward_backward(function: Callable[..., Any]) -> Run:
    """Calls `function` on the tensors, then computes the gradients in all that require one."""

    def run(inputs: Inputs) -> Sequence[Tensor]:
        outputs = _outputs(function(*inputs.tensors))
        leaves = [tensor for tensor in inputs.tensors if tensor.requires_grad]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, inputs.gradients)]

    return run


def _outputs(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def wider(dtype: torch.dtype) -> torch.dtype:
    """What the right result is computed in."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def randn(generator: torch.Generator, *size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Normal numbers on the generator's device, drawn in fp32."""
    return torch.randn(*size, generator=generator, device=generator.device).to(dtype)


# Timing


def timing(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, first and third quartile, extremes, and the number of calls."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    names = ("lower_quartile", "median", "upper_quartile", "minimum", "maximum", "calls")
    return dict(zip(names, (*quartiles, min(seconds), max(seconds), len(seconds)), strict=True))


def timed(run: Callable[[], object], repeats: int = 1) -> float:
    """Seconds per call on the host's clock, the device's work included."""
    started = timer()
    for _ in range(repeats):
        run()
    return (timer() - started) / repeats


def gpu_seconds(run: Callable[[], object]) -> float:
    """Median seconds of a short call on the GPU, which finds nothing in its L2 cache."""
    from triton.testing import do_bench

    milliseconds: float = do_bench(run, warmup=2, rep=BENCH_MILLISECONDS, return_mode="median")
    return milliseconds / 1e3


def take_turns(clocks: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """What every clock reads in each round."""
    readings = [{name: clock() for name, clock in clocks.items()} for _ in range(rounds)]
    return {name: [reading[name] for reading in readings] for name in clocks}


def interleave(runs: Mapping[Key, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[Key, dict[str, Any]]:
    """The `timing` of runs timed in turn on the host's clock, after `warmup` rounds that do not count."""
    readings = take_turns({name: partial(timed, run) for name, run in runs.items()}, warmup + rounds)
    return {name: timing(seconds[warmup:]) for name, seconds in readings.items()}


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best: FLOP/s of a square GEMM by its dtype's name ("float32" without TF32), bytes/s
    of a copy, read plus written, and the sizes in words."""

    gemm_flops_per_second: dict[str, float]
    copy_bytes_per_second: float
    sizes: str

    def floor(self, cost: Cost | None, dtype: torch.dtype) -> tuple[float, str] | None:
        """Seconds that work of that cost takes at least, and what bounds it, "gemm" or "copy"; None where the GEMM of
        that dtype was not measured."""
        rate = self.gemm_flops_per_second.get(dtype_name(dtype))
        if cost is None or rate is None:
            return None
        compute, memory = cost.flops / rate, cost.bytes_moved / self.copy_bytes_per_second
        return (compute, "gemm") if compute >= memory else (memory, "copy")


def measure_ceilings() -> Ceilings:
    """Medians of several calls on DEVICE; takes about a second."""
    sizes = {torch.float32: 4096, torch.bfloat16: 8192} if ON_GPU else {torch.float32: 1536}
    if not ON_GPU and cpu_has_bf16():
        sizes[torch.bfloat16] = 1536
    generator = torch.Generator(DEVICE).manual_seed(0)

    def median(run: Callable[[], object]) -> float:
        return interleave({"": run}, 20 if ON_GPU else 7, warmup=2)[""]["median"]

    gemm = {}
    for dtype, n in sizes.items():
        a, b = (randn(generator, n, n, dtype=dtype) for _ in range(2))
        gemm[dtype_name(dtype)] = 2 * n**3 / median(partial(torch.mm, a, b))
    size = 2**31 if ON_GPU else 2**28
    source = torch.rand(size // 4, generator=generator, device=DEVICE)
    seconds = median(partial(torch.empty_like(source).copy_, source))
    words = ", ".join(f"{dtype_name(dtype)} GEMM {n}x{n}x{n}" for dtype, n in sizes.items())
    return Ceilings(gemm, 2 * size / seconds, f"{words}; copy of {size >> 20} MiB")


# Measuring a case


@dataclass
class Result:
    """What was measured of a case: the record for JSON, the seconds per call in every round by variant, and why the
    others have none: `wrong` where they should have, `missing` where they cannot be had here."""

    record: dict[str, Any]
    rounds: dict[str, list[float]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def note_failure(self, name: str, variant: Variant, error: Exception) -> None:
        """A peer that fails counts as missing; ours counts as wrong."""
        (self.wrong if variant.ours else self.missing)[name] = f"failed: {words_of(error)}"


def words_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measure(case: Case, ceilings: Ceilings, device: torch.device = DEVICE) -> Result:
    """Verify and time a case's variants; ValueError where its workload has others than the case names."""
    workload = case.build()
    try:
        if tuple(workload.variants) != case.variants:
            raise ValueError(f"{case.title} builds {tuple(workload.variants)}; expected {case.variants}")
        result = Result({"group": case.group, "case": case.name, "size": case.size})
        right, before = _verify(workload, result), gpu_state()
        _time(case, right, workload.inputs(), result, device)
        result.record |= {
            "dtype": dtype_name(workload.dtype),
            "clock": "CUDA events or host clock" if device.type == "cuda" else "host clock",
            "variants": [_entry(workload, right[name], result, ceilings) for name in result.rounds],
            "wrong": [{"name": name, "reason": reason} for name, reason in result.wrong.items()],
            "missing": [{"name": name, "reason": reason} for name, reason in result.missing.items()],
            "gpu_before": before,
            "gpu_after": gpu_state(),
            "load_average": load_average(),
        }
        return result
    finally:
        workload.clean_up()
        del workload
        gc.collect()
        torch._dynamo.reset()  # one function compiled for many cases would reach dynamo's limit of recompilations
        if device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass
class _Right:
    name: str
    variant: Variant
    run: Run
    error: float
    allowed_error: float
    calls_per_round: int = 1


def _entry(workload: Workload, right: _Right, result: Result, ceilings: Ceilings) -> dict[str, Any]:
    baseline, cost = next(iter(workload.variants)), right.variant.cost or workload.cost
    seconds, base = timing(result.rounds[right.name]), result.rounds.get(baseline)
    floor, bound = ceilings.floor(cost, workload.dtype) or (None, None)
    return {
        "name": right.name,
        "baseline": right.name == baseline,
        "ours": right.variant.ours,
        "seconds": seconds,
        "calls_per_round": right.calls_per_round,
        "ratio": base and seconds["median"] / statistics.median(base),
        "error": right.error,
        "allowed_error": right.allowed_error,
        "images_per_second": workload.images and workload.images / seconds["median"],
        "flops": cost and cost.flops,
        "bytes": cost and cost.bytes_moved,
        "floor_seconds": floor,
        "bound_by": bound,
        "share_of_ceiling": floor and floor / seconds["median"],
        "note": right.variant.note,
    }


def _verify(workload: Workload, result: Result) -> dict[str, _Right]:
    """The variants found right; the others are noted in the result."""
    right: dict[str, _Right] = {}
    expected_of = cache(lambda run: run(workload.inputs()))
    limits: list[float] = []
    for name, variant in workload.variants.items():
        if isinstance(variant, str):
            result.missing[name] = variant
            continue
        try:
            run = variant.make()
            outputs = run(workload.inputs()) if variant.check is None else variant.check(run, workload.inputs())
        except Exception as error:  # of any package or compiler: reported, and the run continues
            result.note_failure(name, variant, error)
            continue
        errors = relative_errors(outputs, expected_of(variant.expected or workload.expected))
        del outputs
        allowed = limits or [workload.tolerance or MAX_BASELINE_ERROR[workload.dtype.itemsize]] * len(errors)
        worst = max(range(len(errors)), key=lambda i: errors[i] / allowed[i])
        if errors[worst] > allowed[worst]:
            result.wrong[name] = f"wrong: error {errors[worst]:.2g} of output {worst}, allowed {allowed[worst]:.2g}"
            continue
        right[name] = _Right(name, variant, run, errors[worst], allowed[worst])
        if name == next(iter(workload.variants)) and workload.tolerance is None:
            # Plain PyTorch's own errors set the limits for all others, if it is right.
            limits = allowed_errors(errors, workload.dtype)
    return right


def allowed_errors(plain: Sequence[float], dtype: torch.dtype) -> list[float]:
    """The relative errors allowed: twice plain PyTorch's in the same dtype plus half an ulp, or in fp32 16 ulps, enough
    for another order of summation and another exponential, but not for TF32."""
    floor = torch.finfo(dtype).eps * (0.5 if dtype.itemsize == 2 else 16)
    return [2 * error + floor for error in plain]


def relative_errors(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Of every output; infinite where it is not a number, or of another shape, or missing."""
    if [a.shape for a in outputs] != [e.shape for e in expected]:
        return [math.inf] * len(expected)
    errors = map(relative_error, outputs, expected)
    return [math.inf if math.isnan(error) else error for error in errors]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor, or the plain norm where that is zero."""
    wide = expected.double()
    norm = torch.linalg.vector_norm(wide).item()
    return torch.linalg.vector_norm(actual.to(wide.device).double() - wide).item() / (norm or 1.0)


def _time(case: Case, right: Mapping[str, _Right], inputs: Inputs, result: Result, device: torch.device) -> None:
    """Leave the seconds per call and round in the result."""
    calls = {name: partial(entry.run, inputs) for name, entry in right.items()}
    first = {}
    for name, call in calls.items():
        try:
            first[name] = timed(call)
        except Exception as error:  # memory that sufficed to verify one after the other, for example
            result.note_failure(name, right[name].variant, error)
    short = device.type == "cuda" and max(first.values(), default=0.0) < SHORT_SECONDS
    clocks: dict[str, Callable[[], float]] = {}
    total = 0.0
    for name, seconds in first.items():
        repeats = 1
        if short:
            repeats = max(1, int(BENCH_MILLISECONDS / 1e3 / seconds))
        elif device.type == "cpu":
            repeats = min(MAX_REPEATS, max(1, math.ceil(MIN_SECONDS / seconds)))
        clocks[name] = partial(gpu_seconds, calls[name]) if short else partial(timed, calls[name], repeats)
        right[name].calls_per_round, total = repeats, total + repeats * seconds
    if first:
        result.rounds = take_turns(clocks, case.rounds or max(MIN_ROUNDS, min(MAX_ROUNDS, int(case.seconds / total))))


# The results file


class Recorder:
    """Measures cases, each once, and writes the results file, if `path` names one, after every one.

    append: keep the cases of an existing file, except those measured again; ValueError where it is of another format or
    another machine. time_limit: seconds from now after which no case is started.
    """

    def __init__(self, path: Path | None, append: bool = False, time_limit: float = math.inf) -> None:
        self.path, self._started, self._time_limit = path, time.monotonic(), time_limit
        self.results: dict[str, Result | Exception] = {}
        self._ceilings: Ceilings | None = None
        here = environment()
        self.content: dict[str, Any] = {"format": FORMAT, "environment": here, "sessions": [], "cases": []}
        if append and path is not None and path.exists():
            self.content = read_json(path)
            if self.content.get("format") != FORMAT:
                raise ValueError(f"{path} has format {self.content.get('format')!r}; allowed: {FORMAT}")
            for name in ("commit", "cpu", "gpus", "torch"):
                there = self.content["environment"].get(name)
                if there != here[name]:
                    raise ValueError(f"{path} holds results of {name} {there}, here it is {here[name]}; name another")
        self.session: dict[str, Any] = {
            **{"started": now(), "finished": None, "command": here["command"], "load_average": here["load_average"]},
            **{"ceilings": None, "ceilings_after": None, "not_measured": []},
        }
        self.content["sessions"].append(self.session)

    def measure(self, case: Case) -> Result | None:
        """The case's result, measured at the first call; None where time is out; raises what building it raised, at
        every call."""
        result = self.results.get(case.title)
        if result is None:
            if time.monotonic() - self._started > self._time_limit:
                self._skip(case, f"not started within the time limit of {self._time_limit:g} s")
                return None
            result = self.results[case.title] = self._measure(case)
        if isinstance(result, Exception):
            raise result
        return result

    def _measure(self, case: Case) -> Result | Exception:
        if self._ceilings is None:
            self._ceilings = measure_ceilings()
            self.session["ceilings"] = asdict(self._ceilings)
        try:
            result = measure(case, self._ceilings)
        except Exception as error:
            self._skip(case, words_of(error))
            return error
        result.record["session"] = len(self.content["sessions"]) - 1
        key = ("group", "case", "size")
        others = [c for c in self.content["cases"] if any(c[name] != result.record[name] for name in key)]
        self.content["cases"] = [*others, result.record]
        self._write()
        return result

    def _skip(self, case: Case, reason: str) -> None:
        entry = {"case": case.title, "reason": reason}
        if entry not in self.session["not_measured"]:
            self.session["not_measured"].append(entry)
            self._write()

    def finish(self) -> None:
        """Measure the ceilings again, and close the session, if anything was measured."""
        if self._ceilings is not None:
            self.session["ceilings_after"] = asdict(measure_ceilings())
            self.session["finished"] = now()
            self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content)
