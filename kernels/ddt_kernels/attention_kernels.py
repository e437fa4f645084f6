# mypy: allow-untyped-defs, allow-untyped-decorators
"""The Triton kernels of attention; `attention_launch.py` launches them.

Nq queries attend to Nk keys. Forward, one program per head and BM queries, walking the keys in tiles of BN (online
softmax, arXiv 2205.14135):

    s = q·kᵀ,  m' = max(m, scale·max_n s),  p = 2^(scale·s - m'),  a = 2^(m - m'),  l' = a·l + Σ_n p,  o' = a·o + p·v
    out = o / l,  lse = ln 2 · (m + log2 l);       scale includes log2(e): one FMA and one EX2 per score

Backward, from q, k, v, out, its gradient do and lse, with p recomputed and delta = Σ_d do·out:

    ds = p·(do·vᵀ - delta);   dq = scale·ds·k  (a program per BM queries),   dv = pᵀ·do, dk = scale·dsᵀ·q  (per BN keys)

Why it looks like this.
 - The head dim is covered by two dots, MAIN + TAIL, where that is narrower than one padded dot: 72 = 64 + 8 of 16,
   while padding to 128 would spend 44% of the multiplications on zeros. q·kᵀ is the sum of two dots; p·v goes to two
   accumulators. Columns past D are read as zeros, by the copy engine's bounds check or by a constant mask.
 - Each score takes one EX2 (16 per clock and SM on sm_90) and 320 FLOPs of MMA (4096 per clock): 0.063 and 0.078
   clocks. A warp does one after the other, so independent warps must overlap them: on sm_90 at D ≤ 96 the tile is
   128x64 and registers are capped at 128 (107 to 126 used, no spill), which puts two programs of 8 warps on an SM, one
   multiplying while the other exponentiates. Issuing the loop's 380 instructions takes 0.093 clocks a score (D 72, no
   mask), where 128x32 takes 0.149: per step, not per score, it rescales accumulators and copies. At D 128 the cap
   leaves ptxas too few registers to keep a wgmma in flight (advisory C7512: it would wait after each), so the program
   is alone on its SM and takes the largest step, 128x128. The tile does not depend on Nq and Nk: 128 divides the tokens
   of an image, 64 those of an image and a text. 64 queries would read keys and values from L2 twice as often.
 - A program waits for memory twice before its first wgmma. First its own rows, by pointers: the loads of all of them,
   MAIN and TAIL, are in flight together. By descriptors each copy outside a loop is followed by its own wait in Triton
   (3.6 and 3.8), which made 2 (forward), 6 (dq) and 4 (dk, dv) waits. Then the loop's first tiles, one wait, as in each
   step: Triton lets copies share a barrier if no use of one stands before another (`_load_tiles`). The two do not
   overlap: Triton issues a loop's first copies after what stands before the loop, the rows' way into shared memory.
   (`aot` counts only the second, as "copies". After the first, dq reads lse again, in the wgmma's layout.)
 - Loops have three stages: with two, Triton issues a step's copies at the end of the step before and waits at once.
 - If BN does not divide Nk, every step masks (a sixth more instructions). A last step of its own would wait for each of
   its copies, and ptxas would serialise all wgmmas of the kernel (C7515).
 - dk and dv take lse and delta as pairs that dq's kernel leaves in rows padded to whole tiles: one copy a step by the
   copy engine. Read from lse and delta as they are, Nq apart, every thread would copy 4 bytes of each (LDGSTS).
 - A step of the backward pass drains the wgmmas twice per product of two heads' tiles (once if a head is one dot), so
   other warps must have work meanwhile: up to D 96 two programs share an SM here too. dq takes 128x32, 8 warps, at most
   115 registers: 128x64 would issue a third fewer instructions a score but needs 130 (D 64: 122, so there it is taken;
   at D 128 128x32 would spill, and the program is alone). dk and dv take 64 keys, 4 warps, 188 to 236 registers, at
   D 128 too. 128 keys and 8 warps (192 to 229) would be alone; capped at 128, with 32 queries, they spill and
   serialise (C7512, D 72). The price: q and do come from L2 for every 64 keys, 18 KB per 64x64 scores at D 72. At the
   MMA's full rate these were 29 bytes per clock and SM; the L2 of an H100 is said to give 24 (neither was measured).
 - The backward pass has no atomics: two kernels, each the only writer of its outputs, so results repeat bit for bit.
   The price is seven products where an atomic dq takes five: 7·80 multiplications per score at D 72, against 5·96 for
   five padded to 96. PyTorch's own backward passes were the alternative: its flash attention is not deterministic by
   default and takes neither fp32 nor D 20, the others differ in what they take, and none runs without a GPU, where
   these kernels are checked. Rows past the last are zeros, which need no mask, except for p in dq: 2^-lse may be
   infinite.
 - fp32 uses no tensor cores: TF32 would lose 13 bits, and three TF32 products, whose operands have to be split in
   registers, spill at any tile size. CHUNK > 0 contracts over D in a loop that reads CHUNK columns of both at a time.

Within a kernel a tensor is a tuple (main, stride_b, stride_n, stride_h, tail): a pointer without a tail or, for what
loops walk over if DESCRIPTORS, descriptors of [1, rows, 1, MAIN or TAIL] blocks over (B, N, H, D). Strides are in units
of VECTOR elements, so that the compiler knows what divides them. (They are passed one by one: Triton 3.6 cannot launch
a descriptor inside a tuple.)
Tile suffixes: M queries, N keys, D = MAIN, T = TAIL; R and S are rows of either, C is CHUNK. Without a tail, any tile
stands in for it.
"""

from ddt_kernels.runtime import tl, triton


@triton.jit
def _load(
    source, b, h, first, N, column,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, VECTOR: tl.constexpr, MASK_ROWS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS, WIDTH] of head (b, h) from row `first` and `column` on, by pointers; zeros outside where masked."""
    row = tl.arange(0, ROWS)[:, None]
    col = column + tl.arange(0, WIDTH)[None, :]
    first_64 = tl.full([], 0, tl.int64) + first
    start = (b * source[1] + first_64 * source[2] + h * source[3]) * VECTOR
    pointers = source[0] + start + row * (source[2] * VECTOR) + col
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=(row < N - first) & (col < D), other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=row < N - first, other=0.0)
    elif MASK_COLUMNS:
        return tl.load(pointers, mask=col < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _load_rows(
    source, b, h, first, N,
    ROWS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(main, tail) tiles of ROWS rows from `first` on, by pointers."""
    main = _load(source, b, h, first, N, 0, MAIN, ROWS, D, VECTOR, MASKED, MAIN > D)
    tail = main
    if TAIL > 0:
        tail = _load(source, b, h, first, N, MAIN, TAIL, ROWS, D, VECTOR, MASKED, MAIN + TAIL > D)
    return main, tail


@triton.jit
def _load_tiles(
    x, y, b, h, first, N,
    ROWS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, VECTOR: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A step's tiles of x and y, (main, tail) of each. Descriptors read zeros outside, MASKED or not."""
    if DESCRIPTORS:
        # Every copy before the first use, even a reshape: copies between two uses share a barrier, so this waits once.
        b_32 = b.to(tl.int32)
        x_RD, y_RD = x[0].load([b_32, first, h, 0]), y[0].load([b_32, first, h, 0])
        if TAIL > 0:
            x_RT, y_RT = x[4].load([b_32, first, h, MAIN]), y[4].load([b_32, first, h, MAIN])
            x_RT, y_RT = x_RT.reshape([ROWS, TAIL]), y_RT.reshape([ROWS, TAIL])
        x_RD, y_RD = x_RD.reshape([ROWS, MAIN]), y_RD.reshape([ROWS, MAIN])
        if TAIL == 0:
            x_RT, y_RT = x_RD, y_RD
    else:
        x_RD, x_RT = _load_rows(x, b, h, first, N, ROWS, D, MAIN, TAIL, VECTOR, MASKED)
        y_RD, y_RT = _load_rows(y, b, h, first, N, ROWS, D, MAIN, TAIL, VECTOR, MASKED)
    return x_RD, x_RT, y_RD, y_RT


@triton.jit
def _product(a_RD, a_RT, b_SD, b_ST, TAIL: tl.constexpr):
    """a·bᵀ over the head dim: [R, S]."""
    product = tl.dot(a_RD, b_SD.T)
    if TAIL > 0:
        product = tl.dot(a_RT, b_ST.T, product)
    return product


@triton.jit
def _chunked_product(
    x, y, b, h, first_x, first_y, N_x, N_y,
    ROWS_X: tl.constexpr, ROWS_Y: tl.constexpr, D: tl.constexpr, VECTOR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """x·yᵀ of a head's rows from first_x and first_y on, CHUNK columns of the head dim at a time, in exact fp32."""
    product = tl.zeros([ROWS_X, ROWS_Y], tl.float32)
    for column in range(0, D, CHUNK):
        x_RC = _load(x, b, h, first_x, N_x, column, CHUNK, ROWS_X, D, VECTOR, True, True)
        y_SC = _load(y, b, h, first_y, N_y, column, CHUNK, ROWS_Y, D, VECTOR, True, True)
        product = tl.dot(x_RC, y_SC.T, product, input_precision="ieee")
    return product


@triton.jit
def _accumulate(a_RS, b_SD, b_ST, acc_RD, acc_RT, TAIL: tl.constexpr):
    """acc + a·b, a rounded to b's dtype."""
    a_RS = a_RS.to(b_SD.dtype)
    acc_RD = tl.dot(a_RS, b_SD, acc_RD, input_precision="ieee")
    if TAIL > 0:
        acc_RT = tl.dot(a_RS, b_ST, acc_RT)
    return acc_RD, acc_RT


@triton.jit
def _store_head(
    ptr, value_RD, value_RT, b, h, first, N, pitch,
    ROWS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Stores rows of a (B, N, H, D) whose tokens are `pitch` heads apart, and whose samples are N tokens apart."""
    row = first + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, MAIN)[None, :]
    pointers = ptr + ((b * N + row) * pitch + h) * D
    tl.store(pointers + col, value_RD.to(ptr.dtype.element_ty), mask=(row < N) & (col < D))
    if TAIL > 0:
        col_T = MAIN + tl.arange(0, TAIL)[None, :]
        tl.store(pointers + col_T, value_RT.to(ptr.dtype.element_ty), mask=(row < N) & (col_T < D))


@triton.jit
def _locate(H, blocks):
    """(batch as int64, head, block) of this program: the blocks of a head run together and share its keys in L2."""
    pid = tl.program_id(0)
    return (pid // blocks // H).to(tl.int64), pid // blocks % H, pid % blocks


@triton.jit
def attention_kernel(
    q_ptr,  # (B, Nq, H, D)
    k,  # (B, Nk, H, D), as is v; X and X_tail are descriptors, or a pointer and None
    k_tail,
    v,
    v_tail,
    out_ptr,  # out, (B, Nq, H, D) contiguous
    lse_ptr,  # out, fp32 (B, H, Nq) contiguous
    Nq,
    Nk,
    H,
    blocks,  # ceil(Nq / BM)
    scale_log2,  # scale · log2(e)
    q_sb,  # strides in units of VECTOR elements; those of descriptors are unused
    q_sn,
    q_sh,
    k_sb,
    k_sn,
    k_sh,
    v_sb,
    v_sn,
    v_sh,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,  # whether BN divides Nk
):
    q = (q_ptr, q_sb, q_sn, q_sh)
    k = (k, k_sb, k_sn, k_sh, k_tail)
    v = (v, v_sb, v_sn, v_sh, v_tail)
    b, h, block = _locate(H, blocks)
    first_m = block * BM
    acc_MD = tl.zeros([BM, MAIN], tl.float32)
    acc_MT = tl.zeros([BM, TAIL if TAIL > 0 else 1], tl.float32)
    l_M = tl.zeros([BM], tl.float32)
    m_M = tl.full([BM], -float("inf"), tl.float32)
    q_MD, q_MT = acc_MD, acc_MT
    if CHUNK == 0:
        q_MD, q_MT = _load_rows(q, b, h, first_m, Nq, BM, D, MAIN, TAIL, VECTOR, True)
    for first_n in range(0, Nk, BN):
        k_ND, k_NT, v_ND, v_NT = _load_tiles(
            k, v, b, h, first_n, Nk, BN, D, MAIN, TAIL, VECTOR, DESCRIPTORS, not EVEN
        )  # fmt: skip
        if CHUNK > 0:
            s_MN = _chunked_product(q, k, b, h, first_m, first_n, Nq, Nk, BM, BN, D, VECTOR, CHUNK)
        else:
            s_MN = _product(q_MD, q_MT, k_ND, k_NT, TAIL)
        if not EVEN:
            s_MN = tl.where((first_n + tl.arange(0, BN) < Nk)[None, :], s_MN, -float("inf"))
        new_m_M = tl.maximum(m_M, tl.max(s_MN, axis=1) * scale_log2)
        p_MN = tl.exp2(s_MN * scale_log2 - new_m_M[:, None])
        alpha_M = tl.exp2(m_M - new_m_M)
        l_M = l_M * alpha_M + tl.sum(p_MN, axis=1)
        m_M = new_m_M
        acc_MD *= alpha_M[:, None]
        if TAIL > 0:
            acc_MT *= alpha_M[:, None]
        acc_MD, acc_MT = _accumulate(p_MN, v_ND, v_NT, acc_MD, acc_MT, TAIL)
    row = first_m + tl.arange(0, BM)
    tl.store(lse_ptr + (b * H + h) * Nq + row, (m_M + tl.log2(l_M)) * 0.6931471805599453, mask=row < Nq)
    inverse_M1 = (1.0 / l_M)[:, None]
    _store_head(out_ptr, acc_MD * inverse_M1, acc_MT * inverse_M1, b, h, first_m, Nq, H, BM, D, MAIN, TAIL)


@triton.jit
def attention_query_gradient_kernel(
    grad_out_ptr,  # (B, Nq, H, D), as are out and q
    out_ptr,
    q_ptr,
    k,  # (B, Nk, H, D), as is v; X and X_tail are descriptors, or a pointer and None
    k_tail,
    v,
    v_tail,
    lse_ptr,  # fp32 (B, H, Nq) contiguous
    terms_ptr,  # out, fp32 (B·H, blocks · BM, 2) contiguous, for the next kernel: log2(e)·lse and delta of a query
    grad_q_ptr,  # out, (B, Nq, H, D)
    grad_pitch,  # heads from one of its tokens to the next
    Nq,
    Nk,
    H,
    blocks,  # ceil(Nq / BM)
    scale,
    scale_log2,
    grad_out_sb,  # strides in units of VECTOR elements; those of descriptors are unused
    grad_out_sn,
    grad_out_sh,
    out_sb,
    out_sn,
    out_sh,
    q_sb,
    q_sn,
    q_sh,
    k_sb,
    k_sn,
    k_sh,
    v_sb,
    v_sn,
    v_sh,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,  # whether BN divides Nk
):
    grad_out = (grad_out_ptr, grad_out_sb, grad_out_sn, grad_out_sh)
    out = (out_ptr, out_sb, out_sn, out_sh)
    q = (q_ptr, q_sb, q_sn, q_sh)
    k = (k, k_sb, k_sn, k_sh, k_tail)
    v = (v, v_sb, v_sn, v_sh, v_tail)
    b, h, block = _locate(H, blocks)
    first_m = block * BM
    row = first_m + tl.arange(0, BM)
    lse_M = tl.load(lse_ptr + (b * H + h) * Nq + row, mask=row < Nq, other=0.0) * 1.4426950408889634
    do_MD, do_MT = _load_rows(grad_out, b, h, first_m, Nq, BM, D, MAIN, TAIL, VECTOR, True)
    out_MD, out_MT = _load_rows(out, b, h, first_m, Nq, BM, D, MAIN, TAIL, VECTOR, True)
    q_MD, q_MT = do_MD, do_MT
    if CHUNK == 0:
        q_MD, q_MT = _load_rows(q, b, h, first_m, Nq, BM, D, MAIN, TAIL, VECTOR, True)
    delta_M = tl.sum(do_MD.to(tl.float32) * out_MD.to(tl.float32), axis=1)
    if TAIL > 0:
        delta_M += tl.sum(do_MT.to(tl.float32) * out_MT.to(tl.float32), axis=1)
    terms = terms_ptr + ((b * H + h) * blocks * BM + row[:, None]) * 2 + tl.arange(0, 2)[None, :]
    tl.store(terms, tl.join(lse_M, delta_M))

    dq_MD = tl.zeros([BM, MAIN], tl.float32)
    dq_MT = tl.zeros([BM, TAIL if TAIL > 0 else 1], tl.float32)
    for first_n in range(0, Nk, BN):
        k_ND, k_NT, v_ND, v_NT = _load_tiles(
            k, v, b, h, first_n, Nk, BN, D, MAIN, TAIL, VECTOR, DESCRIPTORS, not EVEN
        )  # fmt: skip
        if CHUNK > 0:
            s_MN = _chunked_product(q, k, b, h, first_m, first_n, Nq, Nk, BM, BN, D, VECTOR, CHUNK)
            dp_MN = _chunked_product(grad_out, v, b, h, first_m, first_n, Nq, Nk, BM, BN, D, VECTOR, CHUNK)
        else:
            s_MN = _product(q_MD, q_MT, k_ND, k_NT, TAIL)
            dp_MN = _product(do_MD, do_MT, v_ND, v_NT, TAIL)
        p_MN = tl.exp2(s_MN * scale_log2 - lse_M[:, None])
        if not EVEN:
            p_MN = tl.where((first_n + tl.arange(0, BN) < Nk)[None, :], p_MN, 0.0)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MD, dq_MT = _accumulate(ds_MN, k_ND, k_NT, dq_MD, dq_MT, TAIL)
    _store_head(grad_q_ptr, dq_MD * scale, dq_MT * scale, b, h, first_m, Nq, grad_pitch, BM, D, MAIN, TAIL)


@triton.jit
def attention_key_value_gradient_kernel(
    k_ptr,  # (B, Nk, H, D), as is v
    v_ptr,
    grad_out,  # (B, Nq, H, D), as is q; X and X_tail are descriptors, or a pointer and None
    grad_out_tail,
    q,
    q_tail,
    terms,  # the query gradient's, as (B·H, terms_pitch): a descriptor or a pointer
    grad_k_ptr,  # out, (B, Nk, H, D)
    grad_v_ptr,
    grad_pitch,  # heads from one of their tokens to the next
    Nq,
    Nk,
    H,
    blocks,  # ceil(Nk / BN)
    terms_pitch,
    scale,
    scale_log2,
    k_sb,  # strides in units of VECTOR elements; those of descriptors are unused
    k_sn,
    k_sh,
    v_sb,
    v_sn,
    v_sh,
    grad_out_sb,
    grad_out_sn,
    grad_out_sh,
    q_sb,
    q_sn,
    q_sh,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,  # whether BM divides Nq
):
    k = (k_ptr, k_sb, k_sn, k_sh)
    v = (v_ptr, v_sb, v_sn, v_sh)
    grad_out = (grad_out, grad_out_sb, grad_out_sn, grad_out_sh, grad_out_tail)
    q = (q, q_sb, q_sn, q_sh, q_tail)
    b, h, block = _locate(H, blocks)
    first_n = block * BN
    dk_ND = tl.zeros([BN, MAIN], tl.float32)
    dv_ND = tl.zeros([BN, MAIN], tl.float32)
    dk_NT = tl.zeros([BN, TAIL if TAIL > 0 else 1], tl.float32)
    dv_NT = tl.zeros([BN, TAIL if TAIL > 0 else 1], tl.float32)
    if CHUNK == 0:
        k_ND, k_NT = _load_rows(k, b, h, first_n, Nk, BN, D, MAIN, TAIL, VECTOR, True)
        v_ND, v_NT = _load_rows(v, b, h, first_n, Nk, BN, D, MAIN, TAIL, VECTOR, True)
    for first_m in range(0, Nq, BM):
        if DESCRIPTORS:
            pairs = terms.load([(b * H + h).to(tl.int32), first_m * 2])
        else:
            pairs = tl.load(terms + (b * H + h) * terms_pitch + first_m * 2 + tl.arange(0, 2 * BM))
        q_MD, q_MT, do_MD, do_MT = _load_tiles(
            q, grad_out, b, h, first_m, Nq, BM, D, MAIN, TAIL, VECTOR, DESCRIPTORS, not EVEN
        )  # fmt: skip
        lse_M, delta_M = tl.split(pairs.reshape([BM, 2]))
        if CHUNK > 0:
            s_NM = _chunked_product(k, q, b, h, first_n, first_m, Nk, Nq, BN, BM, D, VECTOR, CHUNK)
            dp_NM = _chunked_product(v, grad_out, b, h, first_n, first_m, Nk, Nq, BN, BM, D, VECTOR, CHUNK)
        else:
            s_NM = _product(k_ND, k_NT, q_MD, q_MT, TAIL)
            dp_NM = _product(v_ND, v_NT, do_MD, do_MT, TAIL)
        p_NM = tl.exp2(s_NM * scale_log2 - lse_M[None, :])
        dv_ND, dv_NT = _accumulate(p_NM, do_MD, do_MT, dv_ND, dv_NT, TAIL)
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_ND, dk_NT = _accumulate(ds_NM, q_MD, q_MT, dk_ND, dk_NT, TAIL)
    _store_head(grad_k_ptr, dk_ND * scale, dk_NT * scale, b, h, first_n, Nk, grad_pitch, BN, D, MAIN, TAIL)
    _store_head(grad_v_ptr, dv_ND, dv_NT, b, h, first_n, Nk, grad_pitch, BN, D, MAIN, TAIL)
