"""Whether a launcher's kernels compute on this GPU what PyTorch computes: asked once per class of calls, and kept.

A launcher with a plain implementation (`runtime.launcher`) is compared with it before its kernels run for the first
time. That happens in another process, so that an illegal access, a crash of the compiler or a kernel that never ends
cannot take the user's process down. What is found is kept in the `store`, for other processes and later runs. A
launcher that failed is replaced by its plain implementation, with a warning.

A class of calls: the launcher, dtypes, sizes and strides of its tensors, and its other arguments. It is checked with as
few samples as make MAX_ROWS tokens, on random inputs. The rule is that of the tests (`excess`).
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
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ddt_kernels.store import store

VARIABLE = "DDT_KERNELS"
MODES = ("auto", "triton", "torch")
MAX_ROWS = 8192  # tokens in a check; more change nothing but the grid
SECONDS = 120.0  # after which a check is given up; it takes some, mostly to compile
VERIFIED = "agrees"


def mode() -> str:
    """DDT_KERNELS: "auto" verifies kernels and replaces those that fail, "triton" trusts all, "torch" uses none."""
    value = os.environ.get(VARIABLE, "auto")
    if value not in MODES:
        raise ValueError(f"{VARIABLE} is {value!r}; expected auto, triton or torch")
    return value


def failure(launcher: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> str:
    """Why the launcher's kernels must not run on such arguments, of which it then warns; empty if they may."""
    if device.type != "cuda" or mode() == "triton":
        return ""
    spec = specification(launcher, args, kwargs)
    verdict: dict[str, Any] = store(device).find(json.dumps(spec), lambda: _worker().check(spec, device))
    if verdict["verdict"] == VERIFIED:
        return ""
    _warn_once(spec["launcher"], verdict["reason"])
    return str(verdict["reason"])


@cache
def _warn_once(launcher: str, reason: str) -> None:
    warnings.warn(
        f"ddt_kernels: {launcher} fails on this GPU and is replaced by PyTorch: {reason}. Please report this with the "
        f"output of python -m ddt_kernels.check; {VARIABLE}=triton uses the kernel all the same",
        stacklevel=2,
    )


def specification(launcher: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a call: tensors as {shape, strides, dtype}, with fewer samples than in `args`."""
    names = list(inspect.signature(launcher).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    axes = {name: axis for name, axis in launcher.samples.items() if given.get(name) is not None}
    first, axis = next(iter(axes.items()))
    tokens = given[first].shape[axis + 1]
    samples = min(given[first].shape[axis], max(MAX_ROWS // tokens, 1))
    described: dict[str, Any] = {}
    for name, arg in given.items():
        described[name] = arg
        if isinstance(arg, Tensor):
            shape = list(arg.shape)
            if name in axes:
                shape[axes[name]] = samples
            dtype = str(arg.dtype).removeprefix("torch.")
            described[name] = {"shape": shape, "strides": list(arg.stride()), "dtype": dtype}
    return {"launcher": f"{launcher.__module__}:{launcher.__qualname__}", "args": described}


def arguments(spec: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Random arguments of a specified call; integers are zeros."""
    generator = torch.Generator(device).manual_seed(0)

    def made(arg: Any) -> Any:
        if not isinstance(arg, dict):
            return arg
        tensor = torch.empty_strided(arg["shape"], arg["strides"], dtype=getattr(torch, arg["dtype"]), device=device)
        if not tensor.is_floating_point():
            return tensor.zero_()
        return tensor.copy_(torch.randn(arg["shape"], generator=generator, device=device))

    return {name: made(arg) for name, arg in spec["args"].items()}


def excess(actual: Tensor, plain: Tensor, exact: Tensor) -> float:
    """How far `actual` errs beyond what it may: twice the largest error of plain PyTorch in the same dtype, and two
    ulps. Above 0 it is wrong; NaN counts as infinite. exact: the same in a wider dtype."""
    wide = exact.double()
    allowed = 2 * (plain.double() - wide).abs().max() + 2 * torch.finfo(actual.dtype).eps * wide.abs()
    return float(((actual.double() - wide).abs() - allowed).nan_to_num(nan=torch.inf).max())


def results(function: Callable[..., Any], args: dict[str, Any]) -> dict[str, Tensor]:
    """What a call returns and leaves in its arguments, floats only."""
    args = {name: arg.clone() if isinstance(arg, Tensor) else arg for name, arg in args.items()}
    returned = function(*args.values())
    returned = returned if isinstance(returned, tuple) else (returned,)
    found = {f"result {index}": value for index, value in enumerate(returned)} | args
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()}


def check(spec: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The verdict on a specified call: what a launcher makes of random arguments, compared with its plain version."""
    module, _, name = spec["launcher"].partition(":")
    launcher = getattr(importlib.import_module(module), name)
    args = arguments(spec, device)
    wider = {
        name: arg.to(torch.float64 if arg.dtype == torch.float32 else torch.float32)
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg
        for name, arg in args.items()
    }
    actual, plain, exact = results(launcher, args), results(launcher.plain, args), results(launcher.plain, wider)
    for name, made in actual.items():
        compared = [made, plain[name], exact[name]]
        if made.shape != plain[name].shape:  # partial sums, of which another implementation may have another number
            compared = [tensor.sum(0) for tensor in compared]
        if made.numel() and (worst := excess(*compared)) > 0:
            return {"verdict": "wrong", "reason": f"{name} is off by {worst:.3g} more than it may be"}
    return {"verdict": VERIFIED}


def serve(requests: Iterator[str], answer: Callable[[str], object]) -> None:
    """The other process: a verdict for each specified call, a line of JSON each."""
    for request in requests:
        spec, device = json.loads(request)
        try:
            with torch.no_grad():
                verdict = check(spec, torch.device(device))
        except Exception as error:
            traceback.print_exc()
            verdict = {"verdict": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
        answer(json.dumps(verdict))


class Worker:
    """A process that checks calls, started at the first and again after it has died."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", __name__), seconds: float = SECONDS) -> None:
        self.command, self.seconds = command, seconds
        self._process: subprocess.Popen[str] | None = None

    def check(self, spec: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """A verdict, whatever happens to the process."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([spec, str(device)]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._ended("ended before it was asked")
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(self.seconds):
                process.kill()
                return self._ended(f"did not end within {self.seconds:.0f} s")
        line = process.stdout.readline()
        if not line:
            return self._ended("ended")
        verdict: dict[str, Any] = json.loads(line)
        if verdict["verdict"] == "failed":  # after an illegal access, everything fails that follows in its process
            self.close()
        return verdict

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._errors.close()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            print("ddt_kernels: verifying kernels on this GPU, once: some seconds each", file=sys.stderr, flush=True)
            environment = os.environ | {VARIABLE: "triton", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
            self._process = subprocess.Popen(
                self.command,
                text=True,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        return self._process

    def _ended(self, how: str) -> dict[str, Any]:
        process, self._process = self._process, None
        assert process is not None
        process.communicate()
        code = process.returncode
        self._errors.seek(0)
        by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        last = self._errors.read().strip().splitlines()[-1:]
        return {"verdict": "failed", "reason": ": ".join([f"the process that checked it {how} ({by})", *last])}


@cache
def _worker() -> Worker:
    worker = Worker()
    atexit.register(worker.close)
    return worker


def _main() -> None:
    """stdout is for verdicts alone: whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(iter(sys.stdin.readline, ""), lambda verdict: print(verdict, file=answers, flush=True))


if __name__ == "__main__":
    _main()
