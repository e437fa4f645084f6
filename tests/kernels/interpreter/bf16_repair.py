"""bfloat16 in Triton's interpreter, repaired.

The interpreter keeps bf16 as the uint16 of its bits and then computes with those integers: sums and dots are garbage,
no exception. It also truncates where hardware rounds to nearest even. Here every operation on bf16 handles goes through
fp32 and rounds once. `test_bf16_repair.py` asserts it. Atomics stay broken; this package uses none. And kernels that
call device functions take half the time.
"""

import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits to fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16 bits, nearest, ties to even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _through_fp32(method):
    """Widens bf16 operands, computes, narrows a float result. A comparison is an int1: the interpreter calls it by its
    operands' type, and a scalar one, once broadcast, would be an array of fp32 that no `&` takes."""

    def repaired(self, *handles):
        *operands, operation = handles
        result = method(self, *(_wide(operand) for operand in operands), operation)
        if result.data.dtype == bool:
            return TensorHandle(result.data, tl.int1)
        return TensorHandle(narrow(result.data), tl.bfloat16) if _is_bf16(operands[0]) else result

    return repaired


def _cast(method):
    def repaired(self, source, target, *rounding):
        if target.scalar == tl.bfloat16:
            data = source.data if _is_bf16(source) else narrow(source.data.astype(np.float32))
            return TensorHandle(data, tl.bfloat16)
        if _is_bf16(source):
            return TensorHandle(widen(source.data).astype(interpreter._get_np_dtype(target)), target.scalar)
        return method(self, source, target, *rounding)

    return repaired


def _fma(method):
    def repaired(self, x, y, z):
        result = method(self, _wide(x), _wide(y), _wide(z))
        return TensorHandle(narrow(result.data), tl.bfloat16) if _is_bf16(z) else result

    return repaired


def _sum(method):
    def repaired(self, operand):
        if operand.dtype != tl.bfloat16:
            return method(self, operand)
        total = np.sum(widen(operand.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrow(total), tl.bfloat16)

    return repaired


def _indexable(patch):
    """triton 3.6 cannot make a loop bound of a tensor under NumPy 2.4: arrays of one element are no longer scalars."""

    def repaired(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return repaired


def _once_per_kernel(patch):
    """Half of an interpreted kernel's time goes to patching Triton's language again for every device function it calls.
    It is patched for the kernel that calls them, so only that is left (from triton 3.7 on, which restores it after)."""
    patched: set[tuple[bool, bool]] = set()  # for functions that see tl, tl.core

    def repaired(function):
        seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        modules = tl in seen, tl.core in seen
        nested = bool(patched)
        if modules in patched:
            return None
        scope = patch(function)
        if scope is not None:
            patched.add(modules)
            if not nested:
                restore = scope.restore
                scope.restore = lambda: (patched.clear(), restore())
        return scope

    return repaired


def install() -> None:
    """Repairs the interpreter of this process; once."""
    builder = InterpreterBuilder
    if hasattr(builder, "get_bf16"):
        return
    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, d, *options: dot(self, _wide(a), _wide(b), d, *options)
    builder.cast_impl, builder.create_fp_to_fp = _cast(builder.cast_impl), _cast(builder.create_fp_to_fp)
    builder.binary_op, builder.unary_op = _through_fp32(builder.binary_op), _through_fp32(builder.unary_op)
    builder.create_fma = _fma(builder.create_fma)
    interpreter.ReduceOps.sum = _sum(interpreter.ReduceOps.sum)
    builder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)
    interpreter._patch_lang_tensor = _indexable(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _once_per_kernel(interpreter._patch_lang)
