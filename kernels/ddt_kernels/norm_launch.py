"""Launching the norm family's kernels: tile configurations, grids, outputs, the two-stage parameter gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ddt_kernels.compilation import AotCase, Budget
from ddt_kernels.norm_backward_kernels import modulation_gradients_kernel, norm_modulate_backward_kernel
from ddt_kernels.norm_kernels import norm_modulate_forward_kernel
from ddt_kernels.runtime import cdiv, launch, next_power_of_2, target_arch

MAX_CHANNELS = 6144  # one program holds a row in registers; wider rows spill
FEW_ROWS = 512  # 4 an SM: with a warp each, a scheduler has one, which waits more than it issues
BACKWARD_STAGES = 2  # while a row is computed, the next one's loads are under way


@dataclass(frozen=True)
class TileConfig:
    """How a row of C columns is split into tiles of `main` and `tail` columns, and over how many warps."""

    main: int
    tail: int
    num_warps: int

    def constexprs(self, dtype: torch.dtype, channels: int) -> dict[str, int]:
        """The kernels' tile sizes. VECTOR: how many adjacent columns of a tile a thread holds, those of one access."""
        vector = 16 // dtype.itemsize if channels % 16 == 0 else 1
        lanes = min(32 * self.num_warps, self.main)
        return {"C": channels, "MAIN": self.main, "TAIL": self.tail, "LANES": lanes, "VECTOR": vector}


@cache
def forward_config(channels: int, few_rows: bool = False) -> TileConfig:
    """One warp on a row of at most 48 columns per lane; at most 32 on wider rows, since registers hold every input.

    Few rows leave an SM most of its warps: a row takes as many as the backward pass gives it.
    """
    main, tail = _tiles(channels)
    num_warps = 1 if main + tail <= 1536 else min(next_power_of_2(cdiv(main + tail, 1024)), 8)
    if few_rows:
        num_warps = backward_config(channels).num_warps
    return TileConfig(main, max(tail, min(32 * num_warps, main)), num_warps)


@cache
def backward_config(channels: int) -> TileConfig:
    """Eight columns of `main` per thread, a 16-byte access in bf16, on up to 8 warps.

    At least two of `tail`: an asynchronous copy moves 4 bytes or more. Columns that are loaded one at a time need more
    registers, so at most four per thread.
    """
    main, tail = _tiles(channels)
    num_warps = min(max(main // (128 if channels % 16 else 256), 1), 8)
    return TileConfig(main, max(tail, min(64 * num_warps, main)), num_warps)


def backward_register_limit(config: TileConfig, channels: int, itemsize: int, most_inputs: bool) -> int:
    """The `maxnreg` of the backward kernel: 128 up to ten columns of 2 bytes per thread (C 1152), so that four programs
    of four warps fit on an SM. More need more; 255 is the hardware limit. Unset, ptxas may spill to save a few.

    most_inputs: a gate and a scale per token or, on sm_100, per sample; Triton 3.6 spills two registers of them at 128.
    """
    if itemsize != 2 or channels % 16 or config.main + config.tail > 10 * 32 * config.num_warps:
        return 255
    return 136 if most_inputs else 128


def _tiles(channels: int) -> tuple[int, int]:
    main = max(next_power_of_2(channels) // 2, 1)
    return main, max(16, min(main, 32), next_power_of_2(channels - main))


def forward_rows_per_program(batch: int, tokens: int, per_token: bool) -> int:
    """Four rows share their sample's modulations, if enough programs are left to fill a GPU."""
    return 1 if per_token or batch * tokens < 8192 else 4


def backward_rows_per_program(batch: int, tokens: int) -> int:
    """Rows each backward program sums over: about 1024 programs until each has 32 rows, then as many as needed.

    1024 programs are two waves of 4 on each of 132 SMs; at 32 rows the fp32 partial sums of a per-sample pass without a
    gate are 4% of its traffic.
    """
    return min(next_power_of_2(cdiv(batch * tokens, 1024)), 32, next_power_of_2(tokens))


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(-3), tensor.stride(-2))


def _history_stride(modulation: Tensor | None) -> int:
    return 0 if modulation is None or modulation.ndim == 3 else modulation.stride(0)


def launch_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm: str,
    store_residual: bool,
    forecast: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Runs the forward kernel; returns (x' or None, y or None). norm: "rms", "layer" or "none".

    forecast: (weights, step), of modulations (K, B, N or 1, C).
    """
    B, N, C = x.shape
    config = forward_config(C, B * N <= FEW_ROWS)
    modulation = gate if scale is None else scale
    assert modulation is not None
    residual = x.new_empty(x.shape) if store_residual else None
    y = x.new_empty(x.shape) if norm != "none" else None
    per_token = modulation.shape[-2] == N
    weights, step, steps, history = None, None, 0, 1
    if forecast is not None:
        (weights, step), history = forecast, modulation.shape[0]
        steps = weights.shape[0]
    rows = forward_rows_per_program(B, N, per_token)
    splits = cdiv(N, rows)
    launch(
        norm_modulate_forward_kernel,
        (B * splits,),
        x.device,
        *(x, branch, gate, weight, shift, scale, weights, step, residual, y, N, splits, rows),
        *(*_strides(x), *_strides(branch), *_strides(gate), *_strides(shift), *_strides(scale), eps),
        *(steps, _history_stride(gate), _history_stride(shift), _history_stride(scale)),
        **config.constexprs(x.dtype, C),
        NORM=norm,
        GATED=gate is not None,
        STORE_RESIDUAL=store_residual,
        PER_TOKEN=per_token,
        SINGLE_ROW=rows == 1,
        HISTORY=history,
        num_warps=config.num_warps,
        maxnreg=255,  # unset, ptxas may spill a few registers to save some
    )
    return residual, y


@dataclass(frozen=True)
class Gradients:
    """What the backward kernels wrote; None where the op has no such input; shift is empty where it equals grad_y."""

    x: Tensor | None
    branch: Tensor | None
    gate: Tensor | None
    weight: Tensor | None
    shift: Tensor | None
    scale: Tensor | None


def launch_backward(
    grad_residual: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm: str,
) -> Gradients:
    """Runs the backward kernels, given the gradients of x' (grad_residual) and y (grad_y), or one of them."""
    like, modulation = (branch, gate) if scale is None else (x, scale)
    assert like is not None
    assert modulation is not None
    B, N, C = like.shape
    config = backward_config(C)
    per_token = modulation.shape[1] == N
    rows = backward_rows_per_program(B, N)
    splits = cdiv(N, rows)

    def empty(exists: bool, *shape: int) -> Tensor | None:
        return like.new_empty(shape) if exists else None

    def partial_sums(exists: bool) -> Tensor | None:
        return like.new_empty((B * splits, C), dtype=torch.float32) if exists else None

    grad_residual, grad_y = (grad if grad is None else grad.contiguous() for grad in (grad_residual, grad_y))
    has_norm, gated, weighted = norm != "none", gate is not None, weight is not None
    grad_x, grad_branch = empty(has_norm, B, N, C), empty(gated, B, N, C)
    grad_gate, grad_scale = empty(gated, *modulation.shape), empty(has_norm, *modulation.shape)
    grad_shift = empty(has_norm, *((0,) if per_token else modulation.shape))
    sum_shift, sum_gate = partial_sums(has_norm and not per_token), partial_sums(gated and not per_token)
    sum_scale = partial_sums(weighted if per_token else has_norm)
    most_inputs = gated and has_norm and (per_token or target_arch(like.device) >= 100)
    launch(
        norm_modulate_backward_kernel,
        (B * splits,),
        like.device,
        *(grad_residual, grad_y, x, branch, gate, weight, scale),
        *(grad_x, grad_branch, grad_gate, grad_scale, sum_shift, sum_scale, sum_gate),
        *(N, splits, rows, *_strides(x), *_strides(branch), *_strides(gate), *_strides(scale), eps),
        **config.constexprs(like.dtype, C),
        NORM=norm,
        GATED=gated,
        ADD_RESIDUAL=grad_residual is not None,
        PER_TOKEN=per_token,
        STAGES=BACKWARD_STAGES,
        num_warps=config.num_warps,
        maxnreg=backward_register_limit(config, C, like.dtype.itemsize, most_inputs),
    )
    sum_weight = sum_scale
    if not per_token:
        sum_weight = like.new_empty((B, C), dtype=torch.float32) if weighted else None
        sums, gradients = (sum_shift, sum_scale, sum_gate), (grad_shift, grad_scale, grad_gate, sum_weight)
        _launch_modulation_gradients(like.shape, like.device, norm, splits, weight, scale, sums, gradients)
    grad_weight = None if weight is None or sum_weight is None else sum_weight.sum(0).to(weight.dtype)
    return Gradients(grad_x, grad_branch, grad_gate, grad_weight, grad_shift, grad_scale)


def _launch_modulation_gradients(
    shape: torch.Size,
    device: torch.device,
    norm: str,
    splits: int,
    weight: Tensor | None,
    scale: Tensor | None,
    sums: tuple[Tensor | None, ...],
    gradients: tuple[Tensor | None, ...],
) -> None:
    """Adds up the backward kernel's partial sums (shift, scale, gate) to the per-sample gradients of shift, scale and
    gate and each sample's share of the weight's."""
    columns = 128
    launch(
        modulation_gradients_kernel,
        (shape[0], cdiv(shape[2], columns)),
        device,
        *(*sums, weight, scale, *gradients, splits, _strides(scale)[0]),
        C=shape[2],
        NORM=norm,
        GATED=sums[2] is not None,
        SPLITS=16,
        COLS=columns,
        num_warps=4,
    )


def aot_cases() -> list[AotCase]:
    """Every op at XL/2's width in bf16; at other widths the op with the most live tensors, which spills first."""
    half = torch.bfloat16
    cases = [case for per_token in (False, True) for case in _width_cases(1152, half, per_token)]
    for channels, dtype in ((1152, torch.float32), (1024, half), (341, half)):
        cases += _heaviest(_width_cases(channels, dtype, True))
    for channels in (384, 768, 1536):  # the narrowest of real models and, of 1536, the most columns per thread
        cases += _heaviest(_width_cases(channels, half, False))[1:]
    cases += _heaviest(_width_cases(1152, half, False, 1))[:1]
    for per_token in (False, True):
        cases += _heaviest(_width_cases(MAX_CHANNELS, half, per_token))
    cases += _heaviest(_forecast_cases(1152, half, True, 2)) + _forecast_cases(1152, half, True, 3)
    for per_token in (False, True):
        cases += _heaviest(_forecast_cases(MAX_CHANNELS, half, per_token, 3))
    return cases


def _heaviest(cases: list[AotCase]) -> list[AotCase]:
    return [case for case in cases if case.configuration.startswith("gated rms")]


# In bf16, on triton 3.6 or 3.8, whichever waits more: rows moved forward, barriers and rows moved backward; of both the
# rows moved per sample, then per token.
_WAITS = {
    "rms": ((2, 4), 7, (3, 5)),
    "gated rms": ((4, 7), 9, (6, 10)),
    "gated layer": ((3, 6), 12, (5, 9)),
    "gated": ((3, 4), 4, (3, 5)),
}
_LATENCY_BOUND = "two rows read and one written are too few bytes for a round trip of four programs"


def _budgets(
    op: str, channels: int, dtype: torch.dtype, per_token: bool, few_rows: bool
) -> tuple[dict[str, Budget], dict[str, Budget]]:
    """Of the forward and of the backward pass, at the widths of the models here: a forward pass waits for memory once
    and, on a warp per row, for no barrier."""
    if channels not in (384, 768, 1024, 1152, 1536) or dtype != torch.bfloat16:
        return {}, {}
    row = channels * dtype.itemsize
    forward_rows, barriers, backward_rows = _WAITS[op]
    forward = Budget(1, 2 if few_rows else 0, bytes=forward_rows[per_token] * row)
    waits = _LATENCY_BOUND if op == "rms" and not per_token else ""
    backward = Budget(1, barriers, bytes=backward_rows[per_token] * row, latency_bound=waits)
    return {norm_modulate_forward_kernel.__name__: forward}, {
        norm_modulate_backward_kernel.__name__: backward,
        modulation_gradients_kernel.__name__: Budget(phases=4),
    }


def _width_cases(channels: int, dtype: torch.dtype, per_token: bool, batch: int = 128) -> list[AotCase]:
    B, N = batch, 256
    x = torch.empty(B, N, channels, dtype=dtype, device="meta")
    weight = torch.empty(channels, dtype=dtype, device="meta")
    modulations = torch.empty(B, N if per_token else 1, 6 * channels, dtype=dtype, device="meta").chunk(6, dim=-1)
    shift, scale, gate = modulations[:3]
    label = f"C {channels} {str(dtype).removeprefix('torch.')} {'per token' if per_token else 'per sample'}"
    label += f", {B * N} rows" if B * N <= FEW_ROWS else ""

    def case(op: str, forward: Callable[[], object], backward: Callable[[], object]) -> tuple[AotCase, AotCase]:
        budgets = _budgets(op, channels, dtype, per_token, B * N <= FEW_ROWS)
        ones = ("rows_per_program",) if forward_rows_per_program(B, N, per_token) == 1 else ()
        return (
            AotCase(f"{op} {label}", forward, ones=ones, budgets=budgets[0]),
            AotCase(f"{op} {label}", backward, budgets=budgets[1]),
        )

    pairs = (
        case(
            "rms",
            lambda: launch_forward(x, None, None, weight, shift, scale, 1e-6, "rms", False),
            lambda: launch_backward(None, x, x, None, None, weight, scale, 1e-6, "rms"),
        ),
        case(
            "gated rms",
            lambda: launch_forward(x, x, gate, weight, shift, scale, 1e-6, "rms", True),
            lambda: launch_backward(x, x, x, x, gate, weight, scale, 1e-6, "rms"),
        ),
        case(
            "gated layer",
            lambda: launch_forward(x, x, gate, None, shift, scale, 1e-6, "layer", False),
            lambda: launch_backward(None, x, x, x, gate, None, scale, 1e-6, "layer"),
        ),
        case(
            "gated",
            lambda: launch_forward(x, x, gate, None, None, None, 0.0, "none", True),
            lambda: launch_backward(x, None, None, x, gate, None, None, 0.0, "none"),
        ),
    )
    return [passes[direction] for direction in (0, 1) for passes in pairs]


def _forecast_cases(channels: int, dtype: torch.dtype, per_token: bool, history: int) -> list[AotCase]:
    B, N = 128, 256
    x = torch.empty(B, N, channels, dtype=dtype, device="meta")
    weight = torch.empty(channels, dtype=dtype, device="meta")
    cached = torch.empty(history, B, N if per_token else 1, 38 * channels, dtype=dtype, device="meta")
    shift, scale, gate = cached[..., : 3 * channels].chunk(3, dim=-1)
    forecast = torch.empty(250, history, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    label = f"C {channels} {str(dtype).removeprefix('torch.')} {'per token' if per_token else 'per sample'}"
    label = f"{label}, forecast from {history}"
    ones = ("rows_per_program",) if per_token else ()
    rows = {"rms": 4 + 2 * (history - 1), "gated rms": 7 + 3 * (history - 1), "gated layer": 6 + 3 * (history - 1)}

    def case(op: str, run: Callable[[], object]) -> AotCase:
        budgets = {}
        if (channels, dtype) == (1152, torch.bfloat16):
            budgets = {norm_modulate_forward_kernel.__name__: Budget(3, bytes=rows[op] * channels * dtype.itemsize)}
        return AotCase(f"{op} {label}", run, ones=ones, budgets=budgets)

    return [
        case("rms", lambda: launch_forward(x, None, None, weight, shift, scale, 1e-6, "rms", False, forecast)),
        case("gated rms", lambda: launch_forward(x, x, gate, weight, shift, scale, 1e-6, "rms", True, forecast)),
        case("gated layer", lambda: launch_forward(x, x, gate, None, shift, scale, 1e-6, "layer", False, forecast)),
    ]
