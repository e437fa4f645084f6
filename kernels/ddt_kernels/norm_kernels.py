# mypy: allow-untyped-defs, allow-untyped-decorators
"""The Triton kernels of the norm family; `norm_modulate.py` launches them.

One forward and one backward kernel serve four ops, told apart by constexpr flags:

    x'  = x + gate · branch                            GATED; rounded to the storage dtype, as its next reader sees it
    n   = (x' - mean) · rstd                           NORM "rms" (mean = 0), "layer", or "none": stop at x'
    y   = n · weight · (1 + scale) + shift             one rounding, at the store

Backward, with u = weight · (1 + scale), g = dy · u and <·> the mean over C:

    dx' = rstd · (g - n·<g·n> - <g>) + dx'_direct      <g> for "layer" only, dx'_direct where x' itself is an output
    dx  = dx',  dbranch = gate · dx',  dgate = branch · dx'
    dshift = dy,  dscale = dy·n·weight,  dweight = Σ dy·n·(1 + scale)

Nothing but the inputs is saved for it: x', mean and rstd are recomputed from rows that have to be read anyway.

Why it looks like this. The passes are bound by memory, so all that counts is that every byte crosses once, in wide
accesses, with enough of them in flight (about 23 KB per SM cover 700 ns at 4.3 TB/s on 132 SMs) and few instructions
and barriers between.
 - C is not a power of two and Triton's tiles are. Padding 1152 to 2048 would spend 44% of all lanes on nothing. So a
   row is two tiles: MAIN, the largest power of two ≤ C, never masked in columns, and TAIL, the rest rounded up (absent
   if C is a power of two): 1152 = 1024 + 128, exactly. Both stay in registers: one read.
 - Rows are taken one at a time, so that their statistics are scalars, which have no layout. With several rows at once
   the two tiles' row sums are vectors of two layouts, and the compiler, to add them, sends a whole tile through shared
   memory (triton 3.6 and 3.8, in different places). Many programs per SM keep the loads in flight instead: at C = 1152
   in bf16 on sm_90 the backward takes 47 to 80 registers a thread, 6 to 10 programs an SM, 46 KB and more; the forward
   87 to 128, 16 or more programs, 37 KB and more.
 - A forward program is a single warp (C below 4096): its statistics are shuffles, no barrier, no shared memory. With
   per-sample modulations it walks a few rows, which then find the modulations in L1; without, every row would fetch
   three vectors from L2.
 - A backward program is several warps, so that a thread has few columns: sums over rows, which every parameter gradient
   is, are then a few registers and no exchange at all. What crosses warps is two or three sums per row.
 - A program never crosses a sample. PER_TOKEN makes the modulations' token offset the row or zero; all else is equal.
 - Parameter gradients are deterministic: each backward program walks a fixed run of rows and leaves one fp32 partial
   sum per column; per sample, the two sums Σdy and Σdy·n give dshift, dscale and dweight alike.

Tile suffixes: W = MAIN, T = TAIL, X either. `x_row` is a row's offset.
"""

from ddt_kernels.runtime import tl, triton


@triton.jit
def _load(ptr, offset, mask):
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, offset, value, mask):
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tail_columns(MAIN: tl.constexpr, TAIL: tl.constexpr, C: tl.constexpr):
    col = MAIN + tl.arange(0, TAIL)
    return col, col < C


@triton.jit
def _load_stream(x_ptr, branch_ptr, gate_ptr, x_row, branch_row, gate_row, col, mask, GATED: tl.constexpr):
    """(x', branch, gate) as fp32; *_row are row offsets, col and mask say which columns. Not gated: x thrice."""
    x = _load(x_ptr, x_row + col, mask)
    branch, gate = x, x
    if GATED:
        branch = _load(branch_ptr, branch_row + col, mask)
        gate = _load(gate_ptr, gate_row + col, mask)
        x = (x + gate * branch).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x, branch, gate


@triton.jit
def _row_sum(a_W, a_T, TAIL: tl.constexpr):
    total = tl.sum(a_W, axis=0)
    if TAIL > 0:
        total += tl.sum(a_T, axis=0)
    return total


@triton.jit
def _statistics(x_W, x_T, mask_T, eps, C: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr):
    """(mean, rstd) of a row. The variance is the mean square about the mean: no cancellation."""
    mean = 0.0
    if NORM == "layer":
        mean = _row_sum(x_W, x_T, TAIL) / C
    d_W = x_W - mean
    d_T = tl.where(mask_T, x_T - mean, 0.0)
    return mean, tl.math.rsqrt(_row_sum(d_W * d_W, d_T * d_T, TAIL) / C + eps)


@triton.jit
def _gain(weight_ptr, scale_ptr, scale_row, col, mask, C: tl.constexpr, NORM: tl.constexpr):
    """(weight, 1 + scale) as fp32; weight is 1 for "layer"."""
    factor = 1.0 + _load(scale_ptr, scale_row + col, mask)
    weight = 1.0
    if NORM == "rms":
        weight = _load(weight_ptr, col, col < C)
    return weight, factor


@triton.jit
def norm_modulate_forward_kernel(
    x_ptr,  # (B, N, C), as are branch, residual and y
    branch_ptr,
    gate_ptr,  # (B, N or 1, C), as are shift and scale
    weight_ptr,  # (C,)
    shift_ptr,
    scale_ptr,
    residual_ptr,  # out, x', contiguous
    y_ptr,  # out, contiguous
    N,
    splits,  # programs per sample
    rows_per_program,
    x_sb,
    x_sn,
    branch_sb,
    branch_sn,
    gate_sb,
    gate_sn,
    shift_sb,
    shift_sn,
    scale_sb,
    scale_sn,
    eps,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    STORE_RESIDUAL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // splits).to(tl.int64)
    first = ((pid % splits) * rows_per_program).to(tl.int64)
    rows = tl.minimum(rows_per_program, N - first)
    col_W, mask_W = tl.arange(0, MAIN), tl.full([MAIN], 1, tl.int1)
    col_T, mask_T = col_W, mask_W
    if TAIL > 0:
        col_T, mask_T = _tail_columns(MAIN, TAIL, C)

    for row in range(0, rows):
        n = first + row
        mod_n = n if PER_TOKEN else 0
        x_row, branch_row, gate_row = b * x_sb + n * x_sn, b * branch_sb + n * branch_sn, b * gate_sb + mod_n * gate_sn
        shift_row, scale_row, out_row = (
            b * shift_sb + mod_n * shift_sn,
            b * scale_sb + mod_n * scale_sn,
            (b * N + n) * C,
        )

        x_W, _, _ = _load_stream(x_ptr, branch_ptr, gate_ptr, x_row, branch_row, gate_row, col_W, mask_W, GATED)
        x_T = x_W
        if TAIL > 0:
            x_T, _, _ = _load_stream(x_ptr, branch_ptr, gate_ptr, x_row, branch_row, gate_row, col_T, mask_T, GATED)
        if STORE_RESIDUAL:
            _store(residual_ptr, out_row + col_W, x_W, mask_W)
            if TAIL > 0:
                _store(residual_ptr, out_row + col_T, x_T, mask_T)
        if NORM != "none":
            mean, rstd = _statistics(x_W, x_T, mask_T, eps, C, TAIL, NORM)
            weight_W, factor_W = _gain(weight_ptr, scale_ptr, scale_row, col_W, mask_W, C, NORM)
            shift_W = _load(shift_ptr, shift_row + col_W, mask_W)
            y_W = (x_W - mean) * rstd * (weight_W * factor_W) + shift_W
            _store(y_ptr, out_row + col_W, y_W, mask_W)
            if TAIL > 0:
                weight_T, factor_T = _gain(weight_ptr, scale_ptr, scale_row, col_T, mask_T, C, NORM)
                shift_T = _load(shift_ptr, shift_row + col_T, mask_T)
                y_T = (x_T - mean) * rstd * (weight_T * factor_T) + shift_T
                _store(y_ptr, out_row + col_T, y_T, mask_T)


@triton.jit
def _emit_stream_gradients(
    grad_X, branch_X, gate_X, grad_residual_ptr, grad_x_ptr, grad_branch_ptr, grad_gate_ptr, offset, mask,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD_RESIDUAL: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Adds dx'_direct, stores dx, dbranch and (per token) dgate; returns the tile of dgate."""
    if ADD_RESIDUAL:
        grad_X += _load(grad_residual_ptr, offset, mask)
    if NORM != "none":
        _store(grad_x_ptr, offset, grad_X, mask)
    grad_gate_X = grad_X * branch_X
    if GATED:
        _store(grad_branch_ptr, offset, grad_X * gate_X, mask)
        if PER_TOKEN:
            _store(grad_gate_ptr, offset, grad_gate_X, mask)
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
        col_T, mask_T = _tail_columns(MAIN, TAIL, C)

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
            branch_W = _load(branch_ptr, branch_row + col_W, mask_W)
            gate_W = _load(gate_ptr, gate_row + col_W, mask_W)
            grad_W = tl.zeros([MAIN], tl.float32)
            if TAIL > 0:
                branch_T = _load(branch_ptr, branch_row + col_T, mask_T)
                gate_T = _load(gate_ptr, gate_row + col_T, mask_T)
                grad_T = tl.zeros([TAIL], tl.float32)
        else:
            x_W, branch_W, gate_W = _load_stream(
                x_ptr, branch_ptr, gate_ptr, x_row, branch_row, gate_row, col_W, mask_W, GATED
            )
            dy_W = _load(grad_y_ptr, out_row + col_W, mask_W)
            weight_W, factor_W = _gain(weight_ptr, scale_ptr, scale_row, col_W, mask_W, C, NORM)
            x_T = x_W
            if TAIL > 0:
                x_T, branch_T, gate_T = _load_stream(
                    x_ptr, branch_ptr, gate_ptr, x_row, branch_row, gate_row, col_T, mask_T, GATED
                )
                dy_T = _load(grad_y_ptr, out_row + col_T, mask_T)
                weight_T, factor_T = _gain(weight_ptr, scale_ptr, scale_row, col_T, mask_T, C, NORM)
            mean, rstd = _statistics(x_W, x_T, mask_T, eps, C, TAIL, NORM)
            n_W = (x_W - mean) * rstd
            g_W = dy_W * (weight_W * factor_W)
            n_T, g_T = n_W, g_W
            if TAIL > 0:
                n_T = (x_T - mean) * rstd
                g_T = dy_T * (weight_T * factor_T)
            mean_gn = _row_sum(g_W * n_W, g_T * n_T, TAIL) / C
            mean_g = 0.0
            if NORM == "layer":
                mean_g = _row_sum(g_W, g_T, TAIL) / C
            grad_W = rstd * (g_W - n_W * mean_gn - mean_g)
            if TAIL > 0:
                grad_T = rstd * (g_T - n_T * mean_gn - mean_g)

            dyn_W = dy_W * n_W
            if PER_TOKEN:
                _store(grad_scale_ptr, out_row + col_W, dyn_W * weight_W, mask_W)
                dyn_W *= factor_W
            shift_sum_W += dy_W
            scale_sum_W += dyn_W
            if TAIL > 0:
                dyn_T = dy_T * n_T
                if PER_TOKEN:
                    _store(grad_scale_ptr, out_row + col_T, dyn_T * weight_T, mask_T)
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
        _store(grad_shift_ptr, b * C + col, shift, mask)
        dyn = _column_sum(sum_scale_ptr, start, splits, col, mask, C, SPLITS, COLS)
        weight, factor = _gain(weight_ptr, scale_ptr, b * scale_sb, col, mask, C, NORM)
        _store(grad_scale_ptr, b * C + col, dyn * weight, mask)
        if NORM == "rms":
            _store(sum_weight_ptr, b * C + col, dyn * factor, mask)
    if GATED:
        gate = _column_sum(sum_gate_ptr, start, splits, col, mask, C, SPLITS, COLS)
        _store(grad_gate_ptr, b * C + col, gate, mask)
