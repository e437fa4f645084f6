# mypy: allow-untyped-defs, allow-untyped-decorators
"""The Triton kernels of qk_norm_rope: RMS norm and 2-D rotary embedding of q and k on a packed qkv, in one pass.

    n = x · rstd,  u = n · weight                                              per head, rstd = 1 / sqrt(<x²> + eps)
    y_2i = u_2i · cos_i - u_2i+1 · sin_i,   y_2i+1 = u_2i · sin_i + u_2i+1 · cos_i            one rounding, at the store

Backward: a rotation is orthogonal, so du is dy turned back (sin becomes -sin); then with g = du · weight

    dx = rstd · (g - n·<g·n>),   dweight = Σ du·n over B, N, H

<·> is the mean over D. Only the inputs are saved.

Why it looks like this. The pass is bound by memory. A head needs a sum over D, which is not a power of two, and each
element's neighbour; a token needs tables and weights worth as many bytes as a few of its heads. So:
 - A head is split like the norm family's rows, D = MAIN + TAIL. MAIN, the largest power of two ≤ D, is spread over
   LANES lanes in 16-byte accesses, TAIL over the same lanes with at least a pair each, beyond D if necessary: D 72 is
   64 + 16 over 8 lanes, half of which have no work in the tail. Both tiles then agree on which lane has which head, and
   both members of a pair belong to one lane: nothing goes through shared memory, and there is no barrier.
 - Tiles are loaded as [ROWS, MAIN] and split, without moving data, into even and odd [ROWS, LANES, columns]. So each
   lane first sums its own part of D, over main and tail, then come three shuffles for 8 lanes. With the lanes written
   out, the compiler finds nothing better; given sums over [ROWS, MAIN] and [ROWS, TAIL] to add, it sent the main tile
   through shared memory. (Loads have no third dimension: triton 3.6 and 3.8 would spread lanes in different orders.)
 - Rows are LANE_HEADS heads, then tokens: the lanes of a warp cover LANE_HEADS heads of a token or, if it has fewer,
   several tokens. A program walks GROUPS such groups of heads, q and k together, with the tables and weights in
   registers, loaded once. Each warp has a group's q and k in flight, at 64 registers.
 - A group's loads (q, k and v; backward: x, its gradient and v's) are all under way before the first is waited for:
   one round trip to memory per group, in every shipped binary for sm_90. The compiler may not move a load across a
   store, so the loads come first; and v's store comes next, since ptxas defers the load of what is stored last.
 - A backward program walks a run of tokens, for q or for k, and copies every other group of v's gradient: by a mask,
   because a load inside a branch would wait for the others. A lane sums its own columns of du·n in registers; lanes
   and warps are combined once, at the end. Each program leaves one fp32 partial sum per column; these are added in a
   fixed order, so the result is deterministic.
 - Nothing is copied ahead (cp.async): at XL/2 that takes 142 registers and 3 barriers a group, which by the budget of
   waits costs more (34 B/ns per SM) than four programs per SM that wait once a group (53).

Tile suffixes: R rows, M main, T tail; 0 and 1 the even and odd members of pairs. Those of M are [R, LANES, columns].
"""

from ddt_kernels.runtime import tl, triton


@triton.jit
def _load(ptr, offset, mask):
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, offset, value, mask):
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _columns(FIRST: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr):
    """Columns [1, COUNT], VECTOR adjacent ones per lane: accesses are as wide as the known alignment, no wider.

    max_contiguous would do the same, but triton 3.6 lays lanes along the longest contiguous axis, and 1 is a tie.
    """
    return tl.multiple_of(FIRST + tl.arange(0, COUNT)[None, :], [1, VECTOR])


@triton.jit
def _lanes(x_RX, LANES: tl.constexpr):
    """[R, X] as [R, LANES, X / LANES]."""
    return tl.reshape(x_RX, [x_RX.shape[0], LANES, x_RX.shape[1] // LANES])


@triton.jit
def _load_tables(ptr, row_R, mask_R, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr):
    """Rows of D / 2 angles: [R, L, MAIN / 2 / L] and [R, L, TAIL / 2 / L]; without a tail, the first twice."""
    main = _lanes(_load(ptr, row_R + _columns(0, MAIN // 2, MAIN // 2 // LANES), mask_R), LANES)
    tail = main
    if TAIL > 0:
        pair = _columns(MAIN // 2, TAIL // 2, TAIL // 2 // LANES)
        tail = _lanes(_load(ptr, row_R + pair, mask_R & (pair < D // 2)), LANES)
    return main, tail


@triton.jit
def _split_pairs(x_RX, LANES: tl.constexpr):
    return tl.split(tl.reshape(x_RX, [x_RX.shape[0], LANES, x_RX.shape[1] // LANES // 2, 2]))


@triton.jit
def _join_pairs(even, odd):
    pairs = tl.join(even, odd)
    return tl.reshape(pairs, [even.shape[0], even.shape[1] * even.shape[2] * 2])


@triton.jit
def _load_pairs(ptr, row_R, mask_R, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr):
    """Rows of D columns as fp32: the even and the odd ones of MAIN, those of TAIL; shaped as the tables."""
    even_M, odd_M = _split_pairs(_load(ptr, row_R + _columns(0, MAIN, MAIN // LANES), mask_R), LANES)
    even_T, odd_T = even_M, odd_M
    if TAIL > 0:
        col_T = _columns(MAIN, TAIL, TAIL // LANES)
        even_T, odd_T = _split_pairs(_load(ptr, row_R + col_T, mask_R & (col_T < D)), LANES)
    return even_M, odd_M, even_T, odd_T


@triton.jit
def _store_pairs(
    ptr, row_R, even_M, odd_M, even_T, odd_T, mask_R,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    _store(ptr, row_R + _columns(0, MAIN, MAIN // LANES), _join_pairs(even_M, odd_M), mask_R)
    if TAIL > 0:
        col_T = _columns(MAIN, TAIL, TAIL // LANES)
        _store(ptr, row_R + col_T, _join_pairs(even_T, odd_T), mask_R & (col_T < D))


@triton.jit
def _load_head(ptr, row_R, mask_R, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr):
    """Rows of D columns as they are stored, [R, MAIN] and [R, TAIL]."""
    main = tl.load(ptr + row_R + _columns(0, MAIN, MAIN // LANES), mask=mask_R)
    tail = main
    if TAIL > 0:
        col_T = _columns(MAIN, TAIL, TAIL // LANES)
        tail = tl.load(ptr + row_R + col_T, mask=mask_R & (col_T < D))
    return main, tail


@triton.jit
def _store_head(
    ptr, row_R, main, tail, mask_R, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr
):
    _store(ptr, row_R + _columns(0, MAIN, MAIN // LANES), main, mask_R)
    if TAIL > 0:
        col_T = _columns(MAIN, TAIL, TAIL // LANES)
        _store(ptr, row_R + col_T, tail, mask_R & (col_T < D))


@triton.jit
def _mean(pairs_M, pairs_T, D: tl.constexpr, TAIL: tl.constexpr):
    """The mean over D, [R, 1, 1], given as sums of pairs. The tail is zero beyond D."""
    total_RL = tl.sum(pairs_M, axis=2)
    if TAIL > 0:
        total_RL += tl.sum(pairs_T, axis=2)
    return tl.sum(total_RL, axis=1)[:, None, None] / D


@triton.jit
def _rstd(even_M, odd_M, even_T, odd_T, eps, D: tl.constexpr, TAIL: tl.constexpr):
    return tl.math.rsqrt(_mean(even_M * even_M + odd_M * odd_M, even_T * even_T + odd_T * odd_T, D, TAIL) + eps)


@triton.jit
def _turn(even, odd, cos, sin):
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _norm_rotate_store(
    ptr, row_R, x0_M, x1_M, x0_T, x1_T, w0_M, w1_M, w0_T, w1_T, cos_M, sin_M, cos_T, sin_T, eps, mask_R,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    rstd_R = _rstd(x0_M, x1_M, x0_T, x1_T, eps, D, TAIL)
    y0_M, y1_M = _turn(x0_M * rstd_R * w0_M, x1_M * rstd_R * w1_M, cos_M, sin_M)
    y0_T, y1_T = y0_M, y1_M
    if TAIL > 0:
        y0_T, y1_T = _turn(x0_T * rstd_R * w0_T, x1_T * rstd_R * w1_T, cos_T, sin_T)
    _store_pairs(ptr, row_R, y0_M, y1_M, y0_T, y1_T, mask_R, D, MAIN, TAIL, LANES)


@triton.jit
def qk_norm_rope_forward_kernel(
    qkv_ptr,  # (B, N, 3, H, D); the last three dimensions contiguous
    out_ptr,  # the same; qkv itself for the in-place op
    q_weight_ptr,  # (D,)
    k_weight_ptr,
    cos_ptr,  # (N, D / 2) fp32, contiguous
    sin_ptr,
    N,
    token_blocks,  # ceil(N / tokens of a program)
    head_blocks,  # ceil(H / heads of a program)
    qkv_sb,
    qkv_sn,
    out_sb,
    out_sn,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
    LANE_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COPY_V: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // (token_blocks * head_blocks)).to(tl.int64)
    row_R = tl.arange(0, ROWS)[:, None]
    n_R = (pid // head_blocks % token_blocks * (ROWS // LANE_HEADS) + row_R // LANE_HEADS).to(tl.int64)
    first_h = pid % head_blocks * (GROUPS * LANE_HEADS)
    token_mask, zero_R = n_R < N, tl.zeros([ROWS, 1], tl.int32)
    in_R, out_R = b * qkv_sb + n_R * qkv_sn, b * out_sb + n_R * out_sn
    cos_M, cos_T = _load_tables(cos_ptr, n_R * (D // 2), token_mask, D, MAIN, TAIL, LANES)
    sin_M, sin_T = _load_tables(sin_ptr, n_R * (D // 2), token_mask, D, MAIN, TAIL, LANES)
    qw0_M, qw1_M, qw0_T, qw1_T = _load_pairs(q_weight_ptr, zero_R, token_mask, D, MAIN, TAIL, LANES)
    kw0_M, kw1_M, kw0_T, kw1_T = _load_pairs(k_weight_ptr, zero_R, token_mask, D, MAIN, TAIL, LANES)

    for group in range(GROUPS):
        h_R = first_h + group * LANE_HEADS + row_R % LANE_HEADS
        mask, q_R, k_R, v_R = token_mask & (h_R < H), h_R * D, (H + h_R) * D, (2 * H + h_R) * D
        q0_M, q1_M, q0_T, q1_T = _load_pairs(qkv_ptr, in_R + q_R, mask, D, MAIN, TAIL, LANES)
        k0_M, k1_M, k0_T, k1_T = _load_pairs(qkv_ptr, in_R + k_R, mask, D, MAIN, TAIL, LANES)
        if COPY_V:
            v_M, v_T = _load_head(qkv_ptr, in_R + v_R, mask, D, MAIN, TAIL, LANES)
            _store_head(out_ptr, out_R + v_R, v_M, v_T, mask, D, MAIN, TAIL, LANES)
        _norm_rotate_store(
            out_ptr, out_R + q_R, q0_M, q1_M, q0_T, q1_T, qw0_M, qw1_M, qw0_T, qw1_T,
            cos_M, sin_M, cos_T, sin_T, eps, mask, D, MAIN, TAIL, LANES,
        )  # fmt: skip
        _norm_rotate_store(
            out_ptr, out_R + k_R, k0_M, k1_M, k0_T, k1_T, kw0_M, kw1_M, kw0_T, kw1_T,
            cos_M, sin_M, cos_T, sin_T, eps, mask, D, MAIN, TAIL, LANES,
        )  # fmt: skip


@triton.jit
def _unrotate_unnorm_store(
    ptr, row_R, dy0_M, dy1_M, dy0_T, dy1_T, x0_M, x1_M, x0_T, x1_T, w0_M, w1_M, w0_T, w1_T,
    cos_M, sin_M, cos_T, sin_T, eps, mask_R,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Stores dx; returns du · n, as pairs of MAIN and of TAIL."""
    rstd_R = _rstd(x0_M, x1_M, x0_T, x1_T, eps, D, TAIL)
    du0_M, du1_M = _turn(dy0_M, dy1_M, cos_M, -sin_M)
    n0_M, n1_M = x0_M * rstd_R, x1_M * rstd_R
    dun0_M, dun1_M = du0_M * n0_M, du1_M * n1_M
    du0_T, du1_T, n0_T, n1_T, dun0_T, dun1_T = du0_M, du1_M, n0_M, n1_M, dun0_M, dun1_M
    if TAIL > 0:
        du0_T, du1_T = _turn(dy0_T, dy1_T, cos_T, -sin_T)
        n0_T, n1_T = x0_T * rstd_R, x1_T * rstd_R
        dun0_T, dun1_T = du0_T * n0_T, du1_T * n1_T
    mean_R = _mean(dun0_M * w0_M + dun1_M * w1_M, dun0_T * w0_T + dun1_T * w1_T, D, TAIL)
    dx0_M, dx1_M = rstd_R * (du0_M * w0_M - n0_M * mean_R), rstd_R * (du1_M * w1_M - n1_M * mean_R)
    dx0_T, dx1_T = dx0_M, dx1_M
    if TAIL > 0:
        dx0_T, dx1_T = rstd_R * (du0_T * w0_T - n0_T * mean_R), rstd_R * (du1_T * w1_T - n1_T * mean_R)
    _store_pairs(ptr, row_R, dx0_M, dx1_M, dx0_T, dx1_T, mask_R, D, MAIN, TAIL, LANES)
    return dun0_M, dun1_M, dun0_T, dun1_T


@triton.jit
def _store_sums(ptr, even_M, odd_M, even_T, odd_T, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    tl.store(ptr + tl.arange(0, MAIN), tl.sum(_join_pairs(even_M, odd_M), axis=0))
    if TAIL > 0:
        col_T = MAIN + tl.arange(0, TAIL)
        tl.store(ptr + col_T, tl.sum(_join_pairs(even_T, odd_T), axis=0), mask=col_T < D)


@triton.jit
def qk_norm_rope_backward_kernel(
    grad_out_ptr,  # (B, N, 3, H, D) contiguous, as is grad_qkv; the same tensor if v's gradient is not copied
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_qkv_ptr,
    sum_weight_ptr,  # out, fp32 (B · splits, 2, D): each run of tokens' share of the weights' gradients
    N,
    splits,  # runs of tokens per sample
    tokens_per_program,
    qkv_sb,
    qkv_sn,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
    LANE_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COPY_V: tl.constexpr,
):
    pid = tl.program_id(0)
    part = pid % 2  # q or k
    b = (pid // 2 // splits).to(tl.int64)
    first = (pid // 2 % splits) * tokens_per_program
    last = tl.minimum(first + tokens_per_program, N)
    row_R = tl.arange(0, ROWS)[:, None]
    zero_R, always_R = tl.zeros([ROWS, 1], tl.int32), row_R >= 0
    if part == 0:
        w0_M, w1_M, w0_T, w1_T = _load_pairs(q_weight_ptr, zero_R, always_R, D, MAIN, TAIL, LANES)
    else:
        w0_M, w1_M, w0_T, w1_T = _load_pairs(k_weight_ptr, zero_R, always_R, D, MAIN, TAIL, LANES)
    sum0_M, sum1_M, sum0_T, sum1_T = w0_M * 0, w1_M * 0, w0_T * 0, w1_T * 0

    for start in range(first, last, ROWS // LANE_HEADS):
        n_R = (start + row_R // LANE_HEADS).to(tl.int64)
        token_mask = n_R < last
        in_R, out_R = b * qkv_sb + n_R * qkv_sn, (b * N + n_R) * (3 * H * D)
        cos_M, cos_T = _load_tables(cos_ptr, n_R * (D // 2), token_mask, D, MAIN, TAIL, LANES)
        sin_M, sin_T = _load_tables(sin_ptr, n_R * (D // 2), token_mask, D, MAIN, TAIL, LANES)
        for group in range(GROUPS):
            h_R = group * LANE_HEADS + row_R % LANE_HEADS
            mask, x_R, v_R = token_mask & (h_R < H), (part * H + h_R) * D, (2 * H + h_R) * D
            x0_M, x1_M, x0_T, x1_T = _load_pairs(qkv_ptr, in_R + x_R, mask, D, MAIN, TAIL, LANES)
            dy0_M, dy1_M, dy0_T, dy1_T = _load_pairs(grad_out_ptr, out_R + x_R, mask, D, MAIN, TAIL, LANES)
            if COPY_V:
                v_mask = mask & (group % 2 == part)
                v_M, v_T = _load_head(grad_out_ptr, out_R + v_R, v_mask, D, MAIN, TAIL, LANES)
                _store_head(grad_qkv_ptr, out_R + v_R, v_M, v_T, v_mask, D, MAIN, TAIL, LANES)
            dun0_M, dun1_M, dun0_T, dun1_T = _unrotate_unnorm_store(
                grad_qkv_ptr, out_R + x_R, dy0_M, dy1_M, dy0_T, dy1_T, x0_M, x1_M, x0_T, x1_T,
                w0_M, w1_M, w0_T, w1_T, cos_M, sin_M, cos_T, sin_T, eps, mask, D, MAIN, TAIL, LANES,
            )  # fmt: skip
            sum0_M, sum1_M, sum0_T, sum1_T = sum0_M + dun0_M, sum1_M + dun1_M, sum0_T + dun0_T, sum1_T + dun1_T

    _store_sums(sum_weight_ptr + pid.to(tl.int64) * D, sum0_M, sum1_M, sum0_T, sum1_T, D, MAIN, TAIL)
