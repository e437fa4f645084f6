"""GEMMs of a CPU on weights packed once, in bf16 and int8.

F.linear and torch._int_mm pack their weights at every call, and the latter returns int32, which another pass turns into
what follows can read. oneDNN's int8 GEMM on packed weights takes uint8 activations, as the units do, and returns scaled
sums. At the sizes of XL/2 packed weights gain a twentieth in bf16, a tenth in int8. The GEMMs are operators of their
own because Inductor takes oneDNN's with constant weights alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddt_fast.device import cpu_capabilities, cpu_has_bf16

ZERO_POINT = 128
"""What stands for 0 in the packed GEMM's activations."""

_ZERO = torch.zeros(1, dtype=torch.int32)


def pack_int8_weight(weight: Tensor) -> Tensor | None:
    """int8 weight (N, K) packed for `packed_int8_gemm`; None where there is no such GEMM, as torch._int_mm always is.

    It wants x86's int8 units: without them oneDNN adds pairs of uint8 products in 16 bits, which saturate.
    """
    capabilities = cpu_capabilities()
    units = any(capabilities.get(name, False) for name in ("avx512_vnni", "amx_int8"))
    if not (units and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        return None
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def packed_int8_gemm(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale[n] * sum_k (x[m, k] - ZERO_POINT) * weight[n, k], summed in int32.

    Args:
        x: (M, K) uint8, contiguous.
        weight: (N, K), from `pack_int8_weight`.
        scale: (N,) float32.
        dtype: of the result, float32 or bfloat16.

    Returns:
        (M, N)
    """
    result: Tensor = torch.ops.ddt_fast.packed_int8_gemm(x, weight, scale, dtype)
    return result


def _int8_gemm(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    result: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, ZERO_POINT, weight, scale, _ZERO, None, 1.0, 0, dtype, "none", [], ""
    )
    return result


def pack_bf16_weight(weight: Tensor) -> Tensor | None:
    """bfloat16 weight (N, K) packed for `packed_bf16_linear`; None where there is no such GEMM, or no gain from it."""
    packs = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if not (packs and cpu_has_bf16() and weight.dtype == torch.bfloat16):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def packed_bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in bfloat16: x (M, K), weight (N, K) from `pack_bf16_weight`, bias (N,) or None → (M, N)."""
    result: Tensor = torch.ops.ddt_fast.packed_bf16_linear(x, weight, bias)
    return result


def _bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return result


_library = torch.library.Library("ddt_fast", "DEF")
_library.define("packed_int8_gemm(Tensor x, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor")
_library.define("packed_bf16_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
for _key in ("CPU", "MkldnnCPU"):  # a packed tensor's key is the latter
    _library.impl("packed_int8_gemm", _int8_gemm, _key)
    _library.impl("packed_bf16_linear", _bf16_linear, _key)


@torch.library.register_fake("ddt_fast::packed_bf16_linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("ddt_fast::packed_int8_gemm", lib=_library)
def _(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], scale.shape[0]), dtype=dtype)
