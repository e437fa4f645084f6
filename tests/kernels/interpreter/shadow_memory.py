"""Shadow memory: Triton's interpreter, made to notice what a GPU forgives until it does not.

In every launch, no element is written by two programs, none is read by one program and written by another, and no
access leaves the tensor its pointer came from: not for what lies between a view's rows either, nor for another
argument. Masked elements, and those of a block that lie outside a descriptor, are no accesses. A violation raises
ShadowMemoryError before memory is touched. Atomics are refused: no kernel of this package uses them.

The bits of a pointer that no address uses carry the argument it came from, through all arithmetic on pointers.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, InterpreterError, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

ADDRESS_BITS = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)
NOBODY, SEVERAL = -1, -2


class ShadowMemoryError(AssertionError):
    """Names the kernel, the argument and the element."""


class Shadow:
    """Which program wrote and which read each unit of one storage. A unit is the smallest element among its views."""

    def __init__(self, storage: torch.UntypedStorage, unit: int) -> None:
        self.address, self.unit = storage.data_ptr(), unit
        self.writer = np.full(storage.nbytes() // unit, NOBODY, np.int32)
        self.reader = self.writer.copy()


class Argument:
    """A tensor argument: its first address, tagged, and which offsets from there are elements of it."""

    def __init__(self, name: str, tag: int, tensor: torch.Tensor, shadow: Shadow) -> None:
        self.name, self.tensor, self.shadow = name, tensor, shadow
        self.size = tensor.element_size()
        self.start = np.uint64(tensor.data_ptr() | tag << int(ADDRESS_BITS))
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.extent = last + 1 if tensor.numel() else 0
        self.inside = np.full(self.extent, tensor.is_contiguous())
        self.inside[self.offsets().reshape(-1)] = True

    def offsets(self) -> np.ndarray:
        """Of every element, in the tensor's shape."""
        return torch.arange(self.extent).as_strided(self.tensor.shape, self.tensor.stride()).numpy()

    def units(self, offsets: np.ndarray) -> np.ndarray:
        """Units of the shadow, one row per element."""
        first = (self.tensor.data_ptr() - self.shadow.address + offsets * self.size) // self.shadow.unit
        return first[:, None] + np.arange(self.size // self.shadow.unit)

    def element(self, offset: int) -> str:
        index = np.argwhere(self.offsets() == offset)[0].tolist()
        return f"{self.name}{index}"


@dataclass
class Launch:
    kernel: str
    names: dict[int, str]  # of tensors, by id
    units: dict[int, int]  # of storages, by address
    arguments: list[Argument] = field(default_factory=list)  # by tag
    shadows: dict[int, Shadow] = field(default_factory=dict)  # by the storage's address
    error: ShadowMemoryError | None = None

    def add(self, tensor: torch.Tensor) -> np.uint64:
        """The tagged address of an argument."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self.shadows:
            self.shadows[address] = Shadow(storage, self.units[address])
        name, tag = self.names[id(tensor)], len(self.arguments)
        self.arguments.append(Argument(name, tag, tensor, self.shadows[address]))
        return self.arguments[-1].start

    def fail(self, message: str) -> None:
        self.error = ShadowMemoryError(f"{self.kernel}: {message}")
        raise self.error

    def access(self, builder: InterpreterBuilder, pointers: np.ndarray, mask: np.ndarray, writes: bool) -> None:
        pointers = pointers[np.broadcast_to(mask, pointers.shape)]
        if not pointers.size:
            return
        program = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
        verb = "writes" if writes else "reads"
        argument = self.arguments[int(pointers[0] >> ADDRESS_BITS)]
        offsets, rest = np.divmod((pointers - argument.start).astype(np.int64), argument.size)
        inside = (offsets >= 0) & (offsets < argument.extent) & (rest == 0)
        inside[inside] = argument.inside[offsets[inside]]
        if not inside.all():
            layout = f"shape {tuple(argument.tensor.shape)}, strides {argument.tensor.stride()}"
            at = f"{argument.name} at offset {offsets[~inside][0]}, outside the tensor ({layout})"
            self.fail(f"program {builder.grid_idx} {verb} {at}")
        units, shadow = argument.units(offsets), argument.shadow
        for kind, owners in (("wrote", shadow.writer), ("read", shadow.reader))[: 2 if writes else 1]:
            conflicts = (owners[units] != NOBODY) & (owners[units] != program)
            if conflicts.any():
                at = argument.element(int(offsets[conflicts.any(1)][0]))
                owner = int(owners[units][conflicts][0])
                other = "another program" if owner == SEVERAL else f"program {self.position(builder, owner)}"
                self.fail(f"program {builder.grid_idx} {verb} {at}, which {other} {kind}")
        if writes:
            shadow.writer[units] = program
        else:
            readers = shadow.reader[units]
            shadow.reader[units] = np.where((readers == NOBODY) | (readers == program), program, SEVERAL)

    @staticmethod
    def position(builder: InterpreterBuilder, program: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(program, builder.grid_dim))


_launch: Launch | None = None


def _launched(call):
    def launched(self, *args, **kwargs):
        global _launch
        names, units = {}, {}
        prepare = self._init_args_hst

        def prepared(*given):
            positional, named = prepare(*given)
            for name, value in (*zip(self.arg_names, positional, strict=False), *named.items()):
                tensor = value.base if isinstance(value, TensorDescriptor) else value
                if isinstance(tensor, torch.Tensor):
                    names[id(tensor)] = name
                    address, size = tensor.untyped_storage().data_ptr(), tensor.element_size()
                    units[address] = math.gcd(size, units.get(address, size))
            return positional, named

        self._init_args_hst = prepared
        _launch = launch = Launch(self.fn.__name__, names, units)
        try:
            return call(self, *args, **kwargs)
        except InterpreterError:
            if launch.error is not None:
                raise launch.error from None
            raise
        finally:
            _launch = None

    return launched


def _tagged(convert):
    def tagged(value):
        converted = convert(value)
        if isinstance(value, torch.Tensor):
            converted.handle.data = np.array([_launch.add(value)], np.uint64)
        return converted

    return tagged


def _checked(method, writes):
    def checked(self, pointers, *rest, **options):
        mask = rest[1 if writes else 0]
        _launch.access(self, pointers.data, mask.data, writes)
        return method(self, TensorHandle(pointers.data & ADDRESS, pointers.dtype), *rest, **options)

    return checked


def _refuse_atomics(self, *args):
    _launch.fail("atomics are not covered by the shadow memory")


def install() -> None:
    """Puts every launch of this process under shadow memory; once."""
    builder = InterpreterBuilder
    if builder.create_atomic_cas is _refuse_atomics:
        return
    builder.create_masked_load = _checked(builder.create_masked_load, writes=False)
    builder.create_masked_store = _checked(builder.create_masked_store, writes=True)
    builder.create_atomic_cas = builder.create_atomic_rmw = _refuse_atomics
    interpreter._implicit_cvt = _tagged(interpreter._implicit_cvt)
    GridExecutor.__call__ = _launched(GridExecutor.__call__)
