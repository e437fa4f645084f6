"""Chooses among implementations of an op, or its tile configurations, by timing them on this GPU, once.

`choose` gets the candidates and a function that runs one of them. The first call for a key times every candidate, about
20 ms each besides compiling them, waits for the GPU and borrows twice its L2 cache in memory. The fastest is kept in
the `store`: other processes and later runs take the same. Nothing is timed while a CUDA graph is being captured, while
torch.compile traces, or while another process of this node times something: a first call during a capture takes the
default, so call an op once before capturing it.

DDT_KERNELS_AUTOTUNE=0 turns timing off: the choice is then the default, a pure function of shape, dtype and chip, and
results are the same bits on every machine with that chip. (Each configuration repeats bit for bit, but they add in
different orders, and a close race may have different winners.) 1, the default, turns it on; anything else is a
ValueError.
"""

import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ddt_kernels import runtime, verification
from ddt_kernels.store import store

VARIABLE = "DDT_KERNELS_AUTOTUNE"
TIE = 1.02  # up to this ratio to the fastest, the first candidate wins
SECONDS = 0.02  # of launches that are timed, in 5 to 30 rounds
CLOCK = 2e9  # cycles a second, about: how long the GPU sleeps while launches are queued

Config = TypeVar("Config")
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Choice:
    """The result of a timing: the candidate that is used, by name, and the median milliseconds of those that ran."""

    op: str
    device: torch.device
    key: Key
    chosen: str
    milliseconds: dict[str, float]


_choices: dict[tuple[str, torch.device, Key], Choice] = {}
_running: dict[str, set[str]] = {}
_excluded: Collection[str] = ()
_trial: "Trial | None" = None
_timing = True


def choices() -> list[Choice]:
    """What this process has chosen by timings, its own or kept ones, oldest first."""
    return list(_choices.values())


def note(op: str, implementation: str) -> None:
    """Say that an op runs so, for `running`."""
    _running.setdefault(op, set()).add(implementation)


def running() -> dict[str, str]:
    """How each op of this process has run on a GPU so far: by name, its implementation, or several with "and"."""
    return {op: " and ".join(sorted(names)) for op, names in sorted(_running.items())}


def timing_enabled() -> bool:
    """What DDT_KERNELS_AUTOTUNE says; a ValueError if it is neither 0 nor 1."""
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} is {value!r}; expected 0 (never time candidates) or 1 (time them once)")
    return value == "1"


@contextmanager
def untimed() -> Iterator[None]:
    """Inside, nothing is timed, as during a capture."""
    global _timing
    _timing = False
    try:
        yield
    finally:
        _timing = True


@contextmanager
def without(candidates: Collection[str]) -> Iterator[None]:
    """Inside, `choose` takes none of these, by name: they have failed."""
    global _excluded
    previous, _excluded = _excluded, candidates
    try:
        yield
    finally:
        _excluded = previous


@dataclass
class Trial:
    """Makes `choose` take a candidate by its index, the last if there are fewer, and remembers the names of all."""

    index: int
    names: tuple[str, ...] = ()

    @contextmanager
    def running(self) -> Iterator[None]:
        global _trial
        _trial = self
        try:
            yield
        finally:
            _trial = None

    def take(self, candidates: Sequence[Config]) -> Config:
        self.names = tuple(map(str, candidates))
        return candidates[min(self.index, len(candidates) - 1)]


def choose(
    op: str,
    key: Key,
    candidates: Sequence[Config],
    default: Config,
    run: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The candidate to take.

    Args:
        op: what they are candidates for. key: what else the choice depends on; with op and device it determines the
            candidates. Put sizes that vary from call to call (rows) in buckets: each new key is timed.
        candidates: what may run, told apart by `str`; default: the one to take where nothing can be timed, and if
            others are not clearly faster; of those, the order decides.
        run: runs one. It is called many times, so it must write only outputs that it does not read.

    On meta tensors (`ddt_kernels.aot`) it runs all candidates except the default, which the caller is about to run:
    whatever may be chosen gets compiled.
    """
    if device.type == "meta":
        for candidate in candidates:
            if candidate != default:
                run(candidate)
        return default
    with runtime.untaped():
        chosen, settled = decide(op, key, candidates, default, run, device)
    if not settled:
        runtime.provisional()
    return chosen


def decide(
    op: str,
    key: Key,
    candidates: Sequence[Config],
    default: Config,
    run: Callable[[Config], object],
    device: torch.device,
) -> tuple[Config, bool]:
    """The candidate to take, as `choose`, and whether it is settled: another call would take the same."""
    if _trial is not None:
        return _trial.take(candidates), True
    known = _choices.get((op, device, key))
    ordered = [default, *(candidate for candidate in candidates if candidate != default)]
    named = {str(candidate): candidate for candidate in ordered if str(candidate) not in _excluded}
    if not named:
        raise RuntimeError(f"{op}: none of {', '.join(map(str, ordered))} works on this GPU")
    first = next(iter(named.values()))
    if not runtime.is_gpu(device) or len(named) == 1 or not timing_enabled():
        return first, True
    if known is None or known.chosen not in named:
        words = _words(op, key, named)
        found = store(device).get(words)
        if found is None and can_time(device):
            found = store(device).find(words, lambda: _time(named, run, device))
        if found is None:
            return first, False
        known = _choices[op, device, key] = Choice(op, device, key, found["chosen"], found["milliseconds"])
    return named[known.chosen], True


def implementation(op: str, key: Key, names: Sequence[str], run: Callable[[str], object], device: torch.device) -> str:
    """Which of an op's implementations runs, the first where nothing is timed. With DDT_KERNELS=triton, it is the first
    too. The parameters are those of `choose`."""
    chosen = names[0]
    if runtime.is_gpu(device) and len(names) > 1 and verification.mode() == "auto":
        chosen, _ = decide(op, key, names, chosen, run, device)
    note(op, chosen)
    return chosen


def known(op: str, key: Key, names: Sequence[str], device: torch.device) -> str | None:
    """What `decide` has chosen, here or in another process; None if nothing yet."""
    choice = _choices.get((op, device, key))
    found = store(device).get(_words(op, key, names)) if choice is None else None
    return choice.chosen if choice else found and found["chosen"]


def _words(op: str, key: Key, names: Iterable[str]) -> str:
    return f"{op} {' '.join(map(str, key))}: {', '.join(names)}"


def compiled_version(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of it, for any number of shapes."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 128)
    return torch.compile(function, dynamic=False)


def can_time(device: torch.device) -> bool:
    """Whether the GPU's time may be measured now."""
    interpreted = runtime.HAS_TRITON and not runtime.taping()
    if not _timing or not runtime.is_gpu(device) or interpreted or torch.compiler.is_compiling():
        return False
    with runtime.current_device(device):
        return not torch.cuda.is_current_stream_capturing()


def _time(named: dict[str, Config], run: Callable[[Config], object], device: torch.device) -> dict[str, Any] | None:
    """What the store keeps: the choice, and of each candidate its milliseconds or why it failed; None if all did, or
    memory ran out."""
    milliseconds, failed = {}, {}
    for name, candidate in named.items():
        try:
            milliseconds[name] = milliseconds_of(run, candidate, device)
        except torch.OutOfMemoryError:
            return None  # says nothing about the candidate
        except Exception as error:  # of any compiler or package
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if not milliseconds:
        return None
    fastest = min(milliseconds.values())
    chosen = next(name for name, time in milliseconds.items() if time <= TIE * fastest)
    return {"chosen": chosen, "milliseconds": milliseconds, "failed": failed}


def milliseconds_of(run: Callable[[Config], object], candidate: Config, device: torch.device) -> float:
    """The median GPU time of a run that starts with a cold L2 cache, its launches queued beforehand."""
    with torch.cuda.device(device):
        run(candidate)  # compiles
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(candidate)
        queued = time.perf_counter() - started
        torch.cuda.synchronize()
        rounds = min(max(int(SECONDS / (time.perf_counter() - started)), 5), 30)
        flushed = torch.empty(
            2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device
        )
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for start, end in events:
            flushed.zero_()
            torch.cuda._sleep(int(2 * queued * CLOCK))
            start.record()
            run(candidate)
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)
