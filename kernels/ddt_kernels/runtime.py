"""Triton, if it is installed, and the one way this package launches a kernel.

`from ddt_kernels.runtime import launch, tl, triton` works everywhere. Without triton (on macOS, for example) kernel
definitions can still be read, so the package imports and its CPU implementations run; launching a kernel raises.

Every launch goes through `launch`, in a function decorated by `launcher.launcher`, which on a GPU runs once for each
signature of its arguments, for a `Tape`. A launcher can also be run just to see its launches: `ddt_kernels.aot` calls
them on meta tensors under `recording` and compiles exactly what a GPU would have run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any, TypeVar

import torch

from ddt_kernels import verification

try:
    if verification.mode() == "torch":
        raise ImportError
    import triton
    import triton.language as tl

    HAS_TRITON = True
    _compiling = not triton.knobs.runtime.interpret  # read when kernels are defined, as triton does
except ImportError:
    HAS_TRITON = _compiling = False

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

SMS = {80: 108, 90: 132, 100: 148}  # A100, H100 and H200, B200

Function = TypeVar("Function", bound=Callable[..., Any])
Recorder = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
_recorder: Recorder | None = None
_recorded_grid: tuple[int, ...] = ()


def empty(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A new contiguous tensor on the device of `like`, and of its dtype unless another is given, in a launcher."""
    made = like.new_empty(shape, dtype=dtype)
    if _tape is not None:
        _tape.allocated.append(made)
    return made


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
    """Runs `kernel[grid](*args, **meta)` on `device`; in a launcher, a known signature takes little host time. CPU
    tensors reach a kernel only under TRITON_INTERPRET=1, meta tensors only under `recording`.

    args: first tensors (or their descriptors), then numbers; meta: constexprs and options.
    """
    global _recorded_grid
    if _recorder is not None:
        _recorded_grid = grid
        _recorder(kernel, args, meta)
    elif _tape is not None:
        _tape.launches.append(_Launch(_tape, kernel, grid, args, meta))
    else:
        with current_device(device):
            kernel[grid](*args, **meta)


@contextmanager
def untaped() -> Iterator[None]:
    """In a launcher: `launch` runs the kernel at once, and a later call will not."""
    global _tape
    tape, _tape = _tape, None
    try:
        yield
    finally:
        _tape = tape


def provisional() -> None:
    """In a launcher: the next call of the same signature is to run it again."""
    if _tape is not None:
        _tape.provisional = True


def current_device(device: torch.device) -> Any:
    """Inside, triton compiles for `device` and launches on it."""
    return torch.cuda.device(device.index) if device.type == "cuda" else nullcontext()


class Tape:
    """What a launcher does for one signature."""

    def __init__(
        self, device: torch.device, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        global _tape
        self.device = device
        self.allocated: list[torch.Tensor] = []
        self.launches: list[_Launch] = []
        self.provisional = False
        # A tensor may have been given twice, and two of its kind another time: as objects of their own, they differ.
        given = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in (*args, *kwargs.values())]
        self.given = [arg for arg in given if isinstance(arg, torch.Tensor)]
        with _recording_tape, current_device(self.device):
            assert _tape is None, "a launcher calls no other launcher"
            _tape = self
            try:
                result = function(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
            finally:
                _tape = None
        self.outputs = [(made.shape, made.stride(), made.dtype) for made in self.allocated]
        self.result = self._places(result)
        self.given, self.allocated = [], []  # keeps no tensor alive

    def _places(self, result: Any) -> Any:
        """Which of the allocated tensors are returned."""
        if result is None or isinstance(result, tuple):
            return None if result is None else tuple(map(self._places, result))
        return next(index for index, made in enumerate(self.allocated) if made is result)

    def source(self, tensor: torch.Tensor) -> tuple[int, int]:
        """(which of the given and then the allocated tensors it is or is a view of, the bytes it is further on)."""
        for index, known in enumerate((*self.given, *self.allocated)):
            if known is tensor:
                return index, 0
        for index, made in enumerate(self.allocated, len(self.given)):
            if made.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                return index, tensor.data_ptr() - made.data_ptr()
        raise AssertionError("a launch takes the launcher's arguments, what it allocated by `empty`, or views of that")

    def play(self, pointers: list[int], *_: Any) -> Any:
        """Allocates and launches; returns what the launcher does. pointers: of the tensors among its arguments."""
        device = self.device  # of all ways to allocate, empty_strided takes the least time
        made = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in self.outputs
        ]
        pointers += [tensor.data_ptr() for tensor in made]
        with current_device(self.device):
            for launch in self.launches:
                launch.run(pointers)
        if isinstance(self.result, tuple):
            return tuple([index if index is None else made[index] for index in self.result])
        return self.result if self.result is None else made[self.result]


class _Launch:
    """A compiled kernel, its grid and its arguments, of which tensors are pointers to fill in."""

    def __init__(
        self, tape: Tape, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]
    ) -> None:
        self.args = [*args, *(meta[name] for name in kernel.arg_names[len(args) :])]
        self.pointers: list[tuple[int, int, int]] = []  # place among the arguments, source, bytes from its start
        self.descriptors: list[tuple[int, int, int, type, dict[str, Any]]] = []  # also their class and fields
        for place, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                self.pointers.append((place, *tape.source(arg)))
            elif hasattr(arg, "block_shape"):
                self.descriptors.append((place, *tape.source(arg.base), type(arg), vars(arg) | {"base": None}))
            else:
                continue
            self.args[place] = None
        self.kernel = kernel.warmup(*args, grid=grid, **meta)[(*grid, 1, 1)[:3]]

    def run(self, sources: list[int]) -> None:
        args = self.args.copy()
        for place, source, offset in self.pointers:
            args[place] = sources[source] + offset
        for place, source, offset, kind, fields in self.descriptors:
            descriptor: Any = object.__new__(kind)  # its checks were made when the tape was
            args[place] = descriptor
            vars(descriptor).update(fields, base=_Pointer(sources[source] + offset))
        self.kernel(*args)


class _Pointer(int):
    """The address of a tensor, as triton asks for it."""

    def data_ptr(self) -> int:
        return self


_tape: Tape | None = None
_recording_tape = RLock()


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def taping() -> bool:
    """Whether launchers now make and play tapes: there is triton, and launches are neither recorded nor interpreted."""
    return _recorder is None and _compiling


def inlined(x: torch.Tensor) -> bool:
    """Whether a call on x is being compiled for a CPU. It is then plain PyTorch, which Inductor fuses and autograd
    differentiates, instead of an operator opaque to both. An exported graph keeps operators: it may run on a GPU."""
    return x.device.type == "cpu" and torch.compiler.is_compiling() and not _exporting()


def constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, without its import of torch._dynamo, which takes as long as torch's."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_result
def _exporting() -> bool:
    """torch.compiler.is_exporting(), evaluated: torch 2.11, while compiling, assumes that it returns True."""
    return torch.compiler.is_exporting()


def without_autocast(x: torch.Tensor) -> torch.autocast:
    """For PyTorch's own GEMMs in an operator on x: keeps torch.autocast from changing the promised dtype."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Inside, launchers hand (kernel, args, meta) to `recorder` and launch nothing; `recorded_grid` has the grid."""
    global _recorder
    previous, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = previous


def recorded_grid() -> tuple[int, ...]:
    """The grid of the latest launch that was recorded."""
    return _recorded_grid


def multiprocessors(device: torch.device) -> int:
    """How many SMs it has; of an H200 when interpreted, of the chip that is compiled for on meta tensors."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return SMS[target_arch(device)]


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


def tensor_descriptor(tensor: torch.Tensor, block: tuple[int, ...], strides: Sequence[int] | None = None) -> Any:
    """A host-side descriptor of `tensor`, which the copy engine (TMA, from sm_90) moves in blocks of that shape.

    Reads outside the tensor give zeros, writes there are dropped. `descriptor_fits` says which tensors can have one.
    strides: in place of the tensor's.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, tensor.shape, tensor.stride() if strides is None else strides, list(block))


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
