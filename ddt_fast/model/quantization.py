"""8-bit inference on a CPU (W8A8), and what a CPU has units for.

A Linear's weights become int8, one scale an output channel; what it is applied to becomes int8 at every call, one scale
a token. Both are symmetric, the largest magnitude is 127. Products are summed exactly, in int32, and scaled once:

    y[m, n] = scale_x[m] * scale_w[n] * sum_k x8[m, k] w8[k, n] + bias[n]

The Linears of the blocks and the modulations are quantised; patch, time and label embedders, the final Linear, norms
and attention stay in the model's dtype. float32 between the GEMMs is the faster choice where the model is compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt_fast.model.fused import FusedBlock, FusedDDT, FusedSwiGLU

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
    # What deepcopy finds in its memo counts as copied: the layers to replace are, by their quantised selves.
    quantized: dict[int, nn.Module] = {}
    for layer in (model.encoder_modulation, model.decoder_modulation):
        quantized[id(layer)] = Int8Linear(layer.weight, layer.bias)
    for block in cast(list[FusedBlock], model.blocks):
        for layer in (block.attn.qkv, block.attn.proj):
            quantized[id(layer)] = Int8Linear(layer.weight, layer.bias)
        quantized[id(block.mlp)] = Int8SwiGLU(block.mlp)
    result = copy.deepcopy(model, cast(dict[int, Any], quantized)).eval().requires_grad_(False)
    result.register_state_dict_pre_hook(_refuse_state_dict)
    result.register_load_state_dict_pre_hook(_refuse_state_dict)
    return result


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
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rows, scale = quantize_rows(weight.detach())
        # (K, N) in rows: the layout that torch._int_mm is fastest with.
        self.register_buffer("weight", rows.t().clone(memory_format=torch.contiguous_format))
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N), x's dtype."""
        _check_cpu(x)
        rows, row_scale = quantize_rows(x.flatten(0, -2))
        if 1 in rows.shape:
            # The stride of such a dimension is anyone's choice, but torch._int_mm (2.13) reads it: other than this one,
            # results are wrong without a word.
            rows = rows.as_strided(rows.shape, (rows.shape[1], 1))
        sums = torch._int_mm(rows, self.weight)
        if torch.compiler.is_compiling():
            y = self._scaled(sums, row_scale).to(x.dtype)
        else:
            y = x.new_empty(sums.shape)
            step = max(1, _CHUNK // sums.shape[1])
            parts = zip(sums.split(step), row_scale.split(step), y.split(step), strict=True)
            for part, part_scale, target in parts:
                target.copy_(self._scaled(part, part_scale))
        return y.unflatten(0, x.shape[:-1])

    def _scaled(self, sums: Tensor, row_scale: Tensor) -> Tensor:
        y = sums.float() * row_scale
        return y * self.scale if self.bias is None else torch.addcmul(self.bias, y, self.scale)


class Int8SwiGLU(nn.Module):
    """FusedSwiGLU in int8: w1 and w3 are one GEMM."""

    def __init__(self, mlp: FusedSwiGLU) -> None:
        super().__init__()
        self.w13 = Int8Linear(torch.cat([mlp.w1.weight, mlp.w3.weight]), None)
        self.w2 = Int8Linear(mlp.w2.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) → int8 (M, K) and scales (M, 1) float32, such that int8 * scale is x to within half a scale."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(_ZERO_ROW)
    return (wide * (127 / largest)).round().to(torch.int8), largest / 127


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 units (AVX512-BF16, AMX, or Arm's BF16): bf16 GEMMs are then about twice as fast as
    fp32; elsewhere they are slower."""
    capabilities = _cpu_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_has_int8() -> bool:
    """Whether this CPU has int8 units (VNNI, AMX, or Arm's I8MM), without which `quantize_int8` gains nothing."""
    capabilities = _cpu_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm"))


def _cpu_capabilities() -> Mapping[str, Any]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    amx = torch.cpu._is_amx_tile_supported()
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "avx512_vnni": torch.cpu._is_vnni_supported(),
        "amx_bf16": amx,
        "amx_int8": amx,
    }


def _check_cpu(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"int8 is for models on a CPU, this one is on {x.device}; allowed there: float32, bfloat16")


def _refuse_state_dict(*_: Any) -> NoReturn:
    raise ValueError("a quantised model is neither saved nor loaded; save and load the one it was made from")
