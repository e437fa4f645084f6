"""8-bit inference on a CPU (W8A8).

A Linear's weights become int8, one scale an output channel; what it is applied to becomes 8 bits at every call, one
scale a token. Both are symmetric, the largest magnitude is 127. Products are summed exactly, in int32, and scaled:

    y[m, n] = scale_x[m] * scale_w[n] * sum_k x8[m, k] w8[n, k] + bias[n]

The Linears of the blocks and the modulations are quantised; patch, time and label embedders, the final Linear, norms
and attention are not. What attention and SwiGLU read is bfloat16 where the CPU has units for it, all else keeps the
model's dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt_fast.model.cpu import ZERO_POINT, pack_int8_weight, packed_int8_gemm
from ddt_fast.model.fused import FusedDDT, FusedSwiGLU
from ddt_fast.model.packed import inner_dtype, on_linears

_ZERO_ROW = 1e-30
"""Stands for the largest magnitude of a row of zeros, whose scale would be 0 / 127."""

_CHUNK = 2**18
"""Numbers scaled at a time: they stay in the second-level cache between the passes over them."""


def quantize_int8(model: FusedDDT) -> FusedDDT:
    """A copy of a FusedDDT for int8 inference on a CPU; `model` is left as it is.

    Args:
        model: on a CPU, in the dtype to compute in outside the GEMMs. Without int8 units (`cpu_has_int8`) the result is
            right, but slow.

    Returns:
        A FusedDDT that can be called and sampled from. It cannot be trained, saved or loaded into: keep the original.

    Raises:
        ValueError: no FusedDDT, one that is quantised already, or one on another device.
    """
    if not isinstance(model, FusedDDT):
        raise ValueError(f"int8 is for FusedDDT, not {type(model).__name__}; wanted FusedDDT.from_reference(model)")
    if isinstance(model.encoder_modulation, Int8Linear):
        raise ValueError("the model is quantised already")
    _check_cpu(model.encoder_modulation.weight)
    return on_linears(model, Int8Linear, Int8SwiGLU)


@torch.no_grad()
def quantization_error(model: FusedDDT, quantized: FusedDDT, x: Tensor, t: Tensor, y: Tensor) -> float:
    """Norm of the difference of two models' velocities over the norm of the first's; x, t, y as for `FusedDDT`."""
    expected, actual = (m(x, t, y)[0].double() for m in (model, quantized))
    difference = torch.linalg.vector_norm(actual - expected).item()
    return difference / torch.linalg.vector_norm(expected).item() if difference else 0.0


class Int8Linear(nn.Module):
    """nn.Linear in int8, for inference on a CPU.

    Args:
        weight: (N, K).
        bias: (N,) or None.
        dtype: of the result; None for the weight's.
    """

    packed: Tensor | None
    weight: Tensor | None
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype or weight.dtype
        rows, scale = quantize_rows(weight.detach())
        self.register_buffer("packed", pack_int8_weight(rows))
        # (K, N) in rows: the layout that torch._int_mm is fastest with.
        plain_weight = None if self.packed is not None else rows.t().clone(memory_format=torch.contiguous_format)
        self.register_buffer("weight", plain_weight)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor, features: int = 1) -> Tensor:
        """x (..., K), or with K its last `features` dimensions together → (..., N)."""
        _check_cpu(x)
        lead = x.shape[: x.ndim - features]
        rows, row_scale = quantize_rows(x.flatten(0, -1 - features), features, signed=self.packed is None)
        sums = self._sums(rows.flatten(1))
        row_scale = row_scale.flatten(1)
        if torch.compiler.is_compiling():
            y = self._scaled(sums, row_scale)
        else:
            y = x.new_empty(sums.shape, dtype=self.dtype)
            step = max(1, _CHUNK // sums.shape[1])
            parts = zip(sums.split(step), row_scale.split(step), y.split(step), strict=True)
            for part, part_scale, target in parts:
                target.copy_(self._scaled(part, part_scale))
        return y.unflatten(0, lead)

    def _sums(self, rows: Tensor) -> Tensor:
        """(M, K) → (M, N): with packed weights times `scale` and in `dtype`, else in int32."""
        if self.packed is not None:
            return packed_int8_gemm(rows, self.packed, self.scale, self.dtype)
        assert self.weight is not None
        if 1 in rows.shape:
            # The stride of such a dimension is anyone's choice, but torch._int_mm (2.13) reads it: other than this one,
            # results are wrong without a word.
            rows = rows.as_strided(rows.shape, (rows.shape[1], 1))
        return torch._int_mm(rows, self.weight)

    def _scaled(self, sums: Tensor, row_scale: Tensor) -> Tensor:
        y = sums.float() * row_scale
        if self.packed is None:
            y = y * self.scale
        return (y if self.bias is None else y + self.bias).to(self.dtype)


class Int8SwiGLU(nn.Module):
    """FusedSwiGLU in int8: w1 and w3 are one GEMM.

    Products of two numbers have long tails, and the largest of a token sets its scale. `_spread` of activations and of
    weights leaves their products as they are, and of this layer's rounding error about half.
    """

    def __init__(self, mlp: FusedSwiGLU) -> None:
        super().__init__()
        self.w13 = Int8Linear(torch.cat([mlp.w1.weight, mlp.w3.weight]), None, inner_dtype(mlp.w1.weight))
        self.w2 = Int8Linear(_spread(mlp.w2.weight.detach().float()), None, mlp.w2.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).float().chunk(2, dim=-1)
        return self.w2(_spread(F.silu(gate) * up))


def _spread(x: Tensor) -> Tensor:
    """x (..., K) times an orthogonal matrix, Hadamard's of the largest power of two up to 8 that divides K: each number
    becomes a sum of 8 far from each other. Source: arXiv 2404.00456."""
    count = math.gcd(x.shape[-1], 8)
    parts = x.chunk(count, dim=-1)
    for bit in (1, 2, 4)[: count.bit_length() - 1]:
        parts = tuple(parts[i ^ bit] - part if i & bit else part + parts[i ^ bit] for i, part in enumerate(parts))
    return torch.cat(parts, dim=-1) * count**-0.5


def quantize_rows(x: Tensor, features: int = 1, signed: bool = True) -> tuple[Tensor, Tensor]:
    """8-bit numbers and their scales.

    Args:
        x: (M, ...), a row's numbers in the last `features` dimensions.
        features: 1 or more.
        signed: int8, -127 to 127; else uint8, 1 to 255, ZERO_POINT for 0.

    Returns:
        numbers, shaped as x, and scales float32, one a row, such that (numbers - zero point) * scale is x to within
        half a scale.
    """
    wide = x.float()
    largest = wide.abs().amax(tuple(range(-features, 0)), keepdim=True).clamp_min(_ZERO_ROW)
    numbers = (wide * (127 / largest)).round()
    return numbers.to(torch.int8) if signed else (numbers + ZERO_POINT).to(torch.uint8), largest / 127


def _check_cpu(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"int8 is for models on a CPU, this one is on {x.device}; allowed there: float32, bfloat16")
