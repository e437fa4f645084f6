"""8-bit inference on a CPU (W8A8).

A Linear's weights become int8, with one scale per output channel; its input becomes 8 bits at every call, with one
scale per token. Both are symmetric, with a largest magnitude of 127. Products are summed exactly, in int32, and scaled:

    y[m, n] = scale_x[m] * scale_w[n] * sum_k x8[m, k] w8[n, k] + bias[n]

The Linears of the blocks and the modulations are quantised; patch, time and label embedders, the final Linear, norms
and attention are not. Attention and SwiGLU use bfloat16 if the CPU has units for it; everything else keeps the model's
dtype.
"""

import copy
import math
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt_fast.device import cpu_capabilities, cpu_has_bf16
from ddt_fast.model.attention import attention
from ddt_fast.model.fused import FusedAttention, FusedBlock, FusedDDT, FusedSwiGLU
from ddt_kernels import reference

ZERO_POINT = 128
"""The value of 0 in the packed GEMM's activations."""


def quantize_int8(model: FusedDDT) -> FusedDDT:
    """A copy of a FusedDDT on a CPU for int8 inference, which keeps its dtype outside the GEMMs. Without int8 units
    (`cpu_has_int8`) it is correct but slow. It can be called and sampled from, and not trained, saved or loaded into:
    keep the original. ValueError if the model is not a FusedDDT, is already quantised, or is on another device."""
    if not isinstance(model, FusedDDT):
        raise ValueError(f"int8 is for FusedDDT, not {type(model).__name__}; use FusedDDT.from_reference(model)")
    if is_quantized(model):
        raise ValueError("the model is already quantised")
    _check_cpu(model.encoder_modulation.weight)
    inner = torch.bfloat16 if cpu_has_bf16() else model.encoder_modulation.weight.dtype
    # deepcopy takes what is in its memo as copied: here, the layers that replace others.
    made: dict[int, Any] = {}
    for layer in (model.encoder_modulation, model.decoder_modulation):
        made[id(layer)] = Int8Linear(layer.weight, layer.bias)
    for block in cast(list[FusedBlock], model.blocks):
        made[id(block.attn)] = Int8Attention(block.attn, inner)
        made[id(block.mlp)] = Int8SwiGLU(block.mlp, inner)
    result = copy.deepcopy(model, made).eval().requires_grad_(False)
    result.register_state_dict_pre_hook(_refuse_state_dict)
    result.register_load_state_dict_pre_hook(_refuse_state_dict)
    return result


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize_int8` made the model."""
    return isinstance(getattr(model, "encoder_modulation", None), Int8Linear)


@torch.no_grad()
def quantization_error(model: FusedDDT, quantized: FusedDDT, x: Tensor, t: Tensor, y: Tensor) -> float:
    """Norm of the difference of two models' velocities over the norm of the first's; x, t, y as for `FusedDDT`."""
    expected, actual = (m(x, t, y)[0].double() for m in (model, quantized))
    difference = torch.linalg.vector_norm(actual - expected).item()
    return difference / torch.linalg.vector_norm(expected).item() if difference else 0.0


class Int8Linear(nn.Module):
    """nn.Linear in int8, for inference on a CPU, from a weight (N, K) and a bias (N,); the result has `dtype`, or else
    the weight's."""

    packed: Tensor | None
    weight: Tensor | None
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype or weight.dtype
        rows, scale = quantize_rows(weight.detach())
        self.register_buffer("packed", pack_int8_weight(rows))
        # (K, N), contiguous: the fastest layout for torch._int_mm.
        plain_weight = None if self.packed is not None else rows.t().clone(memory_format=torch.contiguous_format)
        self.register_buffer("weight", plain_weight)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N)."""
        _check_cpu(x)
        rows, row_scale = quantize_rows(x.flatten(0, -2), signed=self.packed is None)
        sums = self._sums(rows)
        if torch.compiler.is_compiling():
            y = self._scaled(sums, row_scale)
        else:
            y = x.new_empty(sums.shape, dtype=self.dtype)
            step = max(1, 2**18 // sums.shape[1])  # what stays in the second-level cache between passes
            parts = zip(sums.split(step), row_scale.split(step), y.split(step), strict=True)
            for part, part_scale, target in parts:
                target.copy_(self._scaled(part, part_scale))
        return y.unflatten(0, x.shape[:-1])

    def _sums(self, rows: Tensor) -> Tensor:
        """(M, K) → (M, N): with packed weights, scaled by `scale` and in `dtype`; else in int32."""
        if self.packed is not None:
            sums: Tensor = torch.ops.ddt_fast.packed_int8_gemm(rows, self.packed, self.scale, self.dtype)
            return sums
        assert self.weight is not None
        if 1 in rows.shape:
            # The stride of a dimension of 1 is arbitrary, but torch._int_mm (2.13) reads it: with any other stride than
            # this one, results are silently wrong.
            rows = rows.as_strided(rows.shape, (rows.shape[1], 1))
        return torch._int_mm(rows, self.weight)

    def _scaled(self, sums: Tensor, row_scale: Tensor) -> Tensor:
        y = sums.float() * row_scale
        if self.packed is None:
            y = y * self.scale
        return (y if self.bias is None else y + self.bias).to(self.dtype)


class Int8Attention(nn.Module):
    """FusedAttention in int8, on q, k and v of the dtype `inner`.

    Queries and keys come out of their GEMM with the first elements of all rotary pairs before the second ones: their
    products are the same in any order, and halves can be read as whole vectors, unlike pairs.
    """

    q_weight: Tensor
    k_weight: Tensor

    def __init__(self, attn: FusedAttention, inner: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.backend = attn.num_heads, attn.backend
        q, k, v = attn.qkv.weight.unflatten(0, (3, self.num_heads, -1))
        self.qkv = Int8Linear(torch.stack([_pairs_apart(q, 1), _pairs_apart(k, 1), v]).flatten(0, 2), None, inner)
        self.proj = Int8Linear(attn.proj.weight, attn.proj.bias)
        self.register_buffer("q_weight", _pairs_apart(attn.q_norm.weight.detach(), 0))
        self.register_buffer("k_weight", _pairs_apart(attn.k_norm.weight.detach(), 0))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = _norm_rope(q, self.q_weight, cos, sin), _norm_rope(k, self.k_weight, cos, sin)
        return self.proj(attention(q, k, v, self.backend).flatten(2))


def _pairs_apart(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x.unflatten(dim, (-1, 2)).select(dim + 1, i) for i in (0, 1)], dim)


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ddt_kernels.reference.norm_rope` for x (B, N, H, D) and weight (D,) with their pairs apart."""
    first, second = reference.rms_norm(x, weight).float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class Int8SwiGLU(nn.Module):
    """FusedSwiGLU in int8: w1 and w3 are one GEMM, whose result has the dtype `inner`.

    Products of two numbers have long tails, and a token's largest one sets its scale. `_spread` on activations and
    weights does not change the layer's result, and halves its rounding error.
    """

    def __init__(self, mlp: FusedSwiGLU, inner: torch.dtype) -> None:
        super().__init__()
        self.w13 = Int8Linear(torch.cat([mlp.w1.weight, mlp.w3.weight]), None, inner)
        self.w2 = Int8Linear(_spread(mlp.w2.weight.detach().float()), None, mlp.w2.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).float().chunk(2, dim=-1)
        return self.w2(_spread(F.silu(gate) * up))


def _spread(x: Tensor) -> Tensor:
    """x (..., K) times an orthogonal matrix, the Hadamard matrix of the largest power of two up to 8 that divides K:
    each number becomes a sum of up to 8 distant ones. Source: arXiv 2404.00456."""
    count = math.gcd(x.shape[-1], 8)
    parts = x.chunk(count, dim=-1)
    for bit in (1, 2, 4)[: count.bit_length() - 1]:
        parts = tuple(parts[i ^ bit] - part if i & bit else part + parts[i ^ bit] for i, part in enumerate(parts))
    return torch.cat(parts, dim=-1) * count**-0.5


def quantize_rows(x: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """8-bit numbers (M, K) and their scales (M, 1) float32: (numbers - zero point) * scale differs from x by at most
    half a scale.

    Args:
        x: (M, K).
        signed: int8 from -127 to 127; else uint8 from 1 to 255, with ZERO_POINT for 0.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30)  # a row of zeros would have scale 0
    numbers = (wide * (127 / largest)).round()
    return numbers.to(torch.int8) if signed else (numbers + ZERO_POINT).to(torch.uint8), largest / 127


def pack_int8_weight(weight: Tensor) -> Tensor | None:
    """int8 weight (N, K) packed for `packed_int8_gemm`; None if there is no such GEMM, to use torch._int_mm.

    It needs x86's int8 units: without them, oneDNN adds pairs of uint8 products in 16 bits, which saturate.
    """
    units = any(cpu_capabilities().get(name, False) for name in ("avx512_vnni", "amx_int8"))
    if not (units and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        return None
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


# torch._int_mm packs its weights at every call and returns int32, which needs another pass. oneDNN's GEMM on packed
# weights takes uint8 activations, as the units do, and returns scaled sums: a tenth faster at the sizes of XL/2. It is
# wrapped in an operator, because Inductor accepts oneDNN's only with constant weights.
_library = torch.library.Library("ddt_fast", "DEF")
_library.define("packed_int8_gemm(Tensor x, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor")
_ZERO = torch.zeros(1, dtype=torch.int32)


def _packed_int8_gemm(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale[n] * sum_k (x[m, k] - ZERO_POINT) * weight[n, k], summed in int32: (M, N), in float32 or bfloat16, from x
    (M, K) uint8, contiguous, weight (N, K), from `pack_int8_weight`, and scale (N,) float32."""
    result: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, ZERO_POINT, weight, scale, _ZERO, None, 1.0, 0, dtype, "none", [], ""
    )
    return result


for _key in ("CPU", "MkldnnCPU"):  # packed tensors have the latter key
    _library.impl("packed_int8_gemm", _packed_int8_gemm, _key)


@torch.library.register_fake("ddt_fast::packed_int8_gemm", lib=_library)
def _(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], scale.shape[0]), dtype=dtype)


def _check_cpu(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"int8 is for models on a CPU, but this one is on {x.device}; use float32 or bfloat16 there")


def _refuse_state_dict(*_: Any) -> NoReturn:
    raise ValueError("a quantised model cannot be saved or loaded; save and load the one it was made from")
