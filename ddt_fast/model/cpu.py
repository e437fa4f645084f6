"""What a CPU has units for, and its int8 GEMM on weights packed once.

torch._int_mm packs its weights at every call and returns int32, which another pass turns into what follows can read.
oneDNN's GEMM on packed weights takes uint8 activations, as the units do, and returns scaled sums; at the sizes of XL/2
it is about a tenth faster. It is an operator of its own because Inductor takes oneDNN's with constant weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ZERO_POINT = 128
"""What stands for 0 in the packed GEMM's activations."""

_ZERO = torch.zeros(1, dtype=torch.int32)


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 units (AVX512-BF16, AMX, or Arm's BF16): bf16 GEMMs are then about twice as fast as
    fp32; elsewhere they are slower."""
    capabilities = _cpu_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_has_int8() -> bool:
    """Whether this CPU has int8 units (VNNI, AMX, or Arm's I8MM), without which `quantize_int8` gains nothing."""
    capabilities = _cpu_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm"))


def pack_int8(weight: Tensor) -> Tensor | None:
    """int8 weight (N, K) packed for `packed_int8_gemm`; None where there is no such GEMM, as torch._int_mm always is.

    It wants x86's int8 units: without them oneDNN adds pairs of uint8 products in 16 bits, which saturate.
    """
    capabilities = _cpu_capabilities()
    units = any(capabilities.get(name, False) for name in ("avx512_vnni", "amx_int8"))
    if not (units and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        return None
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def packed_int8_gemm(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale[n] * sum_k (x[m, k] - ZERO_POINT) * weight[n, k], summed in int32.

    Args:
        x: (M, K) uint8, contiguous.
        weight: (N, K), from `pack_int8`.
        scale: (N,) float32.
        dtype: of the result, float32 or bfloat16.

    Returns:
        (M, N)
    """
    result: Tensor = torch.ops.ddt_fast.packed_int8_gemm(x, weight, scale, dtype)
    return result


def _gemm(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    result: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, ZERO_POINT, weight, scale, _ZERO, None, 1.0, 0, dtype, "none", [], ""
    )
    return result


_library = torch.library.Library("ddt_fast", "DEF")
_library.define("packed_int8_gemm(Tensor x, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor")
for _key in ("CPU", "MkldnnCPU"):  # a packed tensor's key is the latter
    _library.impl("packed_int8_gemm", _gemm, _key)


@torch.library.register_fake("ddt_fast::packed_int8_gemm", lib=_library)
def _(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], scale.shape[0]), dtype=dtype)


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
