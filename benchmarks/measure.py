"""Measures a case: every variant is verified, then all that are right are timed in turn.

- Verified: the outputs, and the gradients where they are timed, against the right result in higher precision, on fresh
  random inputs. A variant that is wrong gets no time.
- Timed: on a GPU by CUDA events, calls rotating over as many sets of inputs as its L2 cache cannot hold; on a CPU by
  the host's clock. Very short calls are timed several at a time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Run, Variant, Workload
from benchmarks.ceilings import Ceilings
from benchmarks.environment import gpu_state, load_average
from benchmarks.shapes import dtype_name
from benchmarks.timing import Clock, EventClock, Timing, record, timed

MAX_BASELINE_ERROR = {2: 0.1, 4: 1e-3, 8: 1e-6}
"""Relative error, by the bytes of an element, beyond which plain PyTorch is wrong too, and nothing can be compared."""

MIN_SECONDS = 1e-3
"""Calls are repeated until one timing takes as long: a clock read, or an event, costs nothing beside it."""

MAX_REPEATS, MIN_ROUNDS, MAX_ROUNDS = 50, 5, 50
MAX_SETS = 16


@dataclass
class Result:
    """What a case came to.

    Attributes:
        record: ready for JSON, see `results`.
        rounds: seconds per call in every round, by variant.
        wrong: by variant, why it is not timed though it should be.
        missing: by variant, why it cannot be had here.
    """

    record: dict[str, Any]
    rounds: dict[str, list[float]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def measure(case: Case, ceilings: Ceilings, device: torch.device) -> Result:
    """Verify and time a case's variants.

    Raises:
        ValueError: its workload has other variants than the case names.
    """
    workload = case.build()
    try:
        if tuple(workload.variants) != case.variants:
            raise ValueError(f"{case.title} builds {tuple(workload.variants)}; wanted {case.variants}")
        return _measure(case, workload, ceilings, device)
    finally:
        workload.clean_up()
        del workload
        gc.collect()
        torch._dynamo.reset()  # one function compiled for many cases would reach dynamo's limit of recompilations
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(case: Case, workload: Workload, ceilings: Ceilings, device: torch.device) -> Result:
    result = Result({"group": case.group, "case": case.name, "size": case.size})
    runs, errors = _verify(workload, result)
    before = gpu_state()
    repeats: dict[str, int] = {}
    if runs:
        result.rounds, repeats = _time(case, workload, runs, result, device)
    baseline = next(iter(workload.variants))
    base = result.rounds.get(baseline)
    variants = []
    for name, seconds in result.rounds.items():
        variant = cast(Variant, workload.variants[name])
        timing = Timing.of(seconds)
        entry: dict[str, Any] = {"name": name, "baseline": name == baseline, "ours": variant.ours}
        entry |= {"seconds": timing.as_dict(), "calls_per_round": repeats[name]}
        entry["ratio"] = None if base is None else timing.median / Timing.of(base).median
        entry |= {"error": errors[name][0], "allowed_error": errors[name][1]}
        entry["images_per_second"] = None if workload.images is None else workload.images / timing.median
        cost = variant.cost or workload.cost
        floor = None if cost is None else ceilings.floor(cost, workload.dtype)
        entry |= {
            "flops": None if cost is None else cost.flops,
            "bytes": None if cost is None else cost.bytes_moved,
            "floor_seconds": None if floor is None else floor[0],
            "bound_by": None if floor is None else floor[1],
            "share_of_ceiling": None if floor is None else floor[0] / timing.median,
            "note": variant.note,
        }
        variants.append(entry)
    result.record |= {
        "dtype": dtype_name(workload.dtype),
        "clock": _clock_name(case, device),
        "variants": variants,
        "wrong": [{"name": name, "reason": reason} for name, reason in result.wrong.items()],
        "missing": [{"name": name, "reason": reason} for name, reason in result.missing.items()],
        "gpu_before": before,
        "gpu_after": gpu_state(),
        "load_average": load_average(),
    }
    return result


def _verify(workload: Workload, result: Result) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """What to time, made and found right, and its (error, allowed error); the others go to the result."""
    runs: dict[str, Any] = {}
    found: dict[str, tuple[float, float]] = {}
    shared: Sequence[Tensor] | None = None
    allowed: list[float] | None = None
    at_most = workload.tolerance or MAX_BASELINE_ERROR[workload.dtype.itemsize]
    baseline = next(iter(workload.variants))
    for name, variant in workload.variants.items():
        if isinstance(variant, str):
            result.missing[name] = variant
            continue
        try:
            run = variant.make()
            outputs = (variant.check or _call)(run, workload.inputs(0))
        except Exception as error:  # of any package or compiler: to be shown, not to end the run
            _note_failure(result, name, variant, error)
            continue
        if variant.expected is not None:
            expected = variant.expected(workload.inputs(0))
        else:
            assert workload.expected is not None
            expected = shared = workload.expected(workload.inputs(0)) if shared is None else shared
        errors = relative_errors(outputs, expected)
        del outputs
        # Plain PyTorch's errors are the measure of all others, if it is right itself.
        limits = allowed or [at_most] * len(errors)
        excess = [error / limit for error, limit in zip(errors, limits, strict=True)]
        worst = max(range(len(errors)), key=excess.__getitem__)
        if excess[worst] <= 1:
            runs[name], found[name] = run, (errors[worst], limits[worst])
            if name == baseline and workload.tolerance is None:
                allowed = limits_from(errors, workload.dtype)
        else:
            result.wrong[name] = f"wrong: error {errors[worst]:.2g} of output {worst}, allowed {limits[worst]:.2g}"
    return runs, found


def _note_failure(result: Result, name: str, variant: Variant, error: Exception) -> None:
    reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    (result.wrong if variant.ours else result.missing)[name] = reason


def limits_from(plain: Sequence[float], dtype: torch.dtype) -> list[float]:
    """The relative errors allowed: twice plain PyTorch's in the same dtype plus half an ulp, or in fp32 16 ulps, which
    admit another order of summation and another exponential, but no TF32."""
    floor = torch.finfo(dtype).eps * (0.5 if dtype.itemsize == 2 else 16)
    return [2 * error + floor for error in plain]


def relative_errors(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Of every output; infinite where it is not a number, or of another shape, or missing."""
    if len(outputs) != len(expected):
        return [math.inf] * len(expected)
    errors = [relative_error(a, e) if a.shape == e.shape else math.inf for a, e in zip(outputs, expected, strict=True)]
    return [math.inf if math.isnan(error) else error for error in errors]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected (or the norm itself, where zeros were)."""
    wide = expected.double()
    norm = torch.linalg.vector_norm(wide).item()
    return torch.linalg.vector_norm(actual.to(wide.device).double() - wide).item() / (norm or 1.0)


def _call(run: Run, inputs: Inputs) -> Sequence[Tensor]:
    return run(inputs)


def _time(
    case: Case, workload: Workload, runs: dict[str, Run], result: Result, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per call and round, and calls per round, by variant."""
    first = workload.inputs(0)
    count = number_of_sets(first.num_bytes, device)
    sets = [first, *(workload.inputs(i) for i in range(1, count))]
    clock: Clock = EventClock(case.hide_launches) if device.type == "cuda" else timed
    seconds = {}
    for name, run in runs.items():
        try:
            seconds[name] = clock(partial(_repeat, run, sets, 1))
        except Exception as error:  # memory that sufficed to verify one after the other, for example
            _note_failure(result, name, cast(Variant, workload.variants[name]), error)
    repeats = {name: min(MAX_REPEATS, max(1, math.ceil(MIN_SECONDS / s))) for name, s in seconds.items()}
    # On a GPU as many as there are sets, so that every set is read before one is read again.
    if device.type == "cuda" and case.hide_launches:
        repeats = {name: max(number, count) for name, number in repeats.items()}
    rounds = case.rounds
    if rounds is None:
        total = sum(seconds[name] * repeats[name] for name in seconds)
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(case.seconds / total)))
    calls = {name: partial(_repeat, runs[name], sets, repeats[name]) for name in seconds}
    taken = record(calls, rounds, warmup=0, clock=clock)
    return {name: [s / repeats[name] for s in values] for name, values in taken.items()}, repeats


def number_of_sets(num_bytes: int, device: torch.device) -> int:
    """Of inputs that calls rotate over: twice as many as a GPU's L2 cache holds; one on a CPU, whose times stand for
    nothing but their ratios."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, max(2, math.ceil(2 * cache / max(1, num_bytes))))


def _repeat(run: Run, sets: Sequence[Inputs], repeats: int) -> None:
    for i in range(repeats):
        run(sets[i % len(sets)])


def _clock_name(case: Case, device: torch.device) -> str:
    if device.type != "cuda":
        return "host clock"
    return "CUDA events" + (", launches hidden" if case.hide_launches else ", launches included")
