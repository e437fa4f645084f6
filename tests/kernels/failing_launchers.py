"""Launchers as `verification` sees them, each wrong in its own way."""

import os
import signal
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ddt_kernels.tuning import choose


def doubled(x: Tensor) -> Tensor:
    return x * 2


def _launcher(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    vars(function).update(op=function.__name__, plain=doubled, samples={"x": 0})
    return function


@_launcher
def right(x: Tensor) -> Tensor:
    return x + x


@_launcher
def wrong(x: Tensor) -> Tensor:
    y = x + x
    y[-1, -1] += 1e-2
    return y


@_launcher
def unwritten(x: Tensor) -> Tensor:
    return torch.full_like(x, float("nan"))


@_launcher
def raises(x: Tensor) -> Tensor:
    raise RuntimeError("PTXAS error\nof many lines")


@_launcher
def crashes(x: Tensor) -> Tensor:
    print("out of registers", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return x


@_launcher
def hangs(x: Tensor) -> Tensor:
    time.sleep(600)
    return x


@_launcher
def runs_out_of_memory(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("of 1 TiB")


@_launcher
def has_candidates(x: Tensor) -> Tensor:
    if (chosen := choose("doubling", (), (1, 2, 3), 1, lambda candidate: None, x.device)) == 3:
        raise RuntimeError("no room")
    return x * 2 * chosen if chosen == 1 else x * 2 + 1e-6


@_launcher
def has_wrong_candidates(x: Tensor) -> Tensor:
    return x + choose("doubling", (), (1, 2, 3), 1, lambda candidate: None, x.device)


def in_place(x: Tensor, out: Tensor) -> Tensor:
    return out.copy_(x * 2)


vars(in_place).update(op="in_place", plain=in_place, samples={"x": 0, "out": 0})
