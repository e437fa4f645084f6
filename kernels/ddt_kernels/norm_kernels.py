# mypy: allow-untyped-defs, allow-untyped-decorators
"""The norm family's Triton kernels: the forward kernel, and what `norm_backward_kernels.py` shares with it.

One forward and one backward kernel serve four ops, selected by constexpr flags; `norm_launch.py` launches them:

    x'  = x + gate · branch                            GATED; rounded to the storage dtype, as its next reader gets it
    n   = (x' - mean) · rstd                           NORM "rms" (mean = 0), "layer", or "none": stop at x'
    y   = n · weight · (1 + scale) + shift             one rounding, at the store

Backward, with u = weight · (1 + scale), g = dy · u and <·> the mean over C:

    dx' = rstd · (g - n·<g·n> - <g>) + dx'_direct      <g> for "layer" only, dx'_direct where x' itself is an output
    dx  = dx',  dbranch = gate · dx',  dgate = branch · dx'
    dshift = dy,  dscale = dy·n·weight,  dweight = Σ dy·n·(1 + scale)

Only the inputs are saved for it: x', mean and rstd are recomputed from rows that have to be read anyway.

Why it looks like this. The passes are bound by memory, so all that counts is that every byte crosses once, in wide
accesses, with enough of them in flight (about 23 KB per SM cover 700 ns at 4.3 TB/s on 132 SMs) and with few
instructions and barriers in between.
 - C is not a power of two, and Triton's tiles are. Padding 1152 to 2048 would waste 44% of all lanes. So a row is two
   tiles: MAIN, the largest power of two below C, whose columns are never masked, and TAIL, the rest rounded up: 1152 =
   1024 + 128 (256 in the backward kernel). Both stay in registers: one read.
 - All loads of a row come before its first store, which the compiler may move none across, and are under way before
   the first is waited for: forward one round trip to memory, of every op at the models' widths. To save registers ptxas
   delays a load until its first use, even beyond a branch, unless it is predicated: so what is loaded ahead has a
   predicate that always holds (`exists`), and where a program has one row a branch separates loads and use.
 - Rows are processed one at a time, so their statistics are scalars, which have no layout. Each thread first adds what
   it holds of both tiles (`per_thread`), and those sums cross lanes and warps.
 - A forward program is a single warp (C up to 1536): its statistics are shuffles, without barriers or shared memory.
   With per-sample modulations and many rows it walks a few, with the modulations in registers. At most 512 rows in all
   have more warps each (C 1152: four), since one per row would leave schedulers idle, for one barrier (triton 3.6: two;
   layer: three and five). So have forecasts from three entries, which would fill a warp's registers.
 - A backward program is several warps, so that a thread has few columns: the sums over rows, which every parameter
   gradient is, then take a few registers and no exchange at all. Two sums cross warps together (rms: Σx² and Σg·x,
   as <g·n> = rstd·<g·x>; layer: Σx and Σg, then Σ(x - mean)² and Σg·(x - mean)), for two barriers (triton 3.6: three).
   While it computes a row, the next one is copied to shared memory (cp.async): at C 1152 in bf16 on sm_90 at most 136
   registers and 15 KB of shared memory, three programs per SM (with a gate and a scale per token) or more.
 - A program never crosses a sample. PER_TOKEN loads the modulations with each row instead of once.
 - Parameter gradients are deterministic: each backward program walks a fixed run of rows and leaves one fp32 partial
   sum per column; per sample, the two sums Σdy and Σdy·n give all of dshift, dscale and dweight.
 - A forecast (HISTORY 2 or 3, forward only) reads that many cached entries of each modulation, sums them in fp32
   registers and uses the sum unrounded: one more read per entry, no extra pass, nothing written. Its weights are a row
   of a device table, chosen by a device counter, so nothing on the host depends on the step. Modulations are affine in
   the state and weights add up to 1, so this is the forecast of the state, without its GEMM. A weight of 0 masks its
   entry's loads: no traffic, and what an unwritten entry holds does not matter. So there are three round trips: the
   step, its weights, the entries with x, branch and weight. Entries loaded with the step would save
   one of the three, and cost their bytes at every step that does without them: 3 to 6 of up to 13 rows moved.

Tile suffixes: W = MAIN, T = TAIL, X either. `x_row` is a row's offset; `cols` is what `columns` returns. LANES threads
hold VECTOR adjacent columns of a tile at a time.
"""

from ddt_kernels.runtime import tl, triton


@triton.jit
def columns(MAIN: tl.constexpr, TAIL: tl.constexpr, C: tl.constexpr):
    """(main columns, tail columns, mask of the tail)."""
    col_T = MAIN + tl.arange(0, TAIL)
    return tl.arange(0, MAIN), col_T, col_T < C


@triton.jit
def load_row(ptr, row, cols):
    """A row's two tiles, in their own dtype: nothing waits for them until they are used. Zeros beyond C."""
    return tl.load(ptr + row + cols[0]), tl.load(ptr + row + cols[1], mask=cols[2], other=0.0)


@triton.jit
def store_row(ptr, row, cols, x_W, x_T):
    tl.store(ptr + row + cols[0], x_W.to(ptr.dtype.element_ty))
    tl.store(ptr + row + cols[1], x_T.to(ptr.dtype.element_ty), mask=cols[2])


@triton.jit
def wide(tiles):
    return tiles[0].to(tl.float32), tiles[1].to(tl.float32)


@triton.jit
def _load_forecast(forecast_ptr, step_ptr, steps, HISTORY: tl.constexpr):
    """This step's weights, always three; NaN outside the table."""
    weights = (1.0, 0.0, 0.0)
    if HISTORY > 1:
        step = tl.load(step_ptr).to(tl.int64)
        known = (step >= 0) & (step < steps)
        row_ptr = forecast_ptr + step * HISTORY
        w_0 = tl.load(row_ptr, mask=known, other=float("nan"))
        w_1 = tl.load(row_ptr + 1, mask=known, other=float("nan"))
        w_2 = tl.load(row_ptr + 2, mask=known & (HISTORY > 2), other=float("nan"))
        weights = (w_0, w_1, w_2)
    return weights


@triton.jit
def _load_if(ptr, row, used, cols):
    """`load_row` if `used`, else zeros without a read: a predicated load, which ptxas does not move beyond a branch."""
    value_W = tl.load(ptr + row + cols[0], mask=used & (cols[0] >= 0), other=0.0)
    return value_W, tl.load(ptr + row + cols[1], mask=used & cols[2], other=0.0)


@triton.jit
def _load_modulation(ptr, row, stride_k, used, weights, cols, HISTORY: tl.constexpr):
    """A modulation as `_modulation` takes it: three entries, of which the first HISTORY count."""
    if HISTORY == 1:
        first = _load_if(ptr, row, used, cols)
        second, third = first, first
    else:
        first = _load_if(ptr, row, weights[0] != 0, cols)
        second = _load_if(ptr, row + stride_k, weights[1] != 0, cols)
        third = second
        if HISTORY > 2:
            third = _load_if(ptr, row + 2 * stride_k, weights[2] != 0, cols)
    return first, second, third


@triton.jit
def _modulation(entries, weights, HISTORY: tl.constexpr):
    """A modulation, or a forecast's Σ_k weights[k] · entry k, as fp32 tiles."""
    value_W, value_T = wide(entries[0])
    if HISTORY > 1:
        value_W, value_T = weights[0] * value_W, weights[0] * value_T
        for k in tl.static_range(1, HISTORY):
            entry_W, entry_T = wide(entries[k])
            value_W += weights[k] * entry_W
            value_T += weights[k] * entry_T
    return value_W, value_T


@triton.jit
def stream(x_X, branch_X, gate_X):
    """x' as fp32, rounded to x's dtype; gate is fp32."""
    return (x_X.to(tl.float32) + gate_X * branch_X.to(tl.float32)).to(x_X.dtype).to(tl.float32)


@triton.jit
def _per_thread(x_X, LANES: tl.constexpr, VECTOR: tl.constexpr):
    GROUPS: tl.constexpr = x_X.shape[0] // (LANES * VECTOR)
    return tl.sum(tl.sum(tl.reshape(x_X, [GROUPS, LANES, VECTOR]), axis=2), axis=0)


@triton.jit
def per_thread(x_W, x_T, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[LANES] sums of what each thread holds of a row: the two tiles cross lanes and warps as one value a thread."""
    VECTOR_W: tl.constexpr = min(VECTOR, x_W.shape[0] // LANES)
    VECTOR_T: tl.constexpr = min(VECTOR, x_T.shape[0] // LANES)
    return _per_thread(x_W, LANES, VECTOR_W) + _per_thread(x_T, LANES, VECTOR_T)


@triton.jit
def row_mean(x_W, x_T, C: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.sum(per_thread(x_W, x_T, LANES, VECTOR), axis=0) / C


@triton.jit
def _modulated(d_X, rstd, weight_X, scale_X, shift_X):
    return d_X * rstd * (weight_X * (1.0 + scale_X)) + shift_X


@triton.jit
def _finish_row(
    residual_ptr, y_ptr, out_row, x, branch, gates, weight, scales, shifts, weights, cols, eps,
    C: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, STORE_RESIDUAL: tl.constexpr, HISTORY: tl.constexpr,
):  # fmt: skip
    """Computes and stores x' and y of a row, given all it reads, as loaded."""
    x_W, x_T = x
    if GATED:
        gate_W, gate_T = _modulation(gates, weights, HISTORY)
        x_W, x_T = stream(x_W, branch[0], gate_W), stream(x_T, branch[1], gate_T)
    else:
        x_W, x_T = wide(x)
    if STORE_RESIDUAL:
        store_row(residual_ptr, out_row, cols, x_W, x_T)
    if NORM != "none":
        if NORM == "layer":
            mean = row_mean(x_W, x_T, C, LANES, VECTOR)
            x_W, x_T = x_W - mean, tl.where(cols[2], x_T - mean, 0.0)
        rstd = tl.math.rsqrt(row_mean(x_W * x_W, x_T * x_T, C, LANES, VECTOR) + eps)
        scale_W, scale_T = _modulation(scales, weights, HISTORY)
        shift_W, shift_T = _modulation(shifts, weights, HISTORY)
        y_W = _modulated(x_W, rstd, weight[0], scale_W, shift_W)
        y_T = _modulated(x_T, rstd, weight[1], scale_T, shift_T)
        store_row(y_ptr, out_row, cols, y_W, y_T)


@triton.jit
def norm_modulate_forward_kernel(
    x_ptr,  # (B, N, C), as are branch, residual and y
    branch_ptr,
    gate_ptr,  # (B, N or 1, C), as are shift and scale; a forecast's (HISTORY, B, N or 1, C)
    weight_ptr,  # (C,)
    shift_ptr,
    scale_ptr,
    forecast_ptr,  # (steps, HISTORY) fp32 contiguous, the weights of a forecast's entries
    step_ptr,  # one integer, the row to take
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
    steps,
    gate_sk,  # between a forecast's entries
    shift_sk,
    scale_sk,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    STORE_RESIDUAL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SINGLE_ROW: tl.constexpr,  # rows_per_program is 1
    HISTORY: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // splits).to(tl.int64)
    first = ((pid % splits) * rows_per_program).to(tl.int64)
    rows = tl.minimum(rows_per_program, N - first)
    cols = columns(MAIN, TAIL, C)
    mod_n = first if PER_TOKEN else 0  # a program walks several rows of one sample, or one row
    gate_row = b * gate_sb + mod_n * gate_sn
    shift_row, scale_row = b * shift_sb + mod_n * shift_sn, b * scale_sb + mod_n * scale_sn
    # A predicate costs "none" registers for nothing: without one its loads are under way together.
    exists = True if NORM == "none" else rows > 0
    weight = (1.0, 1.0)
    x, branch = weight, weight
    if SINGLE_ROW:
        x = _load_if(x_ptr, b * x_sb + first * x_sn, exists, cols)
        if GATED:
            branch = _load_if(branch_ptr, b * branch_sb + first * branch_sn, exists, cols)
    if NORM == "rms":
        weight = _load_if(weight_ptr, 0, exists, cols)
    weights = _load_forecast(forecast_ptr, step_ptr, steps, HISTORY)
    gates, scales, shifts = weight, weight, weight
    if GATED:
        gates = _load_modulation(gate_ptr, gate_row, gate_sk, exists, weights, cols, HISTORY)
    if NORM != "none":
        scales = _load_modulation(scale_ptr, scale_row, scale_sk, exists, weights, cols, HISTORY)
        shifts = _load_modulation(shift_ptr, shift_row, shift_sk, exists, weights, cols, HISTORY)

    if SINGLE_ROW:
        if exists:
            _finish_row(
                residual_ptr, y_ptr, (b * N + first) * C, x, branch, gates, weight, scales, shifts, weights, cols, eps,
                C, LANES, VECTOR, NORM, GATED, STORE_RESIDUAL, HISTORY,
            )  # fmt: skip
    else:
        for row in range(0, rows):
            n = first + row
            row_x = load_row(x_ptr, b * x_sb + n * x_sn, cols)
            row_branch = row_x
            if GATED:
                row_branch = load_row(branch_ptr, b * branch_sb + n * branch_sn, cols)
            _finish_row(
                residual_ptr, y_ptr, (b * N + n) * C, row_x, row_branch, gates, weight, scales, shifts, weights, cols,
                eps, C, LANES, VECTOR, NORM, GATED, STORE_RESIDUAL, HISTORY,
            )  # fmt: skip
