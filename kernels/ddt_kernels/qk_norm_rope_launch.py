"""Launches qk_norm_rope's kernels: tile configurations, grids, outputs, the two-stage weight gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.compilation import AotCase, Budget
from ddt_kernels.launcher import launcher
from ddt_kernels.qk_norm_rope_kernels import qk_norm_rope_backward_kernel, qk_norm_rope_forward_kernel
from ddt_kernels.runtime import cdiv, empty, launch, next_power_of_2

NUM_WARPS = 4


@dataclass(frozen=True)
class TileConfig:
    """How heads of D columns are split into [rows, main] and [rows, tail] (qk_norm_rope_kernels.py says why).

    lanes: the lanes a head is spread over; lane_heads: heads among a tile's rows, which are heads, then tokens.
    """

    main: int
    tail: int
    lanes: int
    lane_heads: int
    rows: int

    @property
    def tokens(self) -> int:
        return self.rows // self.lane_heads


@cache
def tile_config(heads: int, head_dim: int, element_size: int) -> TileConfig:
    """Columns per lane: 16 bytes of MAIN, if every head starts so aligned, and at least a pair of TAIL."""
    main = 1 << (head_dim.bit_length() - 1)
    vector = min(16 // element_size, head_dim & -head_dim)
    lanes = main // vector
    tail = max(next_power_of_2(head_dim - main), 2 * lanes) if head_dim > main else 0
    rows_per_warp = max(32 // lanes, 1)
    lane_heads = min(rows_per_warp, next_power_of_2(heads))
    return TileConfig(main, tail, lanes, lane_heads, NUM_WARPS * rows_per_warp)


def groups_per_program(tokens: int, heads: int, lane_heads: int) -> int:
    """All of a token's heads, unless that makes too few programs to fill a GPU; then one group, for latency."""
    return cdiv(heads, lane_heads) if tokens >= 4096 else 1


def tokens_per_program(batch: int, tokens: int, tile_tokens: int) -> int:
    """Tokens each backward program sums over: about 512 runs until each has 16, then as many as needed.

    At 16 tokens of XL/2 the fp32 partial sums cost 0.4% of the pass's traffic.
    """
    tokens_each = next_power_of_2(cdiv(batch * tokens, 512))
    return max(tile_tokens, min(tokens_each, 16))


def _constants(qkv: Tensor, config: TileConfig, registers: int) -> dict[str, object]:
    """registers: enough, without spills, for heads without a tail. Left to itself, ptxas saves more than it needs to by
    loading k, or v's gradient, only once the other loads are back; heads with a tail it compiles as they should be."""
    return {
        "H": qkv.shape[3],
        "D": qkv.shape[4],
        "MAIN": config.main,
        "TAIL": config.tail,
        "LANES": config.lanes,
        "LANE_HEADS": config.lane_heads,
        "ROWS": config.rows,
        "num_warps": NUM_WARPS,
        "maxnreg": None if config.tail else registers,
    }


def launch_forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, out: Tensor
) -> Tensor:
    """Runs the forward kernel into `out` and returns it: a (B, N, 3, H, D), with v copied; a (B, N, 2, H, D), only q
    and k; or qkv itself, with v untouched. The last three dimensions of `out` are contiguous."""
    _forward(qkv, q_weight, k_weight, cos, sin, eps, out, out is not qkv and out.shape[2] == 3)
    return out


def _plain_forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    out: Tensor,
    copy_v: bool,
) -> None:
    for part, weight in enumerate((q_weight, k_weight)):
        out[:, :, part] = reference.norm_rope(qkv[:, :, part], weight, cos, sin, eps)
    if copy_v:
        out[:, :, 2] = qkv[:, :, 2]


@launcher("qk_norm_rope", _plain_forward, {"qkv": 0, "out": 0}, compiled=True, writes=("out",))
def _forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    out: Tensor,
    copy_v: bool,
) -> None:
    B, N, _, H, D = qkv.shape
    config = tile_config(H, D, qkv.element_size())
    groups = groups_per_program(B * N, H, config.lane_heads)
    token_blocks, head_blocks = cdiv(N, config.tokens), cdiv(H, groups * config.lane_heads)
    launch(
        qk_norm_rope_forward_kernel,
        (B * token_blocks * head_blocks,),
        qkv.device,
        *(qkv, out, q_weight, k_weight, cos, sin, N, token_blocks, head_blocks),
        *(qkv.stride(0), qkv.stride(1), out.stride(0), out.stride(1), eps),
        GROUPS=groups,
        COPY_V=copy_v,
        **_constants(qkv, config, 64),
    )


def launch_backward(
    grad_out: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the backward kernel; returns the gradients of qkv, q_weight and k_weight.

    in_place: qkv's overwrites grad_out, which is contiguous and whose v is left as it is.
    """
    grad_out = grad_out.contiguous()
    grad_qkv, sums = _backward(grad_out, qkv, q_weight, k_weight, cos, sin, eps, in_place)
    grad_weights = sums.sum(0)
    grad_q_weight, grad_k_weight = grad_weights[0].to(q_weight.dtype), grad_weights[1].to(k_weight.dtype)
    return grad_out if grad_qkv is None else grad_qkv, grad_q_weight, grad_k_weight


def _plain_backward(
    grad_out: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    in_place: bool,
) -> tuple[Tensor | None, Tensor]:
    grad_qkv, sums = grad_out if in_place else grad_out.clone(), []
    for part, weight in enumerate((q_weight, k_weight)):
        grad, made = grad_out[:, :, part], qkv[:, :, part]
        grad_qkv[:, :, part], grad_weight = reference.norm_rope_backward(grad, made, weight, cos, sin, eps)
        sums.append(grad_weight)
    stacked = torch.stack(sums)[None]
    return None if in_place else grad_qkv, stacked.to(torch.promote_types(stacked.dtype, torch.float32))


@launcher("qk_norm_rope backward", _plain_backward, {"grad_out": 0, "qkv": 0}, compiled=True, writes=("grad_out",))
def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    in_place: bool,
) -> tuple[Tensor | None, Tensor]:
    """qkv's gradient, unless it overwrites grad_out, and fp32 (..., 2, D) whose sums are the weights' gradients."""
    B, N, _, H, D = qkv.shape
    config = tile_config(H, D, qkv.element_size())
    tokens = tokens_per_program(B, N, config.tokens)
    splits = cdiv(N, tokens)
    grad_qkv = None if in_place else empty(qkv, qkv.shape)
    sums = empty(qkv, (B * splits, 2, D), torch.float32)
    launch(
        qk_norm_rope_backward_kernel,
        (2 * B * splits,),
        qkv.device,
        *(grad_out, qkv, q_weight, k_weight, cos, sin),
        *(grad_out if grad_qkv is None else grad_qkv, sums, N, splits, tokens),
        *(qkv.stride(0), qkv.stride(1), eps),
        GROUPS=cdiv(H, config.lane_heads),
        COPY_V=not in_place,
        **_constants(qkv, config, 84),
    )
    return grad_qkv, sums


def aot_cases() -> list[AotCase]:
    """XL/2's heads, of many tokens and of few; in fp32; other head dims, which compile to less."""
    cases = _cases(128, 16, 72, torch.bfloat16)
    cases += _cases(1, 16, 72, torch.bfloat16)[:1]
    cases += _cases(128, 16, 72, torch.float32)[::2]
    cases += _cases(128, 16, 128, torch.bfloat16)
    for heads, head_dim in ((12, 64), (3, 20)):
        cases += _cases(128, heads, head_dim, torch.bfloat16)[2:3]
    return cases


def _cases(batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[AotCase]:
    """In place, functional, backward, in place again. Programs of many tokens walk all of a token's heads."""
    N = 256
    qkv = torch.empty(batch, N, 3, heads, head_dim, dtype=dtype, device="meta")
    weight = torch.empty(head_dim, dtype=dtype, device="meta")
    table = torch.empty(N, head_dim // 2, device="meta")
    arguments = (qkv, weight, weight, table, table, 1e-6)
    label = f"B {batch} H {heads} D {head_dim} {str(dtype).removeprefix('torch.')}"
    tile = tile_config(heads, head_dim, dtype.itemsize).rows * head_dim * dtype.itemsize  # bytes of one group of heads

    def case(what: str, kernel: Any, run: Callable[[], object], tiles: int) -> AotCase:
        ones = ("head_blocks",) if kernel is qk_norm_rope_forward_kernel and batch > 1 else ()
        return AotCase(f"{what}{label}", run, ones=ones, budgets={kernel.__name__: Budget(1, bytes=tiles * tile)})

    forward, backward = qk_norm_rope_forward_kernel, qk_norm_rope_backward_kernel
    return [
        case("in place ", forward, lambda: launch_forward(*arguments, out=qkv), 4),
        case("functional ", forward, lambda: launch_forward(*arguments, out=qkv.new_empty(qkv.shape)), 6),
        case("", backward, lambda: launch_backward(qkv, *arguments), 4),
        case("in place ", backward, lambda: launch_backward(qkv, *arguments, in_place=True), 3),
    ]
