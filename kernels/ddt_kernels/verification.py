"""Whether an op computes on this GPU what PyTorch computes: asked once per class of calls, and kept.

An op here is a function with a plain version in PyTorch, as `launcher.launcher` makes them. The two are compared before
the op's first use, in every configuration that may be chosen, on random inputs. That happens in another process, so
that an illegal access, a crash of the compiler or a kernel that never ends cannot take the user's process down. What is
found is kept in the `store`, for other processes and later runs. An op that failed does not run, and a configuration
that failed is not chosen.

A class of calls: the op, dtypes, sizes and strides of its tensors, and its other arguments; of the number of samples,
only its largest power of two counts, whether it is one, and no more than make MAX_ELEMENTS. The rule is that of the
tests: `share_of_allowed`.
"""

import atexit
import importlib
import inspect
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from math import prod
from queue import Queue
from typing import IO, Any

import torch
from torch import Tensor

from ddt_kernels.store import store

VARIABLE = "DDT_KERNELS"
MODES = ("auto", "triton", "torch")
MAX_ELEMENTS = 1 << 23  # of a tensor in a check; more change nothing but the grid
SECONDS = 180.0  # after which a check is given up; it takes some, mostly to compile
IDLE_SECONDS = 20.0  # after which the other process ends, and frees its share of the GPU's memory
COMPILED = "torch.compile"
BUSY = "busy or unavailable"  # of CUDA, to a second process on a GPU in exclusive mode


@dataclass(frozen=True)
class Verdict:
    """What was found about a class of calls.

    Attributes:
        reason: why the op must not run; empty if it may.
        candidates: by name, configurations that failed, and why.
        share: the largest error of those that may run, as a share of what is allowed; 0 if none may.
        lasting: whether it holds for later runs too: it does not where memory ran out.
    """

    reason: str = ""
    candidates: dict[str, str] = field(default_factory=dict)
    share: float = 0.0
    lasting: bool = True


def mode() -> str:
    """DDT_KERNELS: "auto" verifies kernels and replaces those that fail or are slow, "triton" trusts all, "torch" uses
    none."""
    value = os.environ.get(VARIABLE, "auto")
    if value not in MODES:
        raise ValueError(f"{VARIABLE} is {value!r}; expected auto, triton or torch")
    return value


def verdict(
    op: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device, compiled: bool = False
) -> Verdict:
    """Whether the op may run on such arguments. compiled: torch.compile of its plain version is to be verified too, as
    the candidate COMPILED."""
    if mode() == "triton":
        return Verdict()
    spec = specification(op, args, kwargs, compiled)
    found = store(device).get(key_of(spec))
    if found is not None:
        return Verdict(**found)
    return _found_out(spec, specification(op, args, kwargs, compiled, max_elements=1), device)


def verify_all(specs: Sequence[Mapping[str, Any]], device: torch.device, processes: int) -> dict[str, Verdict]:
    """Verdicts on specified calls by their `key_of`, found out anew, several at a time in processes of their own; where
    memory was too small for several, one at a time."""
    distinct = {key_of(spec): spec for spec in specs}
    idle: Queue[Worker] = Queue()
    for _ in range(processes):
        idle.put(Worker())

    def verify(spec: Mapping[str, Any]) -> Verdict:
        own = idle.get()
        try:
            return own.check(spec, device)
        finally:
            idle.put(own)

    with store(device).alone():
        with ThreadPoolExecutor(processes) as pool:
            found = dict(zip(distinct, pool.map(verify, distinct.values()), strict=True))
        for _ in range(processes - 1):
            idle.get().close()
        for key, verdict in found.items():
            if not verdict.lasting:
                verdict = found[key] = verify(distinct[key])
            if verdict.lasting:
                store(device).put(key, asdict(verdict))
    idle.get().close()
    return found


def key_of(spec: Mapping[str, Any]) -> str:
    return words(spec["op"], spec["args"]) + (f", {COMPILED}" if spec["compiled"] else "")


def _found_out(spec: Mapping[str, Any], smallest: Mapping[str, Any], device: torch.device) -> Verdict:
    """smallest: the same with as few samples as can be, for want of memory."""
    made = Verdict()

    def find_out() -> dict[str, Any] | None:
        nonlocal made
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.empty_cache()  # the other process needs memory too
        made = worker().check(spec, device)
        if not made.lasting:
            made = worker().check(smallest, device)
        if BUSY in made.reason:  # a GPU that takes one process only
            made = check(spec, device)
        return asdict(made) if made.lasting else None

    found = store(device).find(key_of(spec), find_out)
    return made if found is None else Verdict(**found)


_warned: set[str] = set()


def warn_once(what: str, reason: str) -> None:
    """what: an op is replaced or left out. One warning for all its reasons: they differ in numbers."""
    if what in _warned:
        return
    _warned.add(what)
    warnings.warn(
        f"ddt_kernels: {what} on this GPU: {reason}. Please report this with the output of "
        f"python -m ddt_kernels.check; {VARIABLE}=triton takes kernels without verifying them, {VARIABLE}=torch none",
        stacklevel=2,
    )


def bound(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, in the order of the call."""
    names = inspect.signature(op).parameters
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def specification(
    op: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    compiled: bool = False,
    max_elements: int = MAX_ELEMENTS,
) -> dict[str, Any]:
    """What JSON can hold of a class of calls: tensors as {shape, strides, dtype, offset}, or {same} as another one.
    offset: elements from a multiple of 16 bytes."""
    described = describe(bound(op, args, kwargs), op.samples, max_elements)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    name = f"{op.__module__}:{op.__qualname__}"
    return {"op": op.op, "function": name, "args": described, "compiled": compiled, "tf32": tf32}


def describe(given: Mapping[str, Any], samples: Mapping[str, int], max_elements: int) -> dict[str, Any]:
    described: dict[str, Any] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, arg in given.items():
        if not isinstance(arg, Tensor):
            described[name] = arg
            continue
        place = arg.data_ptr() if arg.device.type != "meta" else id(arg), arg.shape, arg.stride(), arg.dtype
        if (same := seen.setdefault(place, name)) != name:
            described[name] = {"same": same}
            continue
        shape = list(arg.shape)
        if name in samples:
            shape[samples[name]] = _fewer(shape[samples[name]], prod(shape), max_elements)
        dtype = str(arg.dtype).removeprefix("torch.")
        offset = 0 if arg.device.type == "meta" else arg.data_ptr() % 16 // arg.itemsize
        described[name] = {"shape": shape, "strides": list(arg.stride()), "dtype": dtype, "offset": offset}
    shapes = {name: described[name]["shape"] for name in samples if "shape" in (described.get(name) or {})}
    for name, shape in shapes.items():  # the same number in all
        shape[samples[name]] = min(other[samples[key]] for key, other in shapes.items())
    return described


def _fewer(samples: int, elements: int, max_elements: int) -> int:
    """A power of two, and one more where `samples` is none: the last tile of a kernel may be partial."""
    most = 1 << (max(max_elements * samples // max(elements, 1), 1).bit_length() - 1)
    power = 1 << (samples.bit_length() - 1)
    return min(power, most) + (samples != power)


def words(op: str, described: Mapping[str, Any]) -> str:
    """A class of calls in one line."""

    def word(arg: Any) -> str:
        if not isinstance(arg, dict):
            return str(arg)
        if "same" in arg:
            return str(arg["same"])
        unaligned = f"+{arg['offset']}" if arg["offset"] else ""
        return f"{arg['dtype']}{arg['shape']}{tuple(arg['strides'])}{unaligned}".replace(" ", "")

    return f"{op} {' '.join(f'{name}={word(arg)}' for name, arg in described.items() if arg is not None)}"


def arguments(spec: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Random arguments of a specified call; integers are zeros."""
    generator = torch.Generator(device).manual_seed(0)
    made: dict[str, Any] = {}
    for name, arg in spec["args"].items():
        made[name] = arg
        if isinstance(arg, dict) and "same" in arg:
            made[name] = made[arg["same"]]
        elif isinstance(arg, dict):
            dtype = getattr(torch, arg["dtype"])
            span = 1 + sum((n - 1) * stride for n, stride in zip(arg["shape"], arg["strides"], strict=True))
            storage = torch.empty(arg["offset"] + max(span, 0), dtype=dtype, device=device)
            tensor = storage.as_strided(arg["shape"], arg["strides"], arg["offset"])
            random = torch.randn(arg["shape"], generator=generator, device=device)
            made[name] = tensor.copy_(random) if tensor.is_floating_point() else tensor.zero_()
    return made


def copies(args: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The arguments, those tensors copied that are named, or the same as a named one."""
    made: dict[int, Tensor] = {}

    def copy(arg: Tensor) -> Tensor:
        if id(arg) not in made:
            offset = arg.data_ptr() % 16 // arg.itemsize
            span = 1 + sum((n - 1) * stride for n, stride in zip(arg.shape, arg.stride(), strict=True))
            storage = arg.new_empty(offset + max(span, 0))
            made[id(arg)] = storage.as_strided(arg.shape, arg.stride(), offset).copy_(arg)
        return made[id(arg)]

    for name in names:
        if isinstance(args.get(name), Tensor):
            copy(args[name])
    return {name: made.get(id(arg), arg) for name, arg in args.items()}


def share_of_allowed(actual: Tensor, plain: Tensor, exact: Tensor) -> float:
    """The largest error of `actual`, as a share of what is allowed: twice the largest error of plain PyTorch in the
    same dtype, and two ulps; in fp32 16, enough for another exponential, and no TF32. Above 1 it is wrong; NaN counts
    as infinite. exact: the same in a wider dtype."""
    wide, ulps = exact.double(), 2 if actual.itemsize == 2 else 16
    plain_errors, errors = (plain.double() - wide).abs(), (actual.double() - wide).abs()
    finite = plain_errors[plain_errors.isfinite()]  # fp16 may overflow, in both alike
    allowed = 2 * (finite.max() if finite.numel() else 0.0) + ulps * torch.finfo(actual.dtype).eps * wide.abs()
    shares = torch.where((errors == 0) | (actual == plain), 0.0, errors / allowed)
    return float(shares.nan_to_num(nan=torch.inf).max())


def results(function: Callable[..., Any], args: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a call returns and leaves in its arguments, floats only."""
    args = copies(args, list(args))
    returned = function(*args.values())
    returned = returned if isinstance(returned, tuple) else (returned,)
    found = {f"result {index}": value for index, value in enumerate(returned)} | args
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()}


def check(spec: Mapping[str, Any], device: torch.device) -> Verdict:
    """The verdict on a specified call: what each configuration makes of random arguments, compared with plain
    PyTorch."""
    module, _, name = spec["function"].partition(":")
    op = getattr(importlib.import_module(module), name)
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32" if spec["tf32"] else "ieee"
    try:
        with torch.no_grad():
            args = arguments(spec, device)
            return _compare(op, args, spec["compiled"])
    finally:
        settings.fp32_precision = before


def _compare(op: Any, args: dict[str, Any], compiled: bool) -> Verdict:
    from ddt_kernels.tuning import Trial, compiled_version

    plain, exact = results(op.plain, args), results(op.plain, _wider(args))
    shares: dict[str, float] = {}
    failed: dict[str, str] = {}
    trial = Trial(0)
    while trial.index == 0 or trial.index < len(trial.names):
        with trial.running():
            share, reason = _judged(getattr(op, "__wrapped__", op), args, plain, exact)
        name = trial.names[trial.index] if trial.names else op.op
        shares[name], failed[name] = share, reason
        trial.index += 1
    right = [share for name, share in shares.items() if not failed[name]]
    if not right:
        return Verdict(next(iter(failed.values())))
    if compiled:
        _, failed[COMPILED] = _judged(compiled_version(op.plain), args, plain, exact)
    return Verdict("", {name: reason for name, reason in failed.items() if reason}, max(right))


def _judged(
    function: Callable[..., Any], args: Mapping[str, Any], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> tuple[float, str]:
    """The largest error as a share of what is allowed, and what is wrong, if anything."""
    try:
        actual = results(function, args)
        worst, output = 0.0, ""
        for name, made in actual.items():
            compared = [made, plain[name], exact[name]]
            if made.shape != plain[name].shape:  # partial sums, of which another implementation has another number
                compared = [tensor.sum(0) for tensor in compared]
            share = share_of_allowed(*compared) if made.numel() else 0.0
            if share > worst:
                worst, output = share, name
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise  # says nothing about the function, or nothing works in this process any more
        return torch.inf, line(error)
    return worst, f"{output} is off by {worst:.3g} times what is allowed" if worst > 1 else ""


def _wider(args: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[int, Any] = {}
    for arg in args.values():
        made[id(arg)] = arg
        if isinstance(arg, Tensor) and arg.is_floating_point():
            made[id(arg)] = arg.to(torch.float64 if arg.dtype == torch.float32 else torch.float32)
    return {name: made[id(arg)] for name, arg in args.items()}


def line(reason: str | Exception) -> str:
    """The first line of an error, and its type."""
    return reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}".splitlines()[0]


def serve(requests: Iterator[str], answer: Callable[[str], object]) -> None:
    """The other process: for each specified call a line of JSON, the verdict and whether the process is still of
    use."""
    for request in requests:
        spec, device = json.loads(request)
        usable = True
        try:
            found = check(spec, torch.device(device))
        except Exception as error:
            usable = isinstance(error, torch.OutOfMemoryError)  # after an illegal access, all fails that follows
            traceback.print_exc()
            lasting = not isinstance(error, torch.OutOfMemoryError) and BUSY not in str(error)
            found = Verdict(line(error), lasting=lasting)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        answer(json.dumps([asdict(found), usable]))


class Worker:
    """A process that checks calls, started at the first and again after it has died."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", __name__), seconds: float = SECONDS) -> None:
        self.command, self.seconds = command, seconds
        self._process: subprocess.Popen[str] | None = None

    def check(self, spec: Mapping[str, Any], device: torch.device, again: bool = True) -> Verdict:
        """A verdict, whatever happens to the process. again: with a new one if it has ended for want of work."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps([spec, str(device)]) + "\n")
            process.stdin.flush()
        if not _readable(process.stdout, self.seconds):
            process.kill()
            return self._ended(f"did not end within {self.seconds:.0f} s")
        answer = process.stdout.readline()
        if not answer and again and process.wait() == 0:  # it was idle for too long
            self.close()
            return self.check(spec, device, again=False)
        if not answer:
            return self._ended("ended")
        found, usable = json.loads(answer)
        if not usable:
            self.close()
        return Verdict(**found)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._errors.close()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            paths = os.pathsep.join(filter(None, sys.path))
            environment = os.environ | {VARIABLE: "triton", "DDT_KERNELS_AUTOTUNE": "0", "PYTHONPATH": paths}
            self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            self._process = subprocess.Popen(
                self.command,
                text=True,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        return self._process

    def _ended(self, how: str) -> Verdict:
        process, self._process = self._process, None
        assert process is not None
        process.communicate()
        code = process.returncode
        self._errors.seek(0)
        by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        last = self._errors.read().strip().splitlines()[-1:]
        self._errors.close()
        return Verdict(": ".join([f"the process that checked it {how} ({by})", *last]))


@cache
def worker() -> Worker:
    made = Worker()
    atexit.register(made.close)
    return made


def _readable(stream: IO[str], seconds: float) -> bool:
    """Whether there is something to read, or its end, within that time."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _requests() -> Iterator[str]:
    """Lines of stdin, of which there is never more than one to read, until it ends or none comes for a while."""
    while _readable(sys.stdin, IDLE_SECONDS) and (line := sys.stdin.readline()):
        yield line


def _main() -> None:
    """stdout is for verdicts alone: whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(_requests(), lambda found: print(found, file=answers, flush=True))


if __name__ == "__main__":
    _main()
