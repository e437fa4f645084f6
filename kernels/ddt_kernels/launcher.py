"""The decorator of functions that launch kernels: little host time, and on a GPU only what was verified there.

At the first call with a signature, a launcher's kernels are verified against its plain version (`verification`), in
the configuration that is fastest (`tuning.choose`), and may compete with torch.compile of the plain version. What has
been found out is kept, also for other processes; whatever loses or fails is never launched again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ddt_kernels import runtime, tuning, verification
from ddt_kernels.runtime import without_autocast
from ddt_kernels.store import store
from ddt_kernels.verification import COMPILED

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_collected: list[dict[str, Any]] | None = None
Run = Callable[[list[int], tuple[Any, ...], dict[str, Any]], Any]

RIVALS = ("triton", COMPILED)
WORTH_COMPILING = 1 << 20  # elements of the largest tensor; with fewer, a pass takes less time than its launch


def launcher(
    op: str,
    plain: Callable[Parameters, Result],
    samples: dict[str, int],
    compiled: bool = False,
    writes: tuple[str, ...] = (),
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorates a function that allocates outputs by `empty`, calls `launch`, and returns such outputs: one, None, or a
    tuple.

    On a GPU the function runs once for each signature of its arguments: of tensors (all on one device) their shape,
    strides, dtype and alignment to 16 bytes; of others, which must be hashable, their value. From then on a call only
    allocates the same outputs and launches the same compiled kernels, on the device of its tensors. So the function may
    read nothing else and call no other launcher, and the tensors that it launches with are its arguments, what it
    allocated, or views of that.

    Args:
        op: its name for users.
        plain: the same in PyTorch, which runs where the kernels must not.
        samples: which axis of an argument has the samples, for those that have one.
        compiled: torch.compile of `plain` may be as fast: whichever is faster on this GPU runs, on large tensors.
        writes: the arguments that it writes to.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        known: dict[tuple[Any, ...], Run] = {}

        @wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Any:
            if not runtime.taping() and not _untriton(args):
                return function(*args, **kwargs)
            pointers: list[int] = []
            signature: list[Any] = [*kwargs]
            device = None
            for arg in (*args, *kwargs.values()):
                if isinstance(arg, Tensor):
                    device = device or arg.device
                    pointer = arg.data_ptr()
                    pointers.append(pointer)
                    signature += arg.shape, arg.stride(), arg.dtype, pointer & 15
                else:
                    signature.append(arg)
            assert device is not None
            key = (device, *signature)
            run = known.get(key)
            if run is None:
                run, lasting = _decide(call, args, kwargs, device)
                if lasting:
                    known[key] = run
            return run(pointers, args, kwargs)

        vars(call).update(op=op, plain=plain, samples=samples, compiled=compiled, writes=writes, known=known)
        return call

    return decorate


def _untriton(args: tuple[Any, ...]) -> bool:
    """Whether these are on a GPU and there is no triton: then PyTorch does the work."""
    return not runtime.HAS_TRITON and any(isinstance(arg, Tensor) and runtime.is_gpu(arg.device) for arg in args)


@contextmanager
def collecting() -> Iterator[list[dict[str, Any]]]:
    """Inside, launchers on a GPU run their plain versions where they have not run yet; yields the specifications of
    what would have been verified."""
    global _collected
    _collected = []
    try:
        with tuning.untimed():
            yield _collected
    finally:
        _collected = None


def _decide(launcher: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> tuple[Run, bool]:
    """What runs on such arguments, and whether that is settled."""
    if not runtime.is_gpu(device):  # a stand-in for one: `compilation.launching_into`
        return runtime.Tape(device, launcher.__wrapped__, args, kwargs).play, True
    if not runtime.HAS_TRITON:
        return _replaced(launcher, "triton is not installed: pip install triton"), True
    if _collected is not None:
        _collected.append(verification.specification(launcher, args, kwargs, competes(launcher, args, kwargs, device)))
        return _in_pytorch(launcher.plain), False
    with store(device).alone():  # one process of a node compiles and times; the others find what it left
        verdict = verification.verdict(launcher, args, kwargs, device, competes(launcher, args, kwargs, device))
        if verdict.reason:
            return _replaced(launcher, verdict.reason), True
        try:
            with tuning.without(verdict.candidates):
                tape = runtime.Tape(device, launcher.__wrapped__, args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler or the driver, on sizes that were not verified
            return _replaced(launcher, error), True
        if tape.provisional or not competes(launcher, args, kwargs, device) or COMPILED in verdict.candidates:
            tuning.note(launcher.op, "triton")
            return tape.play, not tape.provisional
        return _fastest(launcher, tape, args, kwargs, device)


def _replaced(launcher: Any, reason: str | Exception) -> Run:
    """The plain version, with a warning unless it was asked for."""
    mode = verification.mode()
    if mode == "triton" and isinstance(reason, Exception):
        raise reason
    if mode != "torch":
        verification.warn_once(f"{launcher.op} runs in PyTorch", verification.line(reason))
    tuning.note(launcher.op, "torch")
    return _in_pytorch(launcher.plain)


def competes(launcher: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> bool:
    """Whether torch.compile of the plain version may run on such arguments: it has not lost against the kernels yet."""
    large = any(isinstance(arg, Tensor) and arg.numel() >= WORTH_COMPILING for arg in args)
    if not (launcher.compiled and large and verification.mode() == "auto" and tuning.timing_enabled()):
        return False
    return tuning.known(launcher.op, _kind(launcher, args, kwargs), RIVALS, device) != "triton"


def _kind(launcher: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """What of a call decides its contest: everything but the numbers of samples and tokens, with which the time of a
    pass over memory grows whatever runs."""

    def word(value: Any) -> str:
        if not isinstance(value, Tensor):
            return str(value)
        wide = "x" if value.ndim < 2 or value.shape[-2] == 1 else "Nx"
        return f"{str(value.dtype).removeprefix('torch.')}[{wide}{value.shape[-1]}]"

    given = verification.bound(launcher, args, kwargs)
    return tuple(f"{name}={word(value)}" for name, value in given.items() if value is not None)


def _fastest(
    launcher: Any, tape: runtime.Tape, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> tuple[Run, bool]:
    runs = dict(zip(RIVALS, (tape.play, _in_pytorch(tuning.compiled_version(launcher.plain))), strict=True))
    given = verification.bound(launcher, args, kwargs)
    copies = verification.copies(given, launcher.writes)  # calls for timing must not change what others read
    pointers = [value.data_ptr() for value in copies.values() if isinstance(value, Tensor)]
    chosen, settled = tuning.decide(
        *(launcher.op, _kind(launcher, args, kwargs), RIVALS, RIVALS[0]),
        *(lambda name: runs[name]([*pointers], (), copies), device),
    )
    tuning.note(launcher.op, chosen)
    return runs[chosen], settled


def _in_pytorch(function: Callable[..., Any]) -> Run:
    def run(_: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        with torch.no_grad(), without_autocast(tensor):
            return function(*args, **kwargs)

    return run
