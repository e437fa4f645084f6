"""Launches the kernels of swiglu and swiglu_mlp: tile configurations, descriptors, outputs, and the plain GEMMs around
them."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ddt_kernels.compilation import AotCase, Budget
from ddt_kernels.runtime import (
    cdiv,
    descriptor_fits,
    launch,
    next_power_of_2,
    target_arch,
    tensor_descriptor,
    without_autocast,
)
from ddt_kernels.swiglu_kernels import swiglu_backward_kernel, swiglu_forward_kernel
from ddt_kernels.tuning import choose

GROUP = 16  # tile rows walked together: √(132 SMs · 2·BLOCK_F / BLOCK_M) minimises a wave's distinct bytes
L2_BYTES = 48  # that L2 delivers to an SM per cycle while all SMs are reading
TILE_OVERHEAD = 1000  # cycles for a tile's pipeline to fill and its epilogue to end


@dataclass(frozen=True)
class Chip:
    """An architecture family: its streaming multiprocessors, and bf16 multiply-adds per cycle in each."""

    sms: int
    macs: int


CHIPS = {80: Chip(108, 1024), 90: Chip(132, 2048), 100: Chip(148, 4096)}  # A100, H100 and H200, B200


@dataclass(frozen=True)
class TileConfig:
    """A program's tile of both accumulators; per_sm: how many programs fit on an SM by registers and shared memory."""

    block_m: int
    block_f: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int = 1

    @property
    def accumulators(self) -> int:
        """fp32 registers that a thread needs for them."""
        return 2 * self.block_m * self.block_f // (32 * self.num_warps)


# The candidates of `tuning.choose`. Every one compiles without spills (`python -m ddt_kernels.aot --kernel swiglu`).
# The widest comes first: it wins ties in the cost model. The pointer configurations fit the 99 KB of a block on sm_86,
# 89 and 120, which use sm_80's.
HALF_BY_DESCRIPTOR = (
    TileConfig(128, 128, 64, 8, 4),
    TileConfig(128, 64, 64, 8, 3, 2),
    TileConfig(64, 64, 64, 4, 4, 2),
    TileConfig(64, 32, 64, 4, 5, 2),
)
HALF_BY_POINTER = (
    TileConfig(128, 128, 32, 8, 3),
    TileConfig(128, 64, 32, 4, 3, 2),
    TileConfig(64, 64, 32, 4, 4, 2),
    TileConfig(64, 32, 32, 4, 5, 2),
)
HALF_UNALIGNED = (TileConfig(64, 64, 32, 4, 2, 2),)  # odd pitches: 2-byte loads, nothing to pipeline
TF32_BY_DESCRIPTOR = (TileConfig(128, 64, 32, 8, 3), TileConfig(64, 64, 32, 4, 3, 2))
TF32_BY_POINTER = (TileConfig(128, 64, 32, 8, 2), TileConfig(64, 64, 32, 4, 3))
TF32_UNALIGNED = TF32_BY_POINTER[1:]
IEEE = (TileConfig(64, 64, 16, 8, 3, 2),)  # tensor cores do not multiply full fp32: plain FMAs


def _configs(dtype: torch.dtype, tf32: bool) -> tuple[tuple[TileConfig, ...], ...]:
    """Those for tensors moved by descriptor, by pointer, and by pointer with odd pitches."""
    if dtype != torch.float32:
        return HALF_BY_DESCRIPTOR, HALF_BY_POINTER, HALF_UNALIGNED
    return (TF32_BY_DESCRIPTOR, TF32_BY_POINTER, TF32_UNALIGNED) if tf32 else (IEEE, IEEE, IEEE)


def family(arch: int) -> int:
    """80, 90 (wgmma) or 100 (tcgen05); chips with neither run sm_80's code."""
    return {9: 90, 10: 100}.get(arch // 10, 80)


@cache
def forward_config(rows: int, channels: int, width: int, configs: tuple[TileConfig, ...], chip: Chip) -> TileConfig:
    """The configuration with the least estimated time: tiles on the busiest SM · cycles per tile.

    A tile takes as long as its multiply-adds or its loads from L2, whichever is slower, plus some overhead. At
    C = 1152, F = 3072 in bf16 on an H200 that means 128 x 128 from 257 rows on (nearly everywhere), 128 x 64 from 129,
    64 x 64 from 65, then 64 x 32. (fp32 halves the multiply-adds and doubles the bytes: the same ranking.)
    """

    def cycles(config: TileConfig) -> float:
        tiles = cdiv(rows, config.block_m) * cdiv(width, config.block_f)
        multiply = config.block_m * 2 * config.block_f / chip.macs
        fetch = (config.block_m + 2 * config.block_f) * 2 / L2_BYTES
        return cdiv(tiles, chip.sms) * (channels * max(multiply, fetch) + TILE_OVERHEAD)

    return min(configs, key=cycles)


def resident_programs(device: torch.device, chip: Chip, config: TileConfig) -> int:
    """How many programs run at once: more would wait, fewer would leave SMs idle."""
    sms = chip.sms
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    return sms * config.per_sm


def launch_forward(x: Tensor, w1: Tensor, w3: Tensor, keep: bool, tf32: bool) -> tuple[Tensor, Tensor]:
    """Runs the forward kernel; returns y (..., F) and, if kept, (gate | up) (..., 2F), else an empty tensor.

    tf32: fp32 tensors may be rounded to TF32 for the tensor cores. An x whose leading dimensions do not merge into one
    (after a transpose, for example) is copied: that moves 2·C columns beside a GEMM of C·2F.
    """
    C, F = x.shape[-1], w1.shape[0]
    rows = x.reshape(-1, C)
    M = rows.shape[0]
    y = x.new_empty((*x.shape[:-1], F))
    gate_up = x.new_empty((*x.shape[:-1], 2 * F) if keep else 0)
    gate, up = gate_up.view(M, 2 * F).split(F, dim=1) if keep else (None, None)

    arch = family(target_arch(x.device))
    ieee = x.dtype == torch.float32 and not tf32
    aligned = all(map(descriptor_fits, (rows, w1, w3)))
    load_descriptors = arch >= 90 and aligned and not ieee
    store_descriptors = load_descriptors and F * x.element_size() % 16 == 0
    by_descriptor, by_pointer, unaligned = _configs(x.dtype, tf32)
    configs = by_descriptor if load_descriptors else by_pointer if aligned else unaligned
    if F * x.element_size() % 16:  # stores are element by element: a thread with more of them spills
        configs = tuple(config for config in configs if config.accumulators <= 64)

    def run(config: TileConfig) -> None:
        def source(tensor: Tensor, block: int) -> Any:
            return tensor_descriptor(tensor, (block, config.block_k)) if load_descriptors else tensor

        def target(tensor: Tensor | None) -> Any:
            block = (config.block_m, config.block_f)
            return tensor_descriptor(tensor, block) if store_descriptors and tensor is not None else tensor

        tiles = cdiv(M, config.block_m) * cdiv(F, config.block_f)
        launch(
            swiglu_forward_kernel,
            (min(tiles, resident_programs(x.device, CHIPS[arch], config)),),
            x.device,
            *(source(rows, config.block_m), source(w1, config.block_f), source(w3, config.block_f)),
            *(target(y.view(M, F)), target(gate), target(up), M, rows.stride(0), w1.stride(0), w3.stride(0)),
            C=C,
            F=F,
            BLOCK_M=config.block_m,
            BLOCK_F=config.block_f,
            BLOCK_K=config.block_k,
            GROUP=GROUP,
            LOAD_DESCRIPTORS=load_descriptors,
            STORE_DESCRIPTORS=store_descriptors,
            KEEP=keep,
            PRECISION="tf32" if tf32 else "ieee",
            FLATTEN=arch != 90 or ieee,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    # Not keyed by `keep`: a checkpointed forward, which keeps nothing, and its recomputation agree on every bit.
    key = (next_power_of_2(M), C, F, x.dtype, tf32, load_descriptors, aligned)
    run(choose("swiglu", key, configs, forward_config(M, C, F, configs, CHIPS[arch]), run, x.device))
    return y, gate_up


def launch_backward(grad_y: Tensor, x: Tensor, w1: Tensor, w3: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and of the stacked weights (w1; w3), (2F, C)."""
    C, F = x.shape[-1], w1.shape[0]
    grad_gate_up = launch_backward_activation(grad_y.reshape(-1, F).contiguous(), gate_up.view(-1, 2 * F))
    with without_autocast(x):
        grad_x = (grad_gate_up @ torch.cat([w1, w3])).view(x.shape)
        return grad_x, grad_gate_up.T @ x.reshape(-1, C)


def launch_mlp_forward(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, keep: bool, tf32: bool) -> tuple[Tensor, Tensor]:
    """Like `launch_forward`, with z = y · w2ᵀ (..., O) in place of y."""
    y, gate_up = launch_forward(x, w1, w3, keep, tf32)
    with without_autocast(x):
        return torch.nn.functional.linear(y, w2), gate_up


def launch_mlp_backward(
    grad_z: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, gate_up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, of the stacked weights (w1; w3), (2F, C), and of w2."""
    C, F = x.shape[-1], w1.shape[0]
    grad_z = grad_z.reshape(-1, w2.shape[0])
    with without_autocast(x):
        y = grad_z @ w2  # the gradient of y, until the kernel overwrites it with y
        grad_gate_up = launch_backward_activation(y, gate_up.view(-1, 2 * F), y)
        grad_w2 = grad_z.T @ y
        del y
        grad_x = (grad_gate_up @ torch.cat([w1, w3])).view(x.shape)
        return grad_x, grad_gate_up.T @ x.reshape(-1, C), grad_w2


def launch_backward_activation(grad_y: Tensor, gate_up: Tensor, y: Tensor | None = None) -> Tensor:
    """The gradient of gate_up (M, 2F) from that of y (M, F), both contiguous, by the backward kernel.

    y: where to write silu(gate) · up, if anywhere: (M, F) contiguous; may be grad_y itself.
    """
    M, F = grad_y.shape
    grad_gate_up = gate_up.new_empty(gate_up.shape)
    block_f = min(next_power_of_2(F), 512)
    block_m = 2048 // block_f  # 16 elements of three tensors per thread in flight
    launch(
        swiglu_backward_kernel,
        (cdiv(M, block_m) * cdiv(F, block_f),),
        grad_y.device,
        *(grad_y, gate_up, grad_gate_up, y, M),
        F=F,
        BLOCK_M=block_m,
        BLOCK_F=block_f,
        num_warps=4,
    )
    return grad_gate_up


def aot_cases() -> list[AotCase]:
    """Every candidate at XL/2's shape, and the digits model's widths, whose row pitches are odd."""
    half, full = torch.bfloat16, torch.float32
    cases = [
        *(_forward_case(16384, 1152, 3072, half, keep) for keep in (False, True)),
        _forward_case(1, 1152, 3072, half, False),  # sizes Triton turns into constants
        _forward_case(16384, 1152, 3072, torch.float16, True),
        _forward_case(4096, 128, 341, half, True),
        _forward_case(4096, 341, 909, half, True),
        _forward_case(16384, 1152, 3072, full, True, tf32=True),
        _forward_case(4096, 128, 341, full, True, tf32=True),
        _forward_case(4096, 341, 909, full, True, tf32=True),
        _forward_case(16384, 1152, 3072, full, True),
        _forward_case(4096, 341, 909, full, True),
    ]
    widths = ((3072, half), (341, half), (3072, full))
    return cases + [_backward_case(*width, with_y) for width in widths for with_y in (False, True)]


def _forward_case(rows: int, channels: int, width: int, dtype: torch.dtype, keep: bool, tf32: bool = False) -> AotCase:
    x = torch.empty(rows, channels, dtype=dtype, device="meta")
    w = torch.empty(width, channels, dtype=dtype, device="meta")
    kind = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    kernel = (swiglu_forward_kernel.__name__,)
    gemm = tf32 or dtype != torch.float32  # by the tensor cores
    return AotCase(
        f"M {rows} C {channels} F {width} {kind}{' keep' if keep else ''}",
        lambda: launch_forward(x, w, w, keep, tf32),
        tensor_cores=kernel if gemm else (),
        bulk_copies=kernel if descriptor_fits(x) and gemm else (),
        ones=("M",) if rows == 1 else (),
        budgets={kernel[0]: Budget(barriers=5, copies=1)} if gemm and channels == 1152 else {},
    )


def _backward_case(width: int, dtype: torch.dtype, with_y: bool) -> AotCase:
    rows = 16384
    grad_y = torch.empty(rows, width, dtype=dtype, device="meta")
    gate_up = torch.empty(rows, 2 * width, dtype=dtype, device="meta")
    label = f"F {width} {str(dtype).removeprefix('torch.')}{' with y' if with_y else ''}"
    waits = (2, 0) if width == 3072 else (2, 3)
    budget = Budget(*waits, bytes=(6 if with_y else 5) * 2048 * dtype.itemsize)  # a program's 2048 elements
    return AotCase(
        label,
        lambda: launch_backward_activation(grad_y, gate_up, grad_y if with_y else None),
        budgets={swiglu_backward_kernel.__name__: budget},
    )
