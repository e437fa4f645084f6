"""Triton, if it is installed, and the one way this package launches a kernel.

`from ddt_kernels.runtime import launch, tl, triton` works everywhere. Without triton (on macOS, for example) kernel
definitions can still be read, so the package imports and its CPU implementations run; launching a kernel raises.

Every launch goes through `launch`, so a launcher can also be run just to see its arguments: `ddt_kernels.aot` calls
the launchers on meta tensors under `recording` and compiles exactly what a GPU would have run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    _compiling = not triton.knobs.runtime.interpret  # read when kernels are defined, as triton does
except ImportError:

    class _UnavailableKernel:
        def __init__(self, function: Callable[..., Any]) -> None:
            self.__name__ = function.__name__

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            raise RuntimeError(f"{self.__name__} is a Triton kernel and triton is not installed: pip install triton")

    class _UnavailableTriton:
        """All that reading a kernel definition needs: the decorator and the annotation."""

        jit = _UnavailableKernel
        constexpr = staticmethod(lambda value: value)

    triton = tl = _UnavailableTriton()
    _compiling = False

Recorder = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
_recorder: Recorder | None = None
_recorded_grid: tuple[int, ...] = ()


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
    """Runs `kernel[grid](*args, **meta)` on `device`, whatever the current device.

    CPU tensors reach a kernel only under TRITON_INTERPRET=1, meta tensors only under `recording`.
    """
    global _recorded_grid
    if _recorder is not None:
        _recorded_grid = grid
        _recorder(kernel, args, meta)
    elif device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def launches_run(device: torch.device) -> bool:
    """Whether a launch on `device` would now run compiled code on a GPU: not recorded, interpreted or on a CPU."""
    return device.type == "cuda" and _recorder is None and _compiling


def inlined(x: torch.Tensor) -> bool:
    """Whether a call on x is being compiled for a CPU. It is then plain PyTorch, which Inductor fuses and autograd
    differentiates, instead of an operator opaque to both. An exported graph keeps operators: it may run on a GPU."""
    return x.device.type == "cpu" and torch.compiler.is_compiling() and not _exporting()


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    """torch.compiler.is_exporting(), evaluated: torch 2.11, while compiling, assumes that it returns True."""
    return torch.compiler.is_exporting()


def without_autocast(x: torch.Tensor) -> torch.autocast:
    """For PyTorch's own GEMMs in an operator on x: keeps torch.autocast from changing the promised dtype."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Inside, `launch` hands (kernel, args, meta) to `recorder` instead of launching; `recorded_grid` has the grid."""
    global _recorder
    previous, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = previous


def recorded_grid() -> tuple[int, ...]:
    """The grid of the latest launch that was recorded."""
    return _recorded_grid


def target_arch(device: torch.device) -> int:
    """The compute capability that kernels for `device` are compiled for, major · 10 + minor; 90 when interpreted.

    On meta tensors, that is under `recording`, it is the one `ddt_kernels.aot` is compiling for.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major * 10 + minor
    if device.type == "meta":
        arch: int = triton.runtime.driver.active.get_current_target().arch
        return arch
    return 90


def tensor_descriptor(tensor: torch.Tensor, block: tuple[int, ...]) -> Any:
    """A host-side descriptor of `tensor`, which the copy engine (TMA, from sm_90) moves in blocks of that shape.

    Reads outside the tensor give zeros, writes there are dropped. `descriptor_fits` says which tensors can have one.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, list(block))


def descriptor_fits(tensor: torch.Tensor) -> bool:
    """Whether the hardware can describe it: base and pitches multiples of 16 bytes, no overlap, unit last stride."""
    size, columns = tensor.element_size(), tensor.shape[-1]
    aligned = tensor.device.type == "meta" or tensor.data_ptr() % 16 == 0
    pitches = tensor.stride()[:-1]
    return aligned and tensor.stride(-1) == 1 and all(p >= columns and p * size % 16 == 0 for p in pitches)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
