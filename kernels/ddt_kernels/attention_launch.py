"""Launches the attention kernels: how a head is split, tile configurations, descriptors or pointers, outputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ddt_kernels.attention_kernels import (
    attention_kernel,
    attention_key_value_gradient_kernel,
    attention_query_gradient_kernel,
)
from ddt_kernels.compilation import ARCHITECTURES, AotCase, Budget
from ddt_kernels.launcher import launcher
from ddt_kernels.runtime import (
    cdiv,
    descriptor_fits,
    empty,
    launch,
    next_power_of_2,
    target_arch,
    tensor_descriptor,
)
from ddt_kernels.tuning import choose

MAX_HEAD_DIM = 128  # a tile of queries, its accumulators and a tile of scores share one program's registers


@dataclass(frozen=True)
class TileConfig:
    """A program multiplies `queries` by `keys` at a time. max_registers: a cap per thread, for more programs per SM."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# fp32 multiplies without tensor cores, with operands in registers: small tiles, and CHUNK columns of the head dim at a
# time for q·kᵀ. Without a cap, ptxas aims at 80 registers of the forward kernel on sm_90 and spills.
FP32_CHUNK = 16
FP32_QUERY_MAJOR, FP32_SMALL = TileConfig(32, 16, 8, 1, max_registers=128), TileConfig(16, 16, 4, 1)


@cache
def split_head(head_dim: int) -> tuple[int, int]:
    """(MAIN, TAIL): the widths of the dots that cover the head dim, powers of two from 16 up; TAIL is 0 for one dot."""
    padded = max(16, next_power_of_2(head_dim))
    main = padded // 2
    if main < 16 or head_dim <= main:
        return padded, 0
    tail = max(16, next_power_of_2(head_dim - main))
    return (main, tail) if main + tail < padded else (padded, 0)


@cache
def forward_config(head_dim: int, half: bool, arch: int, descriptors: bool) -> TileConfig:
    """The forward kernel's tile if none is timed. half: bf16 or fp16. attention_kernels.py has the reasons on sm_90."""
    if not half:
        return FP32_QUERY_MAJOR if arch < 100 else FP32_SMALL  # triton 3.7 spills from the larger tile on sm_100
    if not descriptors:
        return TileConfig(128, 64, 8, 3)
    if arch >= 100:  # accumulators live in tensor memory, so 128 do for more; uncapped, D 128 gets 128 and spills
        return TileConfig(128, 64, 8, 2, max_registers=128 if head_dim <= 96 else 168)
    if head_dim <= 96:
        return TileConfig(128, 64, 8, 3, max_registers=128)
    return TileConfig(128, 128, 8, 3)  # capped, ptxas would serialise wgmmas, so one program per SM: the larger tile


@cache
def forward_candidates(head_dim: int, half: bool, arch: int, descriptors: bool) -> tuple[TileConfig, ...]:
    """That tile, and others to time against it; `aot_cases` compiles them all, without spills or serialised wgmmas.

    128x128, with one program per SM, takes fewer steps. Tiles of 64 queries waste less with few tokens, and make
    twice as many programs with few heads. There are no others without tensor cores, or for odd pitches on a chip that
    has descriptors; wider than 96, small tiles by pointer spill.
    """
    default = forward_config(head_dim, half, arch, descriptors)
    if descriptors:
        stages = 3 if arch < 100 else 2
        return tuple(dict.fromkeys((default, TileConfig(128, 128, 8, stages), TileConfig(64, 64, 4, stages))))
    if half and not 90 <= arch < 120 and head_dim <= 96:
        return default, TileConfig(64, 32, 4, 3)
    return (default,)


@cache
def query_gradient_config(head_dim: int, half: bool, arch: int, descriptors: bool) -> TileConfig:
    """The tile of the kernel for dq and delta."""
    if not half:
        return FP32_QUERY_MAJOR
    if not descriptors:
        return TileConfig(128, 32, 8, 2)
    if arch >= 100:
        return TileConfig(128, 64, 8, 2)
    if 64 < head_dim <= 96:
        return TileConfig(128, 32, 8, 3, max_registers=128)
    return TileConfig(128, 64, 8, 3, max_registers=128 if head_dim <= 64 else None)


@cache
def key_value_gradient_config(head_dim: int, half: bool, arch: int, descriptors: bool) -> TileConfig:
    """The tile of the kernel for dk and dv, which holds two accumulators, keys by head_dim."""
    if not half:
        return FP32_SMALL
    if not descriptors:
        return TileConfig(32, 128 if head_dim <= 80 else 64, 8, 2)
    if arch >= 100:
        return TileConfig(64 if head_dim <= 96 else 32, 128, 8, 2)
    return TileConfig(64 if head_dim <= 96 else 32, 64, 4, 3)


def _pin_single_strides(tensor: Tensor) -> Tensor:
    """The same elements; a dimension of size 1, whose stride has no meaning, gets one that alignment tests accept."""
    if 1 not in tensor.shape:
        return tensor
    strides = [
        MAX_HEAD_DIM if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return tensor.as_strided(tensor.shape, (*strides[:-1], 1))


def _describable(tensor: Tensor) -> bool:
    """Whether its blocks can be described: not with an expanded dimension (stride 0) or overlapping rows."""
    return descriptor_fits(tensor) and min(tensor.stride()[:-1]) >= tensor.shape[-1]


@dataclass(frozen=True)
class _Call:
    """What all kernels of a call have in common."""

    main: int
    tail: int
    vector: int
    half: bool
    descriptors: bool
    arch: int

    @staticmethod
    def of(*tensors: Tensor) -> "_Call":
        first = tensors[0]
        arch, half = target_arch(first.device), first.element_size() == 2
        # Consumer Blackwell (sm_120) has the copy engine but multiplies like sm_80, on which descriptors spill.
        descriptors = half and 90 <= arch < 120 and all(_describable(tensor) for tensor in tensors)
        main, tail = split_head(first.shape[-1]) if half else (max(16, next_power_of_2(first.shape[-1])), 0)
        pitches = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
        return _Call(main, tail, math.gcd(16 // first.element_size(), *pitches), half, descriptors, arch)

    def sources(self, rows: int, *walked: Tensor) -> list[Any]:
        """The kernels' arguments for tensors that loops read in tiles of `rows`: descriptors, or pointers and None."""
        widths = (self.main, self.tail)
        if not self.descriptors:
            return [source for tensor in walked for source in (tensor, None)]
        return [tensor_descriptor(t, (1, rows, 1, width)) if width else None for t in walked for width in widths]

    def strides(self, *tensors: Tensor) -> list[int]:
        """The kernels' arguments for those tensors' strides."""
        return [stride // self.vector for tensor in tensors for stride in tensor.stride()[:-1]]

    def meta(self, config: TileConfig, head_dim: int, even: bool) -> dict[str, Any]:
        """Constexprs and options; even: whether a program's loop walks over whole tiles only."""
        return {
            "BM": config.queries,
            "BN": config.keys,
            "D": head_dim,
            "MAIN": self.main,
            "TAIL": self.tail,
            "VECTOR": self.vector,
            "CHUNK": 0 if self.half else FP32_CHUNK,
            "DESCRIPTORS": self.descriptors,
            "EVEN": even,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            # 255 is the hardware's limit; unnamed, ptxas aims at 128 on sm_100 and spills two registers (at D 76 with
            # triton 3.8, at D 96 with 3.7).
            "maxnreg": config.max_registers or (255 if self.half and self.arch >= 100 else None),
        }


def launch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse): q's shape, contiguous, and the fp32 (B, H, Nq) logarithm of the softmax's denominator."""
    return _forward(_pin_single_strides(q), _pin_single_strides(k), _pin_single_strides(v), scale)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    made = [_plain_sample(*sample, scale) for sample in zip(q, k, v, strict=True)]
    outs, lses = zip(*made, strict=True)
    return torch.stack(outs), torch.stack(lses)


def _plain_sample(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of one sample, since its scores are all kept at once: (Nq, H, D) and (H, Nq)."""
    scores = torch.einsum("nhd,mhd->hnm", q, k).to(_wide(q)) * scale
    out = torch.einsum("hnm,mhd->nhd", torch.softmax(scores, -1).to(q.dtype), v)
    return out.contiguous(), torch.logsumexp(scores, -1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@launcher("attention", _plain_forward, samples={"q": 0, "k": 0, "v": 0})
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, Nq, H, D = q.shape
    Nk = k.shape[1]
    call = _Call.of(q, k, v)
    out, lse = empty(q, (B, Nq, H, D)), empty(q, (B, H, Nq), torch.float32)

    def run(config: TileConfig) -> None:
        blocks = cdiv(Nq, config.queries)
        launch(
            attention_kernel,
            (B * H * blocks,),
            q.device,
            *(q, *call.sources(config.keys, k, v), out, lse),
            *(Nq, Nk, H, blocks, scale * math.log2(math.e), *call.strides(q, k, v)),
            **call.meta(config, D, Nk % config.keys == 0),
        )

    sizes = next_power_of_2(B * H), next_power_of_2(Nq), next_power_of_2(Nk)
    candidates = forward_candidates(D, call.half, call.arch, call.descriptors)
    key = (*sizes, D, q.dtype, call.descriptors, call.vector)
    run(choose("attention tile", key, candidates, candidates[0], run, q.device))
    return out, lse


def launch_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes: contiguous, or the parts of a contiguous `packed` (B, N, 3, H, D)."""
    grads = (tensor.new_empty(tensor.shape) for tensor in (q, k, v)) if packed is None else packed.unbind(2)
    grad_q, grad_k, grad_v = grads
    # Autograd passes gradients with any strides, even 0 (from a sum).
    grad_out, out, q, k, v = (_pin_single_strides(t) for t in (grad_out.contiguous(), out, q, k, v))
    _backward(grad_out, out, lse, q, k, v, scale, grad_q, grad_k, grad_v, packed is not None)
    return grad_q, grad_k, grad_v


def _plain_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    packed: bool,
) -> None:
    """A sample at a time, since its scores are all kept at once."""
    for b in range(len(q)):
        scores = torch.einsum("nhd,mhd->hnm", q[b], k[b]).to(_wide(q)) * scale
        p = torch.exp(scores - lse[b][..., None])
        delta = (grad_out[b].to(p.dtype) * out[b].to(p.dtype)).sum(-1).T[..., None]
        grad_p = torch.einsum("nhd,mhd->hnm", grad_out[b], v[b]).to(p.dtype)
        grad_scores = (p * (grad_p - delta)).to(q.dtype)
        grad_q[b] = torch.einsum("hnm,mhd->nhd", grad_scores, k[b]) * scale
        grad_k[b] = torch.einsum("hnm,nhd->mhd", grad_scores, q[b]) * scale
        grad_v[b] = torch.einsum("hnm,nhd->mhd", p.to(q.dtype), grad_out[b])


@launcher(
    "attention backward",
    _plain_backward,
    writes=("grad_q", "grad_k", "grad_v"),
    samples=dict.fromkeys(("q", "k", "v", "grad_out", "out", "lse", "grad_q", "grad_k", "grad_v"), 0),
)
def _backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    packed: bool,
) -> None:
    """Writes grad_q, grad_k and grad_v, which are contiguous or parts of a (B, N, 3, H, D)."""
    B, Nq, H, D = q.shape
    Nk = k.shape[1]
    call = _Call.of(grad_out, out, q, k, v)
    pitch = 3 * H if packed else H
    scales = (scale, scale * math.log2(math.e))

    config = query_gradient_config(D, call.half, call.arch, call.descriptors)
    blocks = cdiv(Nq, config.queries)
    terms = empty(lse, (B * H, 2 * blocks * config.queries))
    launch(
        attention_query_gradient_kernel,
        (B * H * blocks,),
        q.device,
        *(grad_out, out, q, *call.sources(config.keys, k, v), lse, terms, grad_q),
        *(pitch, Nq, Nk, H, blocks, *scales, *call.strides(grad_out, out, q, k, v)),
        **call.meta(config, D, Nk % config.keys == 0),
    )
    config = key_value_gradient_config(D, call.half, call.arch, call.descriptors)
    blocks = cdiv(Nk, config.keys)
    walked = tensor_descriptor(terms, (1, 2 * config.queries)) if call.descriptors else terms
    launch(
        attention_key_value_gradient_kernel,
        (B * H * blocks,),
        q.device,
        *(k, v, *call.sources(config.queries, grad_out, q), walked, grad_k, grad_v),
        *(pitch, Nq, Nk, H, blocks, terms.shape[1], *scales, *call.strides(k, v, grad_out, q)),
        **call.meta(config, D, Nq % config.queries == 0),
    )


def aot_cases() -> list[AotCase]:
    """bf16 at every width, with a partial last tile; every other variant once. 256 to 384: an image and 128 of text."""
    cases = [case for head_dim in (64, 72, 80, 96, 128) for case in _cases(head_dim, torch.bfloat16)]
    cases += _cases(72, torch.bfloat16, 1024)[:1] + _cases(72, torch.bfloat16, 256, 384)
    cases += _cases(72, torch.float16)[:1]
    single = ("Nq", "Nk", "H", "blocks", "grad_pitch", "grad_out_sb", "out_sb")
    cases += _cases(8, torch.bfloat16, 1, heads=1, archs=(80, 90), ones=single)
    for head_dim in (76, 100):  # rows of 152 and 200 bytes: pointers everywhere
        cases += _cases(head_dim, torch.bfloat16, archs=(90, 100))
    return cases + _cases(128, torch.float32)


# By whether a head takes two dots. Of the barriers, triton 3.6 puts two less into the key and value gradients.
_BUDGETS = {
    attention_kernel.__name__: (Budget(barriers=4, copies=1, drains=1), Budget(barriers=6, copies=1, drains=2)),
    attention_query_gradient_kernel.__name__: (
        *(Budget(barriers=4, copies=1, drains=2), Budget(barriers=6, copies=1, drains=4)),
    ),
    attention_key_value_gradient_kernel.__name__: (
        *(Budget(barriers=6, copies=1, drains=2), Budget(barriers=8, copies=1, drains=4)),
    ),
}


def _cases(
    head_dim: int,
    dtype: torch.dtype,
    queries: int = 1000,
    keys: int | None = None,
    heads: int = 16,
    archs: tuple[int, ...] = ARCHITECTURES,
    ones: tuple[str, ...] = (),
) -> list[AotCase]:
    """Forward, backward; of 32 images."""
    q, _, _ = torch.empty(32, queries, 3, heads, head_dim, dtype=dtype, device="meta").unbind(2)
    _, k, v = torch.empty(32, keys or queries, 3, heads, head_dim, dtype=dtype, device="meta").unbind(2)
    out, lse = torch.empty(q.shape, dtype=dtype, device="meta"), torch.empty(32, heads, queries, device="meta")
    half = dtype.itemsize == 2
    described = half and head_dim % 8 == 0

    def case(run: Callable[[], object], *kernels: Any) -> AotCase:
        tokens = f"N {queries}" + (f" to {keys}" if keys else "")
        names = tuple(kernel.__name__ for kernel in kernels)
        budgets = {name: _BUDGETS[name][split_head(head_dim)[1] > 0] for name in names}
        if not described:
            budgets = {name: replace(budget, barriers=2) for name, budget in budgets.items()}
        return AotCase(
            f"D {head_dim} {str(dtype).removeprefix('torch.')} {tokens}",
            run,
            *(names if half else (), names if described else (), archs, ones),
            budgets if half and queries > 1 else {},
        )

    return [
        case(lambda: launch_forward(q, k, v, 0.1), attention_kernel),
        case(
            lambda: launch_backward(out, out, lse, q, k, v, 0.1),
            *(attention_query_gradient_kernel, attention_key_value_gradient_kernel),
        ),
    ]
