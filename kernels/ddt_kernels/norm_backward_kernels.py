# mypy: allow-untyped-defs, allow-untyped-decorators
"""The norm family's backward kernel, and the kernel that adds up its partial sums. Formulas and reasons:
`norm_kernels.py`."""

from ddt_kernels.norm_kernels import columns, load_row, per_thread, store_row, stream, wide
from ddt_kernels.runtime import tl, triton


@triton.jit
def _two_means(a_W, a_T, b_W, b_T, C: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The means of two rows, for the barriers of one."""
    sums = tl.join(per_thread(a_W, a_T, LANES, VECTOR), per_thread(b_W, b_T, LANES, VECTOR))
    WARP: tl.constexpr = min(32, LANES)
    a, b = tl.split(tl.sum(tl.sum(tl.reshape(sums, [LANES // WARP, WARP, 2]), axis=1), axis=0))
    return a / C, b / C


@triton.jit
def _store(ptr, offset, value, mask):
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


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
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // splits).to(tl.int64)
    first = ((pid % splits) * rows_per_program).to(tl.int64)
    rows = tl.minimum(rows_per_program, N - first)
    cols = columns(MAIN, TAIL, C)
    mask_T = cols[2]
    weight_W, weight_T = 1.0, 1.0
    if NORM == "rms":
        weight_W, weight_T = load_row(weight_ptr, 0, cols)
    if NORM != "none" and not PER_TOKEN:
        scale_W, scale_T = load_row(scale_ptr, b * scale_sb, cols)
    if GATED and not PER_TOKEN:
        gate_W, gate_T = load_row(gate_ptr, b * gate_sb, cols)
    zeros_W, zeros_T = tl.zeros([MAIN], tl.float32), tl.zeros([TAIL], tl.float32)
    shift_sum_W, scale_sum_W, gate_sum_W = zeros_W, zeros_W, zeros_W
    shift_sum_T, scale_sum_T, gate_sum_T = zeros_T, zeros_T, zeros_T

    for row in tl.range(0, rows, num_stages=STAGES):
        n = first + row
        out_row = (b * N + n) * C
        if NORM != "none":
            x_W, x_T = load_row(x_ptr, b * x_sb + n * x_sn, cols)
            dy_W, dy_T = load_row(grad_y_ptr, out_row, cols)
            if PER_TOKEN:
                scale_W, scale_T = load_row(scale_ptr, b * scale_sb + n * scale_sn, cols)
        if GATED:
            branch_W, branch_T = load_row(branch_ptr, b * branch_sb + n * branch_sn, cols)
            if PER_TOKEN:
                gate_W, gate_T = load_row(gate_ptr, b * gate_sb + n * gate_sn, cols)
        grad_W, grad_T = zeros_W, zeros_T
        if ADD_RESIDUAL:
            grad_W, grad_T = wide(load_row(grad_residual_ptr, out_row, cols))

        if NORM != "none":
            if GATED:
                d_W = stream(x_W, branch_W, gate_W.to(tl.float32))
                d_T = stream(x_T, branch_T, gate_T.to(tl.float32))
            else:
                d_W, d_T = wide((x_W, x_T))
            dy_W, dy_T = wide((dy_W, dy_T))
            factor_W, factor_T = 1.0 + scale_W.to(tl.float32), 1.0 + scale_T.to(tl.float32)
            g_W, g_T = dy_W * (weight_W * factor_W), dy_T * (weight_T * factor_T)
            mean_g = 0.0
            if NORM == "layer":
                mean, mean_g = _two_means(d_W, d_T, g_W, g_T, C, LANES, VECTOR)
                d_W, d_T = d_W - mean, tl.where(mask_T, d_T - mean, 0.0)
            variance, mean_gd = _two_means(d_W * d_W, d_T * d_T, g_W * d_W, g_T * d_T, C, LANES, VECTOR)
            rstd = tl.math.rsqrt(variance + eps)
            slope = mean_gd * rstd * rstd
            grad_W += rstd * (g_W - mean_g - slope * d_W)
            grad_T += rstd * (g_T - mean_g - slope * d_T)
            store_row(grad_x_ptr, out_row, cols, grad_W, grad_T)
            dyn_W, dyn_T = dy_W * (d_W * rstd), dy_T * (d_T * rstd)
            if PER_TOKEN:
                store_row(grad_scale_ptr, out_row, cols, dyn_W * weight_W, dyn_T * weight_T)
                dyn_W, dyn_T = dyn_W * factor_W, dyn_T * factor_T
            shift_sum_W, shift_sum_T = shift_sum_W + dy_W, shift_sum_T + dy_T
            scale_sum_W, scale_sum_T = scale_sum_W + dyn_W, scale_sum_T + dyn_T
        if GATED:
            store_row(grad_branch_ptr, out_row, cols, grad_W * gate_W.to(tl.float32), grad_T * gate_T.to(tl.float32))
            dgate_W, dgate_T = grad_W * branch_W.to(tl.float32), grad_T * branch_T.to(tl.float32)
            if PER_TOKEN:
                store_row(grad_gate_ptr, out_row, cols, dgate_W, dgate_T)
            gate_sum_W, gate_sum_T = gate_sum_W + dgate_W, gate_sum_T + dgate_T

    partial = pid.to(tl.int64) * C
    if NORM == "rms" or (NORM == "layer" and not PER_TOKEN):
        store_row(sum_scale_ptr, partial, cols, scale_sum_W, scale_sum_T)
    if NORM != "none" and not PER_TOKEN:
        store_row(sum_shift_ptr, partial, cols, shift_sum_W, shift_sum_T)
    if GATED and not PER_TOKEN:
        store_row(sum_gate_ptr, partial, cols, gate_sum_W, gate_sum_T)


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
        _store(grad_shift_ptr, b * C + col, shift, mask)
        dyn = _column_sum(sum_scale_ptr, start, splits, col, mask, C, SPLITS, COLS)
        if NORM == "rms":
            scale = tl.load(scale_ptr + b * scale_sb + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(sum_weight_ptr + b * C + col, dyn * (1.0 + scale), mask=mask)
            dyn *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        _store(grad_scale_ptr, b * C + col, dyn, mask)
    if GATED:
        gate = _column_sum(sum_gate_ptr, start, splits, col, mask, C, SPLITS, COLS)
        _store(grad_gate_ptr, b * C + col, gate, mask)
