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
 - Triton lays warps along columns first, then rows. MAIN is therefore cut into [MAIN / WIDTH, ROWS, WIDTH], and WIDTH
   decides: in the forward one warp's worth of 16-byte accesses, so a warp owns a row, whose statistics are ten
   shuffles, no barrier, no shared memory. In the backward all of MAIN: the warps stand side by side on ROWS rows, a
   thread owns the same few columns in each, and sums over rows, which every parameter gradient is, cost registers for
   one row and no exchange at all until the program's end. What crosses warps then is two sums per row.
 - Both tiles of a row must agree on which warp has which rows, or the compiler sends a whole tile through shared
   memory to make them: TAIL_VECTOR limits the tail's columns per thread until they do.
 - A program never crosses a sample. PER_TOKEN makes the modulations' token offset the row or zero; all else is equal.
 - Parameter gradients are deterministic: each backward program walks a fixed run of rows and leaves one fp32 partial
   sum per column; per sample, the two sums Σdy and Σdy·n give dshift, dscale and dweight alike.

Tile suffixes: K = MAIN / WIDTH, R = ROWS, W = WIDTH, T = TAIL; _R alone is per row, [1, ROWS, 1]; _K, _T are columns.
"""

from ddt_kernels.runtime import tl, triton


@triton.jit
def _load(ptr, offset, mask):
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, offset, value, mask):
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _main_columns(MAIN: tl.constexpr, WIDTH: tl.constexpr):
    return tl.arange(0, MAIN // WIDTH)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _tail_columns(MAIN: tl.constexpr, TAIL: tl.constexpr, VECTOR: tl.constexpr, C: tl.constexpr):
    col = MAIN + tl.max_contiguous(tl.arange(0, TAIL)[None, None, :], [1, 1, VECTOR])
    return col, col < C


@triton.jit
def _load_stream(x_ptr, branch_ptr, gate_ptr, x_R, branch_R, gate_R, col, mask, mod_mask, GATED: tl.constexpr):
    """(x', branch, gate) as fp32; *_R are row offsets, col and the masks say which columns. Not gated: x thrice."""
    x = _load(x_ptr, x_R + col, mask)
    branch, gate = x, x
    if GATED:
        branch = _load(branch_ptr, branch_R + col, mask)
        gate = _load(gate_ptr, gate_R + col, mod_mask)
        x = (x + gate * branch).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x, branch, gate


@triton.jit
def _row_sum(a_KRW, a_1RT, TAIL: tl.constexpr):
    total_R = tl.sum(tl.sum(a_KRW, axis=0), axis=1)
    if TAIL > 0:
        total_R += tl.sum(tl.sum(a_1RT, axis=0), axis=1)
    return total_R[None, :, None]


@triton.jit
def _statistics(x_KRW, x_1RT, mask_T, eps, C: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr):
    """(mean, rstd), each [ROWS, 1]. The variance is the mean square about the mean: no cancellation."""
    mean_R = 0.0
    if NORM == "layer":
        mean_R = _row_sum(x_KRW, x_1RT, TAIL) / C
    d_KRW = x_KRW - mean_R
    d_1RT = tl.where(mask_T, x_1RT - mean_R, 0.0)
    return mean_R, tl.math.rsqrt(_row_sum(d_KRW * d_KRW, d_1RT * d_1RT, TAIL) / C + eps)


@triton.jit
def _gain(weight_ptr, scale_ptr, weight_R, scale_R, col, mask, NORM: tl.constexpr):
    """(weight, 1 + scale) as fp32; weight is 1 for "layer"."""
    factor = 1.0 + _load(scale_ptr, scale_R + col, mask)
    weight = 1.0
    if NORM == "rms":
        weight = _load(weight_ptr, weight_R + col, mask)
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
    row_blocks,  # ceil(N / ROWS): programs per sample
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
    WIDTH: tl.constexpr,
    TAIL_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    STORE_RESIDUAL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // row_blocks).to(tl.int64)
    n_R = ((pid % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[None, :, None]
    row_mask = n_R < N
    zero_R = tl.zeros([1, ROWS, 1], tl.int64)  # each warp loads per-sample columns for its own row: no exchange
    mod_n, mod_mask = zero_R, row_mask
    if PER_TOKEN:
        mod_n = n_R
    col_K = _main_columns(MAIN, WIDTH)
    x_R, branch_R, gate_R = b * x_sb + n_R * x_sn, b * branch_sb + n_R * branch_sn, b * gate_sb + mod_n * gate_sn
    shift_R, scale_R, out_R = b * shift_sb + mod_n * shift_sn, b * scale_sb + mod_n * scale_sn, (b * N + n_R) * C

    x_KRW, _, _ = _load_stream(x_ptr, branch_ptr, gate_ptr, x_R, branch_R, gate_R, col_K, row_mask, mod_mask, GATED)
    x_1RT, col_T, mask_T = x_KRW, col_K, col_K < C
    if TAIL > 0:
        col_T, mask_T = _tail_columns(MAIN, TAIL, TAIL_VECTOR, C)
        x_1RT, _, _ = _load_stream(
            x_ptr, branch_ptr, gate_ptr, x_R, branch_R, gate_R, col_T, row_mask & mask_T, mod_mask & mask_T, GATED
        )
    if STORE_RESIDUAL:
        _store(residual_ptr, out_R + col_K, x_KRW, row_mask)
        if TAIL > 0:
            _store(residual_ptr, out_R + col_T, x_1RT, row_mask & mask_T)
    if NORM != "none":
        mean_R, rstd_R = _statistics(x_KRW, x_1RT, mask_T, eps, C, TAIL, NORM)
        weight_K, factor_K = _gain(weight_ptr, scale_ptr, zero_R, scale_R, col_K, mod_mask, NORM)
        shift_K = _load(shift_ptr, shift_R + col_K, mod_mask)
        y_KRW = (x_KRW - mean_R) * rstd_R * (weight_K * factor_K) + shift_K
        _store(y_ptr, out_R + col_K, y_KRW, row_mask)
        if TAIL > 0:
            weight_T, factor_T = _gain(weight_ptr, scale_ptr, zero_R, scale_R, col_T, mod_mask & mask_T, NORM)
            shift_T = _load(shift_ptr, shift_R + col_T, mod_mask & mask_T)
            y_1RT = (x_1RT - mean_R) * rstd_R * (weight_T * factor_T) + shift_T
            _store(y_ptr, out_R + col_T, y_1RT, row_mask & mask_T)


@triton.jit
def _emit_stream_gradients(
    grad_RX, branch_RX, gate_RX, grad_residual_ptr, grad_x_ptr, grad_branch_ptr, grad_gate_ptr, offset, mask,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD_RESIDUAL: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Adds dx'_direct, stores dx, dbranch and (per token) dgate; returns the tile of dgate."""
    if ADD_RESIDUAL:
        grad_RX += _load(grad_residual_ptr, offset, mask)
    if NORM != "none":
        _store(grad_x_ptr, offset, grad_RX, mask)
    grad_gate_RX = grad_RX * branch_RX
    if GATED:
        _store(grad_branch_ptr, offset, grad_RX * gate_RX, mask)
        if PER_TOKEN:
            _store(grad_gate_ptr, offset, grad_gate_RX, mask)
    return grad_gate_RX


@triton.jit
def _store_sums(ptr, partial, sum_K, sum_T, col_K, col_T, mask_T, TAIL: tl.constexpr):
    tl.store(ptr + partial + col_K, sum_K)
    if TAIL > 0:
        tl.store(ptr + partial + col_T, tl.sum(sum_T, axis=1, keep_dims=True), mask=mask_T)


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
    WIDTH: tl.constexpr,
    TAIL_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // splits).to(tl.int64)
    first = (pid % splits) * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    col_K = _main_columns(MAIN, WIDTH)
    col_T, mask_T = col_K, col_K < C
    if TAIL > 0:
        col_T, mask_T = _tail_columns(MAIN, TAIL, TAIL_VECTOR, C)

    # The tail's rows may lie in different warps where C is small: its sums keep the row axis until the end.
    shift_sum_K = tl.zeros([MAIN // WIDTH, 1, WIDTH], tl.float32)
    scale_sum_K = tl.zeros([MAIN // WIDTH, 1, WIDTH], tl.float32)
    gate_sum_K = tl.zeros([MAIN // WIDTH, 1, WIDTH], tl.float32)
    shift_sum_T = tl.zeros([1, ROWS, TAIL if TAIL > 0 else 1], tl.float32)
    scale_sum_T = tl.zeros([1, ROWS, TAIL if TAIL > 0 else 1], tl.float32)
    gate_sum_T = tl.zeros([1, ROWS, TAIL if TAIL > 0 else 1], tl.float32)

    for start in range(first, last, ROWS):
        n_R = (start + tl.arange(0, ROWS)).to(tl.int64)[None, :, None]
        row_mask = n_R < last
        mask_1RT = row_mask & mask_T
        mod_n, mod_mask = tl.zeros([1, 1, 1], tl.int64), tl.full([1, 1, 1], 1, tl.int1)
        if PER_TOKEN:
            mod_n, mod_mask = n_R, row_mask
        x_R, branch_R = b * x_sb + n_R * x_sn, b * branch_sb + n_R * branch_sn
        gate_R, scale_R, out_R = b * gate_sb + mod_n * gate_sn, b * scale_sb + mod_n * scale_sn, (b * N + n_R) * C

        if NORM == "none":
            branch_KRW = _load(branch_ptr, branch_R + col_K, row_mask)
            gate_KRW = _load(gate_ptr, gate_R + col_K, mod_mask)
            grad_KRW = tl.zeros([MAIN // WIDTH, ROWS, WIDTH], tl.float32)
            if TAIL > 0:
                branch_1RT = _load(branch_ptr, branch_R + col_T, mask_1RT)
                gate_1RT = _load(gate_ptr, gate_R + col_T, mod_mask & mask_T)
                grad_1RT = tl.zeros([1, ROWS, TAIL], tl.float32)
        else:
            x_KRW, branch_KRW, gate_KRW = _load_stream(
                x_ptr, branch_ptr, gate_ptr, x_R, branch_R, gate_R, col_K, row_mask, mod_mask, GATED
            )
            dy_KRW = _load(grad_y_ptr, out_R + col_K, row_mask)
            weight_K, factor_K = _gain(weight_ptr, scale_ptr, 0, scale_R, col_K, mod_mask, NORM)
            x_1RT = x_KRW
            if TAIL > 0:
                x_1RT, branch_1RT, gate_1RT = _load_stream(
                    x_ptr, branch_ptr, gate_ptr, x_R, branch_R, gate_R, col_T, mask_1RT, mod_mask & mask_T, GATED
                )
                dy_1RT = _load(grad_y_ptr, out_R + col_T, mask_1RT)
                weight_T, factor_T = _gain(weight_ptr, scale_ptr, 0, scale_R, col_T, mod_mask & mask_T, NORM)
            mean_R, rstd_R = _statistics(x_KRW, x_1RT, mask_T, eps, C, TAIL, NORM)
            n_KRW = (x_KRW - mean_R) * rstd_R
            g_KRW = dy_KRW * (weight_K * factor_K)
            n_1RT, g_1RT = n_KRW, g_KRW
            if TAIL > 0:
                n_1RT = (x_1RT - mean_R) * rstd_R
                g_1RT = dy_1RT * (weight_T * factor_T)
            mean_gn_R = _row_sum(g_KRW * n_KRW, g_1RT * n_1RT, TAIL) / C
            mean_g_R = 0.0
            if NORM == "layer":
                mean_g_R = _row_sum(g_KRW, g_1RT, TAIL) / C
            grad_KRW = rstd_R * (g_KRW - n_KRW * mean_gn_R - mean_g_R)
            if TAIL > 0:
                grad_1RT = rstd_R * (g_1RT - n_1RT * mean_gn_R - mean_g_R)

            dyn_KRW = dy_KRW * n_KRW
            if PER_TOKEN:
                _store(grad_scale_ptr, out_R + col_K, dyn_KRW * weight_K, row_mask)
                dyn_KRW *= factor_K
            shift_sum_K += tl.sum(dy_KRW, axis=1, keep_dims=True)
            scale_sum_K += tl.sum(dyn_KRW, axis=1, keep_dims=True)
            if TAIL > 0:
                dyn_1RT = dy_1RT * n_1RT
                if PER_TOKEN:
                    _store(grad_scale_ptr, out_R + col_T, dyn_1RT * weight_T, mask_1RT)
                    dyn_1RT *= factor_T
                shift_sum_T += dy_1RT
                scale_sum_T += dyn_1RT

        grad_gate_KRW = _emit_stream_gradients(
            grad_KRW, branch_KRW, gate_KRW, grad_residual_ptr, grad_x_ptr, grad_branch_ptr, grad_gate_ptr,
            out_R + col_K, row_mask, NORM, GATED, ADD_RESIDUAL, PER_TOKEN,
        )  # fmt: skip
        gate_sum_K += tl.sum(grad_gate_KRW, axis=1, keep_dims=True)
        if TAIL > 0:
            gate_sum_T += _emit_stream_gradients(
                grad_1RT, branch_1RT, gate_1RT, grad_residual_ptr, grad_x_ptr, grad_branch_ptr, grad_gate_ptr,
                out_R + col_T, mask_1RT, NORM, GATED, ADD_RESIDUAL, PER_TOKEN,
            )  # fmt: skip

    partial = pid.to(tl.int64) * C
    if NORM == "rms" or (NORM == "layer" and not PER_TOKEN):
        _store_sums(sum_scale_ptr, partial, scale_sum_K, scale_sum_T, col_K, col_T, mask_T, TAIL)
    if NORM != "none" and not PER_TOKEN:
        _store_sums(sum_shift_ptr, partial, shift_sum_K, shift_sum_T, col_K, col_T, mask_T, TAIL)
    if GATED and not PER_TOKEN:
        _store_sums(sum_gate_ptr, partial, gate_sum_K, gate_sum_T, col_K, col_T, mask_T, TAIL)


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
        weight, factor = _gain(weight_ptr, scale_ptr, 0, b * scale_sb, col, mask, NORM)
        _store(grad_scale_ptr, b * C + col, dyn * weight, mask)
        if NORM == "rms":
            _store(sum_weight_ptr, b * C + col, dyn * factor, mask)
    if GATED:
        gate = _column_sum(sum_gate_ptr, start, splits, col, mask, C, SPLITS, COLS)
        _store(grad_gate_ptr, b * C + col, gate, mask)
