"""Launches the kernels of swiglu and swiglu_mlp: tile configurations, descriptors, outputs, and the plain GEMMs around
them.

Each has two implementations: the fused kernels, and cuBLAS's GEMMs with one pass for the activation. The faster one on
this GPU runs. Where the tensor cores cannot be fed by bulk or 16-byte copies (fp32 without TF32, row pitches that are
no multiple of 16 bytes), it is always cuBLAS.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.compilation import AotCase, Budget
from ddt_kernels.launcher import launcher
from ddt_kernels.runtime import (
    HAS_TRITON,
    cdiv,
    descriptor_fits,
    empty,
    launch,
    multiprocessors,
    next_power_of_2,
    target_arch,
    tensor_descriptor,
    without_autocast,
)
from ddt_kernels.swiglu_kernels import (
    swiglu_activation_kernel,
    swiglu_backward_kernel,
    swiglu_forward_kernel,
    swiglu_mlp_backward_kernel,
)
from ddt_kernels.tuning import choose, implementation

IMPLEMENTATIONS = ("fused", "cublas")
GROUP = 16  # tile rows walked together: √(132 SMs · 2·BLOCK_F / BLOCK_M) minimises a wave's distinct bytes
L2_BYTES = 48  # that L2 delivers to an SM per cycle while all SMs are reading
TILE_OVERHEAD = 1000  # cycles for a tile's stores and barriers; the activation takes as many whatever the tiles


@dataclass(frozen=True)
class Chip:
    """An architecture family: its streaming multiprocessors, and bf16 multiply-adds per cycle in each."""

    sms: int
    macs: int


CHIPS = {80: Chip(108, 1024), 90: Chip(132, 2048), 100: Chip(148, 4096)}  # A100, H100 and H200, B200


@dataclass(frozen=True)
class TileConfig:
    """A program's tile of y or its gradient; per_sm: how many programs fit on an SM by registers and shared memory."""

    block_m: int
    block_f: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int = 1


# The candidates of `tuning.choose`. Every one compiles without spills (`python -m ddt_kernels.aot --kernel swiglu`).
# The widest comes first: it wins ties in the cost model. The pointer configurations fit the 99 KB of a block on sm_86,
# 89 and 120, which use sm_80's.
HALF_BY_DESCRIPTOR = (
    TileConfig(128, 128, 64, 8, 4),
    TileConfig(128, 64, 64, 8, 3, 2),
    TileConfig(64, 64, 64, 4, 4, 2),
    TileConfig(64, 32, 64, 4, 5, 2),
)
HALF_ODD_WIDTH = (TileConfig(128, 64, 64, 8, 4), TileConfig(64, 64, 64, 4, 3, 3))
HALF_BY_POINTER = (
    TileConfig(128, 128, 32, 8, 3),
    TileConfig(128, 64, 32, 4, 3, 2),
    TileConfig(64, 64, 32, 4, 4, 3),
    TileConfig(64, 32, 32, 4, 5, 4),
)
HALF_ODD_BY_POINTER = HALF_BY_POINTER[2:]
TF32_BY_DESCRIPTOR = (TileConfig(128, 64, 32, 8, 3), TileConfig(64, 64, 32, 4, 3, 2))
TF32_BY_POINTER = (TileConfig(128, 64, 32, 8, 2, 2), TileConfig(64, 64, 32, 4, 3, 3))
BACKWARD_BY_DESCRIPTOR = (TileConfig(128, 128, 64, 8, 3, 2), TileConfig(128, 256, 64, 8, 3))
BACKWARD_BY_POINTER = (TileConfig(128, 128, 32, 8, 3), TileConfig(64, 64, 32, 4, 4, 4))


def forward_configs(dtype: torch.dtype, by_descriptor: bool, odd_width: bool) -> tuple[TileConfig, ...]:
    """odd_width: rows of y are no multiple of 16 bytes: stores of single elements, by pointer, take more registers."""
    if dtype == torch.float32:
        return TF32_BY_DESCRIPTOR if by_descriptor else TF32_BY_POINTER
    if by_descriptor:
        return HALF_ODD_WIDTH if odd_width else HALF_BY_DESCRIPTOR
    return HALF_ODD_BY_POINTER if odd_width else HALF_BY_POINTER


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


def resident_programs(device: torch.device, config: TileConfig) -> int:
    """How many programs run at once: more would wait, fewer would leave SMs idle."""
    return multiprocessors(device) * config.per_sm


def stacked(w1: Tensor, w3: Tensor) -> Tensor:
    """(2, F, C): w1 and w3, in place if w3 follows w1 in one tensor, as its two halves do, else copied."""
    distance = w3.storage_offset() - w1.storage_offset()
    together = w1.untyped_storage().data_ptr() == w3.untyped_storage().data_ptr()
    if together and w1.stride() == w3.stride() and distance >= w1.shape[0] * w1.stride(0):
        return w1.as_strided((2, *w1.shape), (distance, *w1.stride()))
    return torch.stack([w1, w3])


def launch_forward(
    x: Tensor, w1: Tensor, w3: Tensor, keep: bool, tf32: bool, b1: Tensor | None = None, b3: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns y (..., F) and, if kept, (gate | up) (..., 2F), else an empty tensor.

    tf32: fp32 tensors may be rounded to TF32 for the tensor cores. An x whose leading dimensions do not merge into one
    (after a transpose, for example) is copied: that moves 2·C columns beside a GEMM of C·2F.
    """
    rows, weights = x.reshape(-1, x.shape[-1]), stacked(w1, w3)
    F, lead = w1.shape[0], x.shape[:-1]
    tensor_cores = tf32 and F % 4 == 0 if x.dtype == torch.float32 else True
    fused = HAS_TRITON and tensor_cores and descriptor_fits(rows) and descriptor_fits(weights)

    def run(name: str) -> tuple[Tensor, Tensor | None]:
        if name == "fused":
            return _fused_forward(rows, weights, b1, b3, keep)
        with without_autocast(x):
            bias = None if b1 is None or b3 is None else torch.cat([b1, b3])
            gate_up = torch.nn.functional.linear(rows, weights.flatten(0, 1), bias)
        return launch_activation(gate_up), gate_up

    key = (next_power_of_2(rows.shape[0]), x.shape[-1], F, x.dtype)  # not what is kept: see `_fused_forward`
    y, gate_up = run(implementation("swiglu", key, IMPLEMENTATIONS if fused else ("cublas",), run, x.device))
    return y.view(*lead, F), x.new_empty(0) if gate_up is None or not keep else gate_up.view(*lead, 2 * F)


def _plain_forward(
    x: Tensor, weights: Tensor, b1: Tensor | None, b3: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    gate, up = (torch.nn.functional.linear(x, *pair) for pair in zip(weights, (b1, b3), strict=True))
    return _plain_activation(gate_up := torch.cat([gate, up], -1)), gate_up if keep else None


@launcher("swiglu GEMM", _plain_forward, {"x": 0})
def _fused_forward(
    x: Tensor, weights: Tensor, b1: Tensor | None, b3: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """y (M, F) and, if kept, gate_up (M, 2F) of x (M, C) and weights (2, F, C)."""
    (M, C), F = x.shape, weights.shape[1]
    y, gate_up = empty(x, (M, F)), empty(x, (M, 2 * F)) if keep else None
    gate, up = (None, None) if gate_up is None else gate_up.split(F, dim=1)
    arch = family(target_arch(x.device))
    load_descriptors = arch >= 90
    odd_width = F * x.element_size() % 16 != 0
    store_descriptors = load_descriptors and not odd_width
    configs = forward_configs(x.dtype, load_descriptors, odd_width)

    def run(config: TileConfig) -> None:
        def loaded(tensor: Tensor, *block: int) -> Any:
            return tensor_descriptor(tensor, block) if load_descriptors else tensor

        def stored(tensor: Tensor | None) -> Any:
            block = config.block_m, config.block_f
            return tensor_descriptor(tensor, block) if tensor is not None and store_descriptors else tensor

        tiles = cdiv(M, config.block_m) * cdiv(F, config.block_f)
        launch(
            swiglu_forward_kernel,
            (min(tiles, resident_programs(x.device, config)),),
            x.device,
            loaded(x, config.block_m, config.block_k),
            loaded(weights, 2, config.block_f, config.block_k),
            *(stored(y), stored(gate), stored(up), b1, b3),
            *(M, x.stride(0), weights.stride(0), weights.stride(1)),
            C=C,
            F=F,
            BLOCK_M=config.block_m,
            BLOCK_F=config.block_f,
            BLOCK_K=config.block_k,
            GROUP=GROUP,
            LOAD_DESCRIPTORS=load_descriptors,
            STORE_DESCRIPTORS=store_descriptors,
            KEEP=gate_up is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    # Not keyed by what is kept: a checkpointed forward, which keeps nothing, and its recomputation agree on every bit.
    key = (next_power_of_2(M), C, F, x.dtype, load_descriptors)
    run(choose("swiglu tile", key, configs, forward_config(M, C, F, configs, CHIPS[arch]), run, x.device))
    return y, gate_up


def launch_backward(
    grad_y: Tensor, x: Tensor, w1: Tensor, w3: Tensor, gate_up: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, of the stacked weights (w1; w3), (2F, C), and, if `biased`, of the biases (b1; b3),
    (2F,), else an empty tensor."""
    F = w1.shape[0]
    grad_gate_up = launch_backward_activation(grad_y.reshape(-1, F).contiguous(), gate_up.view(-1, 2 * F))
    return _input_gradients(grad_gate_up, x, w1, w3, biased)


def _input_gradients(
    grad_gate_up: Tensor, x: Tensor, w1: Tensor, w3: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x):
        grad_x = (grad_gate_up @ stacked(w1, w3).flatten(0, 1)).view(x.shape)
        grad_weights = grad_gate_up.T @ x.reshape(-1, x.shape[-1])
    return grad_x, grad_weights, grad_gate_up.sum(0) if biased else x.new_empty(0)


def launch_mlp_forward(
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    keep: bool,
    tf32: bool,
    b1: Tensor | None = None,
    b3: Tensor | None = None,
    b2: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Like `launch_forward`, with z = y · w2ᵀ + b2 (..., O) in place of y."""
    y, gate_up = launch_forward(x, w1, w3, keep, tf32, b1, b3)
    with without_autocast(x):
        return torch.nn.functional.linear(y, w2, b2), gate_up


def launch_mlp_backward(
    grad_z: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, gate_up: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, of the stacked weights (w1; w3), (2F, C), of w2, and, if `biased`, of the biases
    (b1; b3; b2), (2F + O,), else an empty tensor."""
    grad_z, gate_up = grad_z.reshape(-1, w2.shape[0]), gate_up.view(-1, 2 * w1.shape[0])
    fused = HAS_TRITON and x.dtype != torch.float32 and descriptor_fits(grad_z) and descriptor_fits(w2)

    def run(name: str) -> tuple[Tensor, Tensor]:
        if name == "fused":
            return launch_fused_mlp_backward(grad_z, w2, gate_up)
        y = grad_z @ w2  # the gradient of y, until the kernel overwrites it with y
        return launch_backward_activation(y, gate_up, y), y

    key = (next_power_of_2(grad_z.shape[0]), w2.shape[0], w2.shape[1], x.dtype)
    with without_autocast(x):
        names = IMPLEMENTATIONS if fused else ("cublas",)
        grad_gate_up, y = run(implementation("swiglu_mlp backward", key, names, run, x.device))
        grad_w2 = grad_z.T @ y
    del y
    grad_x, grad_weights, grad_biases = _input_gradients(grad_gate_up, x, w1, w3, biased)
    return grad_x, grad_weights, grad_w2, torch.cat([grad_biases, grad_z.sum(0)]) if biased else grad_biases


def _plain_mlp_backward(grad_z: Tensor, w2: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return _plain_activation_backward(grad_z @ w2, gate_up), _plain_activation(gate_up)


@launcher("swiglu_mlp backward GEMM", _plain_mlp_backward, {"grad_z": 0, "gate_up": 0})
def launch_fused_mlp_backward(grad_z: Tensor, w2: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up (M, 2F), y (M, F)) from that of z = y · w2ᵀ, (M, O). F is a multiple of 8."""
    (M, out), F = grad_z.shape, w2.shape[1]
    y, grad_gate_up = empty(gate_up, (M, F)), empty(gate_up, gate_up.shape)
    arch = family(target_arch(grad_z.device))
    descriptors = arch >= 90
    configs = BACKWARD_BY_DESCRIPTOR if descriptors else BACKWARD_BY_POINTER

    def run(config: TileConfig) -> None:
        def moved(tensor: Tensor, *block: int) -> Any:
            return tensor_descriptor(tensor, block) if descriptors else tensor

        tiles = cdiv(M, config.block_m) * cdiv(F, config.block_f)
        launch(
            swiglu_mlp_backward_kernel,
            (min(tiles, resident_programs(grad_z.device, config)),),
            grad_z.device,
            moved(grad_z, config.block_m, config.block_k),
            moved(w2, config.block_k, config.block_f),
            *(gate_up, grad_gate_up, y),
            *(M, grad_z.stride(0), w2.stride(0)),
            OUT=out,
            F=F,
            BLOCK_M=config.block_m,
            BLOCK_F=config.block_f,
            BLOCK_K=config.block_k,
            GROUP=GROUP,
            DESCRIPTORS=descriptors,
            FLATTEN=config.per_sm == 1,  # with two on an SM, one multiplies during the other's epilogue
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    key = (next_power_of_2(M), out, F, grad_z.dtype)
    run(choose("swiglu_mlp backward tile", key, configs, configs[0], run, grad_z.device))
    return grad_gate_up, y


def _plain_activation(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


@launcher("swiglu activation", _plain_activation, {"gate_up": 0}, compiled=True)
def launch_activation(gate_up: Tensor) -> Tensor:
    """silu(gate) · up (M, F) of gate_up (M, 2F), contiguous."""
    M, F = gate_up.shape[0], gate_up.shape[1] // 2
    y = empty(gate_up, (M, F))
    grid, blocks = _pass_blocks(M, F)
    launch(swiglu_activation_kernel, grid, y.device, gate_up, y, M, F=F, **blocks, num_warps=4)
    return y


def _plain_activation_backward(grad_y: Tensor, gate_up: Tensor, y: Tensor | None = None) -> Tensor:
    grad_gate_up = reference.swiglu_activation_backward(grad_y, gate_up)
    if y is not None:
        y.copy_(_plain_activation(gate_up))
    return grad_gate_up


@launcher(
    "swiglu activation backward",
    _plain_activation_backward,
    {"grad_y": 0, "gate_up": 0, "y": 0},
    compiled=True,
    writes=("y",),
)
def launch_backward_activation(grad_y: Tensor, gate_up: Tensor, y: Tensor | None = None) -> Tensor:
    """The gradient of gate_up (M, 2F) from that of y (M, F), both contiguous, by the backward kernel.

    y: where to write silu(gate) · up, if anywhere: (M, F) contiguous; may be grad_y itself.
    """
    M, F = grad_y.shape
    grad_gate_up = empty(gate_up, gate_up.shape)
    grid, blocks = _pass_blocks(M, F)
    arguments = grad_y, gate_up, grad_gate_up, y, M
    launch(swiglu_backward_kernel, grid, grad_y.device, *arguments, F=F, **blocks, num_warps=4)
    return grad_gate_up


def _pass_blocks(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and blocks of a pass over (rows, width): 16 elements of each tensor in flight per thread."""
    block_f = min(next_power_of_2(width), 512)
    block_m = 2048 // block_f
    return (cdiv(rows, block_m) * cdiv(width, block_f),), {"BLOCK_M": block_m, "BLOCK_F": block_f}


def aot_cases() -> list[AotCase]:
    """Every candidate at XL/2's shape, and at a width whose rows of y are no multiple of 16 bytes (digits models)."""
    half, full = torch.bfloat16, torch.float32
    cases = [
        *(_forward_case(16384, 1152, 3072, half, keep) for keep in (False, True)),
        _forward_case(16384, 1152, 3072, half, True, biased=True),
        _forward_case(1, 1152, 3072, half, False),  # sizes Triton turns into constants
        _forward_case(16384, 1152, 3072, torch.float16, True),
        _forward_case(4096, 128, 341, half, True),
        _forward_case(16384, 1152, 3072, full, True, tf32=True),
        *(_mlp_backward_case(dtype) for dtype in (half, torch.float16)),
    ]
    widths = ((3072, half), (341, half), (3072, full))
    return cases + [_pass_case(*width, kind) for width in widths for kind in ("forward", "backward", "backward with y")]


def _forward_case(
    rows: int, channels: int, width: int, dtype: torch.dtype, keep: bool, tf32: bool = False, biased: bool = False
) -> AotCase:
    x = torch.empty(rows, channels, dtype=dtype, device="meta")
    w = torch.empty(width, channels, dtype=dtype, device="meta")
    bias = torch.empty(width, dtype=dtype, device="meta") if biased else None
    kind = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    kernel = (swiglu_forward_kernel.__name__,)
    return AotCase(
        f"M {rows} C {channels} F {width} {kind}{' keep' if keep else ''}{' biased' if biased else ''}",
        lambda: launch_forward(x, w, w, keep, tf32, bias, bias),
        tensor_cores=kernel,
        bulk_copies=kernel,
        ones=("M",) if rows == 1 else (),
        budgets={kernel[0]: Budget(barriers=10 if keep else 6, copies=1, drains=1)} if channels == 1152 else {},
    )


def _mlp_backward_case(dtype: torch.dtype) -> AotCase:
    grad_z, w2, gate_up = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((16384, 1152), (1152, 3072), (16384, 6144))
    )
    kernel = (swiglu_mlp_backward_kernel.__name__,)
    return AotCase(
        f"M 16384 O 1152 F 3072 {str(dtype).removeprefix('torch.')}",
        lambda: launch_fused_mlp_backward(grad_z, w2, gate_up),
        tensor_cores=kernel,
        bulk_copies=kernel,
        budgets={kernel[0]: Budget(barriers=19, copies=1, drains=1)},
    )


def _pass_case(width: int, dtype: torch.dtype, kind: str) -> AotCase:
    rows = 16384
    grad_y = torch.empty(rows, width, dtype=dtype, device="meta")
    gate_up = torch.empty(rows, 2 * width, dtype=dtype, device="meta")
    columns, run, waits = {
        "forward": (3, lambda: launch_activation(gate_up), (3, 1)),
        "backward": (5, lambda: launch_backward_activation(grad_y, gate_up), (6, 1)),
        "backward with y": (6, lambda: launch_backward_activation(grad_y, gate_up, grad_y), (2, 3)),
    }[kind]
    if width % 8 == 0:
        waits = (1, 0) if dtype == torch.bfloat16 else (4, 0)
    budget = Budget(*waits, bytes=columns * 2048 * dtype.itemsize)  # a program's 2048 elements
    kernels = swiglu_activation_kernel, swiglu_backward_kernel
    return AotCase(
        f"F {width} {str(dtype).removeprefix('torch.')} {kind}",
        run,
        budgets={kernel.__name__: budget for kernel in kernels},
    )
