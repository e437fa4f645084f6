# mypy: allow-untyped-defs, allow-untyped-decorators
"""The norm family's backward kernel, and the kernel that adds up its partial sums. Formulas and reasons:
`norm_kernels.py`."""

from ddt_kernels.norm_kernels import gain, load_stream, load_tile, row_sum, statistics, store_tile, tail_columns
from ddt_kernels.runtime import tl, triton


@triton.jit
def _emit_stream_gradients(
    grad_X, branch_X, gate_X, grad_residual_ptr, grad_x_ptr, grad_branch_ptr, grad_gate_ptr, offset, mask,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD_RESIDUAL: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Adds dx'_direct, stores dx, dbranch and (per token) dgate; returns the tile of dgate."""
    if ADD_RESIDUAL:
        grad_X += load_tile(grad_residual_ptr, offset, mask)
    if NORM != "none":
        store_tile(grad_x_ptr, offset, grad_X, mask)
    grad_gate_X = grad_X * branch_X
    if GATED:
        store_tile(grad_branch_ptr, offset, grad_X * gate_X, mask)
        if PER_TOKEN:
            store_tile(grad_gate_ptr, offset, grad_gate_X, mask)
    return grad_gate_X


@triton.jit
def _store_sums(ptr, partial, sum_W, sum_T, col_W, col_T, mask_T, TAIL: tl.constexpr):
    tl.store(ptr + partial + col_W, sum_W)
    if TAIL > 0:
        tl.store(ptr + partial + col_T, sum_T, mask=mask_T)


@triton.jit
def norm_modulate_backward_kernel(
    grad_residual_ptr,  # (B, N, C) contiguous, as are grad_y and all per-token gradients
    grad_y_ptr,
    x_ptr,
    branch_ptr,
    gate_ptr,
    weight_ptr,
    scale_ptr,
    grad_x_ptr,
    grad_branch_ptr,
    grad_gate_ptr,  # per token only, as is grad_scale
    grad_scale_ptr,
    sum_shift_ptr,  # fp32 (B · splits, C) partial sums; per sample: of dy,
    sum_scale_ptr,  # of dy · n (per token: of dy · n · (1 + scale), the weight's),
    sum_gate_ptr,  # and of dgate
    N,
    splits,  # programs per sample
    rows_per_program,
    x_sb,
    x_sn,
    branch_sb,
    branch_sn,
    gate_sb,
    gate_sn,
    scale_sb,
    scale_sn,
    eps,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // splits).to(tl.int64)
    first = ((pid % splits) * rows_per_program).to(tl.int64)
    rows = tl.minimum(rows_per_program, N - first)
    col_W, mask_W = tl.arange(0, MAIN), tl.full([MAIN], 1, tl.int1)
    col_T, mask_T = col_W, mask_W
    if TAIL > 0:
        col_T, mask_T = tail_columns(MAIN, TAIL, C)

    shift_sum_W = tl.zeros([MAIN], tl.float32)
    scale_sum_W = tl.zeros([MAIN], tl.float32)
    gate_sum_W = tl.zeros([MAIN], tl.float32)
    shift_sum_T = tl.zeros([TAIL if TAIL > 0 else 1], tl.float32)
    scale_sum_T = tl.zeros([TAIL if TAIL > 0 else 1], tl.float32)
    gate_sum_T = tl.zeros([TAIL if TAIL > 0 else 1], tl.float32)

    for row in range(0, rows):
        n = first + row
        mod_n = n if PER_TOKEN else 0
        x_row, branch_row = b * x_sb + n * x_sn, b * branch_sb + n * branch_sn
        gate_row, scale_row, out_row = b * gate_sb + mod_n * gate_sn, b * scale_sb + mod_n * scale_sn, (b * N + n) * C

        if NORM == "none":
            branch_W = load_tile(branch_ptr, branch_row + col_W, mask_W)
            gate_W = load_tile(gate_ptr, gate_row + col_W, mask_W)
            grad_W = tl.zeros([MAIN], tl.float32)
            if TAIL > 0:
                branch_T = load_tile(branch_ptr, branch_row + col_T, mask_T)
                gate_T = load_tile(gate_ptr, gate_row + col_T, mask_T)
                grad_T = tl.zeros([TAIL], tl.float32)
        else:
            x_W, branch_W, gate_W = load_stream(
                x_ptr, branch_ptr, gate_ptr, x_row, branch_row, gate_row, col_W, mask_W, GATED
            )
            dy_W = load_tile(grad_y_ptr, out_row + col_W, mask_W)
            weight_W, factor_W = gain(weight_ptr, scale_ptr, scale_row, col_W, mask_W, C, NORM)
            x_T = x_W
            if TAIL > 0:
                x_T, branch_T, gate_T = load_stream(
                    x_ptr, branch_ptr, gate_ptr, x_row, branch_row, gate_row, col_T, mask_T, GATED
                )
                dy_T = load_tile(grad_y_ptr, out_row + col_T, mask_T)
                weight_T, factor_T = gain(weight_ptr, scale_ptr, scale_row, col_T, mask_T, C, NORM)
            mean, rstd = statistics(x_W, x_T, mask_T, eps, C, TAIL, NORM)
            n_W = (x_W - mean) * rstd
            g_W = dy_W * (weight_W * factor_W)
            n_T, g_T = n_W, g_W
            if TAIL > 0:
                n_T = (x_T - mean) * rstd
                g_T = dy_T * (weight_T * factor_T)
            mean_gn = row_sum(g_W * n_W, g_T * n_T, TAIL) / C
            mean_g = 0.0
            if NORM == "layer":
                mean_g = row_sum(g_W, g_T, TAIL) / C
            grad_W = rstd * (g_W - n_W * mean_gn - mean_g)
            if TAIL > 0:
                grad_T = rstd * (g_T - n_T * mean_gn - mean_g)

            dyn_W = dy_W * n_W
            if PER_TOKEN:
                store_tile(grad_scale_ptr, out_row + col_W, dyn_W * weight_W, mask_W)
                dyn_W *= factor_W
            shift_sum_W += dy_W
            scale_sum_W += dyn_W
            if TAIL > 0:
                dyn_T = dy_T * n_T
                if PER_TOKEN:
                    store_tile(grad_scale_ptr, out_row + col_T, dyn_T * weight_T, mask_T)
                    dyn_T *= factor_T
                shift_sum_T += dy_T
                scale_sum_T += dyn_T

        grad_gate_W = _emit_stream_gradients(
            grad_W, branch_W, gate_W, grad_residual_ptr, grad_x_ptr, grad_branch_ptr, grad_gate_ptr,
            out_row + col_W, mask_W, NORM, GATED, ADD_RESIDUAL, PER_TOKEN,
        )  # fmt: skip
        gate_sum_W += grad_gate_W
        if TAIL > 0:
            gate_sum_T += _emit_stream_gradients(
                grad_T, branch_T, gate_T, grad_residual_ptr, grad_x_ptr, grad_branch_ptr, grad_gate_ptr,
                out_row + col_T, mask_T, NORM, GATED, ADD_RESIDUAL, PER_TOKEN,
            )  # fmt: skip

    partial = pid.to(tl.int64) * C
    if NORM == "rms" or (NORM == "layer" and not PER_TOKEN):
        _store_sums(sum_scale_ptr, partial, scale_sum_W, scale_sum_T, col_W, col_T, mask_T, TAIL)
    if NORM != "none" and not PER_TOKEN:
        _store_sums(sum_shift_ptr, partial, shift_sum_W, shift_sum_T, col_W, col_T, mask_T, TAIL)
    if GATED and not PER_TOKEN:
        _store_sums(sum_gate_ptr, partial, gate_sum_W, gate_sum_T, col_W, col_T, mask_T, TAIL)


@triton.jit
def _column_sum(ptr, start, splits, col_X, mask_X, C: tl.constexpr, SPLITS: tl.constexpr, COLS: tl.constexpr):
    """Sums `splits` rows of an fp32 (rows, C) matrix, from element `start` on."""
    total_SX = tl.zeros([SPLITS, COLS], tl.float32)
    for first in range(0, splits, SPLITS):
        s_S1 = (first + tl.arange(0, SPLITS))[:, None]
        total_SX += tl.load(ptr + start + s_S1 * C + col_X, mask=(s_S1 < splits) & mask_X, other=0.0)
    return tl.sum(total_SX, axis=0, keep_dims=True)


@triton.jit
def modulation_gradients_kernel(
    sum_shift_ptr,  # fp32 (B · splits, C) partial sums of the backward kernel, per sample
    sum_scale_ptr,
    sum_gate_ptr,
    weight_ptr,
    scale_ptr,
    grad_shift_ptr,  # out, (B, 1, C) contiguous
    grad_scale_ptr,
    grad_gate_ptr,
    sum_weight_ptr,  # out, fp32 (B, C): each sample's share of the weight's gradient
    splits,
    scale_sb,
    C: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    COLS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    mask = col < C
    start = b * splits * C
    if NORM != "none":
        shift = _column_sum(sum_shift_ptr, start, splits, col, mask, C, SPLITS, COLS)
        store_tile(grad_shift_ptr, b * C + col, shift, mask)
        dyn = _column_sum(sum_scale_ptr, start, splits, col, mask, C, SPLITS, COLS)
        weight, factor = gain(weight_ptr, scale_ptr, b * scale_sb, col, mask, C, NORM)
        store_tile(grad_scale_ptr, b * C + col, dyn * weight, mask)
        if NORM == "rms":
            store_tile(sum_weight_ptr, b * C + col, dyn * factor, mask)
    if GATED:
        gate = _column_sum(sum_gate_ptr, start, splits, col, mask, C, SPLITS, COLS)
        store_tile(grad_gate_ptr, b * C + col, gate, mask)
