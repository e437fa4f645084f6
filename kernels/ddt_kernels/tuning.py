"""Chooses among an op's few configurations by timing them on the caller's tensors, once per shape and process.

A launcher calls `choose` with its candidates, its cost model's choice, and a function that launches one of them. The
first call for a key times every candidate, which takes about 0.1 s besides compiling them, waits for the GPU and
borrows 256 MB of its memory to flush the L2 cache between runs; the fastest is kept until the process ends. Nothing is
timed while a CUDA graph is being captured: a first call there takes the cost model's choice, so call an op once before
capturing it.

DDT_KERNELS_AUTOTUNE=0 turns timing off: the choice is then the cost model's, a pure function of shape, dtype and chip,
and results are the same bits on every rank and in every run. (Each configuration repeats bit for bit, but they add in
different orders, and a close race may have different winners.) 1, the default, turns it on; anything else is a
ValueError.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ddt_kernels.runtime import launches_run, provisional, untaped

VARIABLE = "DDT_KERNELS_AUTOTUNE"
Config = TypeVar("Config")
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Choice:
    """The result of a timing: the fastest candidate, and the median milliseconds of each."""

    op: str
    device: torch.device
    key: Key
    config: Any
    milliseconds: tuple[tuple[Any, float], ...]


_choices: dict[tuple[str, torch.device, Key], Choice] = {}


def choices() -> list[Choice]:
    """All choices made by timing in this process so far, oldest first, for benchmarks to record."""
    return list(_choices.values())


def timing_enabled() -> bool:
    """What DDT_KERNELS_AUTOTUNE says; a ValueError if it is neither 0 nor 1."""
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} is {value!r}; expected 0 (never time configurations) or 1 (time them once)")
    return value == "1"


def choose(
    op: str,
    key: Key,
    candidates: Sequence[Config],
    default: Config,
    run: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The configuration to launch.

    Args:
        op: the kernel's name. key: what else the choice depends on; with op and device it determines the candidates.
            Put sizes that vary from call to call (rows) in buckets: each new key is timed.
        candidates: what may be launched; default: the one to take where nothing can be timed.
        run: launches one. It is called many times, so it must write only outputs that it does not read.

    On meta tensors (`ddt_kernels.aot`) it runs all candidates except the default, which the caller is about to run:
    whatever may be chosen gets compiled.
    """
    if device.type == "meta":
        for candidate in candidates:
            if candidate != default:
                run(candidate)
        return default
    if len(candidates) == 1 or not timing_enabled():
        return default
    known = _choices.get((op, device, key))
    if known is None:
        if not _can_time(device):
            provisional()
            return default
        with untaped():
            timed = [(candidate, _milliseconds(run, candidate, device)) for candidate in candidates]
        known = Choice(op, device, key, min(timed, key=lambda pair: pair[1])[0], tuple(timed))
        _choices[op, device, key] = known
    config: Config = known.config
    return config


def _can_time(device: torch.device) -> bool:
    if not launches_run(device):
        return False
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()


def _milliseconds(run: Callable[[Config], object], candidate: Config, device: torch.device) -> float:
    """The median of some 20 ms of launches, each with a cold L2 cache."""
    from triton.testing import do_bench

    with torch.cuda.device(device):
        return float(do_bench(lambda: run(candidate), warmup=5, rep=20, return_mode="median"))
