"""Launching the norm family's kernels: tile configurations, grids, outputs, the two-stage parameter gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ddt_kernels import reference
from ddt_kernels.compilation import AotCase, Budget
from ddt_kernels.launcher import launcher
from ddt_kernels.norm_backward_kernels import modulation_gradients_kernel, norm_modulate_backward_kernel
from ddt_kernels.norm_kernels import norm_modulate_forward_kernel
from ddt_kernels.runtime import cdiv, empty, launch, multiprocessors, next_power_of_2, target_arch

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
def forward_config(channels: int, many_warps: bool = False) -> TileConfig:
    """One warp on a row of at most 48 columns per lane; at most 32 on wider rows, since registers hold every input.

    many_warps: as many as the backward pass gives a row. Few rows would leave an SM's schedulers idle with less, and a
    forecast from three entries reads up to twelve rows at once, too many for one warp's registers.
    """
    main, tail = _tiles(channels)
    num_warps = 1 if main + tail <= 1536 else min(next_power_of_2(cdiv(main + tail, 1024)), 8)
    if many_warps:
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


def resident_programs(device: torch.device, config: TileConfig, registers: int) -> int:
    """How many backward programs run at once on `device`, if each thread takes as many registers as it may."""
    return multiprocessors(device) * max(65_536 // (32 * config.num_warps * registers), 1)


@cache
def backward_rows_per_program(batch: int, tokens: int, resident: int) -> int:
    """Rows of one sample that a backward program sums over, for the least time: waves · (rows + 3).

    3: what a program waits for before its first row, and writes after its last, costs about as much as three rows.
    """

    def time(rows: int) -> int:
        return cdiv(batch * cdiv(tokens, rows), resident) * (rows + 3)

    return min(range(1, tokens + 1), key=time)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(-3), tensor.stride(-2))


def _history_stride(modulation: Tensor | None) -> int:
    return 0 if modulation is None or modulation.ndim == 3 else modulation.stride(0)


def plain_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm: str,
    store_residual: bool,
    forecast_weights: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`launch_forward` in PyTorch."""
    if forecast_weights is not None and step is not None:
        gate, shift, scale = (
            history if history is None else reference.forecast(history, forecast_weights, step)
            for history in (gate, shift, scale)
        )
    residual, y = reference.norm_modulate(x, branch, gate, weight, shift, scale, eps)
    return residual.contiguous() if store_residual else None, None if y is None else y.contiguous()


@launcher("norm_modulate", plain_forward, {"x": 0, "branch": 0, "gate": -3, "shift": -3, "scale": -3}, compiled=True)
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
    forecast_weights: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Runs the forward kernel; returns (x' or None, y or None). norm: "rms", "layer" or "none".

    forecast_weights, step: of modulations (K, B, N or 1, C).
    """
    B, N, C = x.shape
    modulation = gate if scale is None else scale
    assert modulation is not None
    residual = empty(x, x.shape) if store_residual else None
    y = empty(x, x.shape) if norm != "none" else None
    per_token = modulation.shape[-2] == N
    steps, history = (0, 1) if forecast_weights is None else forecast_weights.shape
    config = forward_config(C, B * N <= FEW_ROWS or history > 2)
    rows = forward_rows_per_program(B, N, per_token)
    splits = cdiv(N, rows)
    launch(
        norm_modulate_forward_kernel,
        (B * splits,),
        x.device,
        *(x, branch, gate, weight, shift, scale, forecast_weights, step, residual, y, N, splits, rows),
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
    grad_residual, grad_y = (grad if grad is None else grad.contiguous() for grad in (grad_residual, grad_y))
    made = _backward(grad_residual, grad_y, x, branch, gate, weight, scale, eps, norm)
    grad_x, grad_branch, grad_gate, sum_weight, grad_shift, grad_scale = made
    grad_weight = None if weight is None or sum_weight is None else sum_weight.sum(0).to(weight.dtype)
    return Gradients(grad_x, grad_branch, grad_gate, grad_weight, grad_shift, grad_scale)


def _plain_backward(
    grad_residual: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor | None, ...]:
    grads = reference.norm_modulate_backward(grad_residual, grad_y, x, branch, gate, weight, scale, eps)
    grad_x, grad_branch, grad_gate, grad_weight, grad_shift, grad_scale = grads
    if grad_y is not None and scale is not None and scale.shape == grad_y.shape:
        grad_shift = grad_y.new_empty(0)
    if grad_weight is not None:
        grad_weight = grad_weight[None].to(torch.promote_types(grad_weight.dtype, torch.float32))
    made = grad_x, grad_branch, grad_gate, grad_weight, grad_shift, grad_scale
    return tuple(grad if grad is None else grad.contiguous() for grad in made)


@launcher(
    "norm_modulate backward",
    _plain_backward,
    dict.fromkeys(("grad_y", "grad_residual", "x", "branch", "gate", "scale"), 0),
    compiled=True,
)
def _backward(
    grad_residual: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, branch and gate, fp32 rows whose sum is the weight's, the gradients of shift and scale."""
    like, modulation = (branch, gate) if scale is None else (x, scale)
    assert like is not None
    assert modulation is not None
    B, N, C = like.shape
    config, per_token = backward_config(C), modulation.shape[1] == N
    has_norm, gated, weighted = norm != "none", gate is not None, weight is not None
    most_inputs = gated and has_norm and (per_token or target_arch(like.device) >= 100)
    registers = backward_register_limit(config, C, like.dtype.itemsize, most_inputs)
    rows = backward_rows_per_program(B, N, resident_programs(like.device, config, registers))
    splits = cdiv(N, rows)

    def output(exists: bool, *shape: int) -> Tensor | None:
        return empty(like, shape) if exists else None

    def sums(exists: bool, rows: int) -> Tensor | None:
        return empty(like, (rows, C), torch.float32) if exists else None

    grad_x, grad_branch = output(has_norm, B, N, C), output(gated, B, N, C)
    grad_gate, grad_scale = output(gated, *modulation.shape), output(has_norm, *modulation.shape)
    grad_shift = output(has_norm, *((0,) if per_token else modulation.shape))
    sum_shift, sum_gate = (sums(exists and not per_token, B * splits) for exists in (has_norm, gated))
    sum_scale = sum_weight = sums(weighted if per_token else has_norm, B * splits)
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
        maxnreg=registers,
    )
    if not per_token:
        sum_weight, columns = sums(weighted, B), 128
        launch(
            modulation_gradients_kernel,
            (B, cdiv(C, columns)),
            like.device,
            *(sum_shift, sum_scale, sum_gate, weight, scale, grad_shift, grad_scale, grad_gate, sum_weight),
            *(splits, _strides(scale)[0]),
            C=C,
            NORM=norm,
            GATED=gated,
            SPLITS=16,
            COLS=columns,
            num_warps=4,
        )
    return grad_x, grad_branch, grad_gate, sum_weight, grad_shift, grad_scale


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
    "layer": ((2, 4), 12, (3, 5)),
    "gated rms": ((4, 7), 9, (6, 10)),
    "gated layer": ((3, 6), 12, (5, 9)),
    "gated layer, kept,": ((4, 7), 12, (6, 10)),
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
    waits = _LATENCY_BOUND if op in ("rms", "layer") and not per_token else ""
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
        whole = ("splits",) if channels == MAX_CHANNELS else ()  # so few programs fit that each walks a sample
        return (
            AotCase(f"{op} {label}", forward, ones=ones, budgets=budgets[0]),
            AotCase(f"{op} {label}", backward, ones=whole, budgets=budgets[1]),
        )

    pairs = (
        case(
            "rms",
            lambda: launch_forward(x, None, None, weight, shift, scale, 1e-6, "rms", False),
            lambda: launch_backward(None, x, x, None, None, weight, scale, 1e-6, "rms"),
        ),
        case(
            "layer",
            lambda: launch_forward(x, None, None, None, shift, scale, 1e-6, "layer", False),
            lambda: launch_backward(None, x, x, None, None, None, scale, 1e-6, "layer"),
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
            "gated layer, kept,",
            lambda: launch_forward(x, x, gate, None, shift, scale, 1e-6, "layer", True),
            lambda: launch_backward(x, x, x, x, gate, None, scale, 1e-6, "layer"),
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
            barriers = 0 if history == 2 else 5 if "layer" in op else 2  # the most on triton 3.6 and 3.8
            budget = Budget(3, barriers, bytes=rows[op] * channels * dtype.itemsize)
            budgets = {norm_modulate_forward_kernel.__name__: budget}
        return AotCase(f"{op} {label}", run, ones=ones, budgets=budgets)

    return [
        case("rms", lambda: launch_forward(x, None, None, weight, shift, scale, 1e-6, "rms", False, *forecast)),
        case("gated rms", lambda: launch_forward(x, x, gate, weight, shift, scale, 1e-6, "rms", True, *forecast)),
        case("gated layer", lambda: launch_forward(x, x, gate, None, shift, scale, 1e-6, "layer", False, *forecast)),
    ]
