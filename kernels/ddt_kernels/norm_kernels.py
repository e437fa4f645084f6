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
   tiles: MAIN, the largest power of two ≤ C, whose columns are never masked, and TAIL, the rest rounded up (absent if C
   is a power of two): 1152 = 1024 + 128, exactly. Both stay in registers: one read.
 - Rows are processed one at a time, so their statistics are scalars, which have no layout. With several rows at once,
   the two tiles' row sums are vectors with two layouts, and to add them the compiler sends a whole tile through shared
   memory (triton 3.6 and 3.8, in different places). Many programs per SM keep the loads in flight instead: at C = 1152
   in bf16 on sm_90, the backward kernel uses 47 to 80 registers per thread: 6 to 10 programs per SM, 46 KB or more in
   flight; the forward kernel 87 to 128: 16 or more programs, 37 KB or more.
 - A forward program is a single warp (C below 4096): its statistics are shuffles, without barriers or shared memory.
   With per-sample modulations it walks a few rows, which then find the modulations in L1; otherwise every row would
   fetch three vectors from L2.
 - A backward program is several warps, so that a thread has few columns: the sums over rows, which every parameter
   gradient is, then take a few registers and no exchange at all. Only two or three sums per row cross warps.
 - A program never crosses a sample. PER_TOKEN makes the modulations' token offset the row or zero; the rest is equal.
 - Parameter gradients are deterministic: each backward program walks a fixed run of rows and leaves one fp32 partial
   sum per column; per sample, the two sums Σdy and Σdy·n give all of dshift, dscale and dweight.
 - A forecast (HISTORY 2 or 3, forward only) reads that many cached entries of each modulation, sums them in fp32
   registers and uses the sum unrounded: one more read per entry, no extra pass, nothing written. Its weights are a row
   of a device table, chosen by a device counter, so nothing on the host depends on the step. Modulations are affine in
   the state and weights add up to 1, so this is the forecast of the state, without its GEMM. A weight of 0 masks its
   entry's loads: no traffic, and what an unwritten entry holds does not matter. Its parameters come last because
   ptxas's choice of registers follows their order: without a forecast (HISTORY 1), every op uses as many as it would
   without them. With one, C 1152 in bf16 on sm_90 uses 127 to 168 per thread: 12 or more programs per SM, each with
   that many more loads in flight.

Tile suffixes: W = MAIN, T = TAIL, X either. `x_row` is a row's offset.
"""

from ddt_kernels.runtime import tl, triton


@triton.jit
def load_tile(ptr, offset, mask):
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, offset, value, mask):
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def tail_columns(MAIN: tl.constexpr, TAIL: tl.constexpr, C: tl.constexpr):
    col = MAIN + tl.arange(0, TAIL)
    return col, col < C


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
def _load_modulation(ptr, row, stride_k, weights, col, mask, HISTORY: tl.constexpr):
    """A modulation, or a forecast's Σ_k weights[k] · entry k, as fp32. An entry with weight 0 is not read."""
    if HISTORY == 1:
        value = load_tile(ptr, row + col, mask)
    else:
        value = weights[0] * load_tile(ptr, row + col, mask & (weights[0] != 0))
        for k in tl.static_range(1, HISTORY):
            row += stride_k
            value += weights[k] * load_tile(ptr, row + col, mask & (weights[k] != 0))
    return value


@triton.jit
def load_stream(
    x_ptr, branch_ptr, gate_ptr, x_row, branch_row, gate_row, col, mask, GATED: tl.constexpr,
    gate_sk=0, weights=None, HISTORY: tl.constexpr = 1,
):  # fmt: skip
    """(x', branch, gate) as fp32; *_row are row offsets, col and mask choose the columns. Not gated: x three times."""
    x = load_tile(x_ptr, x_row + col, mask)
    branch, gate = x, x
    if GATED:
        branch = load_tile(branch_ptr, branch_row + col, mask)
        gate = _load_modulation(gate_ptr, gate_row, gate_sk, weights, col, mask, HISTORY)
        x = (x + gate * branch).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x, branch, gate


@triton.jit
def row_sum(a_W, a_T, TAIL: tl.constexpr):
    total = tl.sum(a_W, axis=0)
    if TAIL > 0:
        total += tl.sum(a_T, axis=0)
    return total


@triton.jit
def statistics(x_W, x_T, mask_T, eps, C: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr):
    """(mean, rstd) of a row. The variance is the mean square about the mean: no cancellation."""
    mean = 0.0
    if NORM == "layer":
        mean = row_sum(x_W, x_T, TAIL) / C
    d_W = x_W - mean
    d_T = tl.where(mask_T, x_T - mean, 0.0)
    return mean, tl.math.rsqrt(row_sum(d_W * d_W, d_T * d_T, TAIL) / C + eps)


@triton.jit
def gain(
    weight_ptr, scale_ptr, scale_row, col, mask, C: tl.constexpr, NORM: tl.constexpr,
    scale_sk=0, weights=None, HISTORY: tl.constexpr = 1,
):  # fmt: skip
    """(weight, 1 + scale) as fp32; weight is 1 for "layer"."""
    factor = 1.0 + _load_modulation(scale_ptr, scale_row, scale_sk, weights, col, mask, HISTORY)
    weight = 1.0
    if NORM == "rms":
        weight = load_tile(weight_ptr, col, col < C)
    return weight, factor


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
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    STORE_RESIDUAL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HISTORY: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // splits).to(tl.int64)
    first = ((pid % splits) * rows_per_program).to(tl.int64)
    rows = tl.minimum(rows_per_program, N - first)
    col_W, mask_W = tl.arange(0, MAIN), tl.full([MAIN], 1, tl.int1)
    col_T, mask_T = col_W, mask_W
    if TAIL > 0:
        col_T, mask_T = tail_columns(MAIN, TAIL, C)
    weights = _load_forecast(forecast_ptr, step_ptr, steps, HISTORY)

    for row in range(0, rows):
        n = first + row
        mod_n = n if PER_TOKEN else 0
        x_row, branch_row, gate_row = b * x_sb + n * x_sn, b * branch_sb + n * branch_sn, b * gate_sb + mod_n * gate_sn
        shift_row, scale_row, out_row = (
            b * shift_sb + mod_n * shift_sn,
            b * scale_sb + mod_n * scale_sn,
            (b * N + n) * C,
        )

        x_W, _, _ = load_stream(
            x_ptr, branch_ptr, gate_ptr, x_row, branch_row, gate_row, col_W, mask_W, GATED,
            gate_sk, weights, HISTORY,
        )  # fmt: skip
        x_T = x_W
        if TAIL > 0:
            x_T, _, _ = load_stream(
                x_ptr, branch_ptr, gate_ptr, x_row, branch_row, gate_row, col_T, mask_T, GATED,
                gate_sk, weights, HISTORY,
            )  # fmt: skip
        if STORE_RESIDUAL:
            store_tile(residual_ptr, out_row + col_W, x_W, mask_W)
            if TAIL > 0:
                store_tile(residual_ptr, out_row + col_T, x_T, mask_T)
        if NORM != "none":
            mean, rstd = statistics(x_W, x_T, mask_T, eps, C, TAIL, NORM)
            weight_W, factor_W = gain(
                weight_ptr, scale_ptr, scale_row, col_W, mask_W, C, NORM, scale_sk, weights, HISTORY
            )
            shift_W = _load_modulation(shift_ptr, shift_row, shift_sk, weights, col_W, mask_W, HISTORY)
            y_W = (x_W - mean) * rstd * (weight_W * factor_W) + shift_W
            store_tile(y_ptr, out_row + col_W, y_W, mask_W)
            if TAIL > 0:
                weight_T, factor_T = gain(
                    weight_ptr, scale_ptr, scale_row, col_T, mask_T, C, NORM, scale_sk, weights, HISTORY
                )
                shift_T = _load_modulation(shift_ptr, shift_row, shift_sk, weights, col_T, mask_T, HISTORY)
                y_T = (x_T - mean) * rstd * (weight_T * factor_T) + shift_T
                store_tile(y_ptr, out_row + col_T, y_T, mask_T)
