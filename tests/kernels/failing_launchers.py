"""Launchers as `verification` sees them, each wrong in its own way."""

import os
import signal
import time
from collections.abc import Callable

import torch
from torch import Tensor


def doubled(x: Tensor) -> Tensor:
    return x * 2


def _launcher(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    function.plain, function.samples = doubled, {"x": 0}  # type: ignore[attr-defined]
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
    os.kill(os.getpid(), signal.SIGSEGV)
    return x


@_launcher
def hangs(x: Tensor) -> Tensor:
    time.sleep(600)
    return x
