"""Argument checks shared by the public functions. A user's mistake is a ValueError raised before any launch; it names
the op, the argument, what was given and what is expected. A correct call costs a few comparisons and builds no string.
"""

import math
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
DEVICES = ("cpu", "cuda", "meta")


def fail(op: str, name: str, given: str, expected: str) -> NoReturn:
    """Raises the ValueError of every check. given: a verb and the rest, such as "has shape (2, 3)"."""
    raise ValueError(f"{op}: {name} {given}; expected {expected}")


def kind_of(value: object) -> str:
    """What was given instead, in one line: "is None", "is a list", "is an int"."""
    kind = type(value).__name__
    return "is None" if value is None else f"is a{'n' * (kind[0] in 'aeiou')} {kind}"


def check_tensor(op: str, name: str, value: object) -> None:
    """A torch.Tensor without a tangent: operators drop tangents, so torch would take the result for a constant."""
    if not isinstance(value, Tensor):
        fail(op, name, kind_of(value), "a torch.Tensor")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        fail(op, name, "is a dual tensor of forward-mode differentiation", "reverse mode, or ddt_kernels.reference")


def check_kind(op: str, name: str, x: Tensor) -> None:
    """bf16, fp16 or fp32, or fp64 on a CPU; on a CPU, CUDA or (for `aot`) meta device."""
    if x.dtype not in FLOATS and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        fail(op, name, f"is {x.dtype} on {x.device}", "bfloat16, float16 or float32 (float64 on a CPU only)")
    if x.device.type not in DEVICES:
        fail(op, name, f"is on {x.device}", "a CPU or CUDA tensor")


def check_activations(op: str, name: str, x: Tensor, max_channels: int) -> None:
    """x must be a non-empty (B, N, C) with C ≤ max_channels, unit last stride, bf16, fp16, fp32 (or fp64 on a CPU)."""
    check_tensor(op, name, x)
    if x.ndim != 3:
        fail(op, name, f"has shape {tuple(x.shape)}", "shape (B, N, C)")
    check_kind(op, name, x)
    B, N, C = x.shape
    if B < 1 or N < 1 or not 1 <= C <= max_channels:
        fail(op, name, f"has shape {tuple(x.shape)}", f"B and N at least 1, C in 1..{max_channels}")
    check_unit_stride(op, name, x)


def check_unit_stride(op: str, name: str, tensor: Tensor) -> None:
    """The last dimension must be contiguous; the others may have any stride."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        fail(op, name, f"has strides {tuple(tensor.stride())}", "a last stride of 1")


def check_same_kind(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Same dtype and device as `like`, the op's first argument."""
    if tensor.dtype != like.dtype:
        fail(op, name, f"is {tensor.dtype}", f"{like.dtype}, like the first argument")
    if tensor.device != like.device:
        fail(op, name, f"is on {tensor.device}", f"{like.device}, like the first argument")


def check_like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Same shape, dtype and device as x, unit last stride."""
    check_tensor(op, name, tensor)
    if tensor.shape != x.shape:
        fail(op, name, f"has shape {tuple(tensor.shape)}", f"{tuple(x.shape)}, like the first argument")
    check_same_kind(op, name, tensor, x)
    check_unit_stride(op, name, tensor)


def check_modulation(
    op: str, name: str, modulation: Tensor, x: Tensor, tokens: int, history: tuple[int, ...] = (), like: str = ""
) -> None:
    """(*history, B, tokens, C) for x's B and C, where tokens is N or 1; x's dtype and device, unit last stride.

    `tokens` is the first modulation's: all modulations of a call have the same granularity. history: a forecast's (K,).
    like: the first modulation's name, empty if this is it.
    """
    check_tensor(op, name, modulation)
    B, N, C = x.shape
    if modulation.shape != (*history, B, tokens, C) or tokens not in (1, N):
        given = f"has shape {tuple(modulation.shape)}"
        if like:
            fail(op, name, given, f"{(*history, B, tokens, C)}, like {like}")
        fail(op, name, given, f"{(*history, B, 1, C)} (per sample) or {(*history, B, N, C)} (per token)")
    check_same_kind(op, name, modulation, x)
    check_unit_stride(op, name, modulation)


def check_forecast(op: str, forecast: object, history: int, x: Tensor) -> None:
    """(weights, step) on x's device: (steps, history) fp32, contiguous, and an int32 or int64 of shape () or (1,)."""
    if not isinstance(forecast, tuple) or len(forecast) != 2:
        given = f"is a tuple of {len(forecast)}" if isinstance(forecast, tuple) else kind_of(forecast)
        fail(op, "forecast", given, "a tuple (weights, step)")
    weights, step = forecast
    names = "forecast[0] (weights)", "forecast[1] (step)"
    for name, tensor in zip(names, forecast, strict=True):
        check_tensor(op, name, tensor)
        if tensor.device != x.device:
            fail(op, name, f"is on {tensor.device}", f"{x.device}, like the first argument")
    if weights.ndim != 2 or weights.shape[0] < 1 or weights.shape[1] != history:
        given = f"has shape {tuple(weights.shape)}"
        fail(op, names[0], given, f"(steps, {history}), a column for each cached modulation")
    if weights.dtype != torch.float32:
        fail(op, names[0], f"is {weights.dtype}", "torch.float32")
    if not weights.is_contiguous():
        fail(op, names[0], f"has strides {weights.stride()}", "a contiguous tensor")
    if step.dtype not in (torch.int32, torch.int64):
        fail(op, names[1], f"is {step.dtype}", "torch.int32 or torch.int64")
    if step.shape not in ((), (1,)):
        fail(op, names[1], f"has shape {tuple(step.shape)}", "() or (1,)")


def check_weight(op: str, name: str, weight: Tensor, x: Tensor) -> None:
    """(C,), contiguous, on x's device, x's dtype or float32 (a master weight)."""
    check_tensor(op, name, weight)
    if weight.shape != x.shape[-1:]:
        fail(op, name, f"has shape {tuple(weight.shape)}", f"{tuple(x.shape[-1:])}")
    check_weight_dtype(op, name, weight, x)
    if weight.device != x.device:
        fail(op, name, f"is on {weight.device}", f"{x.device}, like the first argument")
    check_unit_stride(op, name, weight)


def check_weight_dtype(op: str, name: str, weight: Tensor, x: Tensor) -> None:
    """x's dtype or float32."""
    if weight.dtype not in (x.dtype, torch.float32):
        expected = "torch.float32" if x.dtype == torch.float32 else f"{x.dtype} or torch.float32"
        fail(op, name, f"is {weight.dtype}", expected)


def check_positive(op: str, name: str, value: float) -> None:
    """A finite number above 0. A bool is refused: it is a flag in the wrong place."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < math.inf):
        given = kind_of(value) if isinstance(value, Tensor) else f"is {value!r}"
        fail(op, name, given, "a finite number above 0")


def check_flag(op: str, name: str, value: bool) -> None:
    """True or False."""
    if not isinstance(value, bool):
        given = kind_of(value) if isinstance(value, Tensor) else f"is {value!r}"
        fail(op, name, given, "True or False")
