# mypy: allow-untyped-defs, allow-untyped-decorators
"""The Triton kernels of swiglu; `swiglu_launch.py` launches them, `swiglu.py` is the operator.

    gate = x · w1ᵀ + b1,  up = x · w3ᵀ + b3,  y = silu(gate) · up          fp32 until the store
    dgate = dy · up · s·(1 + gate·(1 - s)),  dup = dy · gate · s           s = sigmoid(gate)
    dx = dgate · w1 + dup · w3,  dw1 = dgateᵀ · x,  dw3 = dupᵀ · x;  db1, db3 are the sums of dgate's and dup's rows
    of a whole MLP, z = y · w2ᵀ + b2:  dy = dz · w2,  dw2 = dzᵀ · y

Forward: one GEMM. A tile of x is multiplied by the same rows of w1 and w3, one below the other, into one accumulator,
[M, 2F]; a thread holds gate and up of the same elements, so the activation is the epilogue, in registers. F columns are
written, and (gate | up) packed, (M, 2F), if the backward pass will need it. w1 and w3 are read as one (2, F, C): in
place if they are the halves of one tensor, as in FusedDDT and in models that keep them together; else the launcher
copies them into one first, 28 MB of traffic at XL/2, 1% of this GEMM at 32K rows, and once more in the backward pass.

Keep or recompute? Per token at C = 1152, F = 3072 in bf16 on an H200; this is arithmetic from its ceilings
(790 TFLOP/s, 4.3 TB/s), not timings. The GEMMs that follow take 35.7 ns either way.

                       kept       forward          backward, before its GEMMs                      sum
    keep gate and up   12288 B    17.9 + 2.9 ns    7.1 ns: a pass over 5F columns                  63.6 ns
    recompute them         0 B    17.9 ns          17.9 to 22.2 ns: this GEMM again, its           71.5 to 75.8 ns
                                                   epilogue's 3F columns hidden or not

They are kept, because time is the scarcer resource: this saves 11 to 16% of the op for 344 KB per token over 28 blocks
(5.6 GB for 64 images of 256 px), where the rest of the network keeps about 1.1 MB. To save memory instead, put
torch.utils.checkpoint around the MLP, at the price of a second forward pass. The packed layout makes dx one GEMM over
2F with a single accumulation, and (dw1; dw3) another, both cuBLAS's, without a copy where w1 and w3 lie together.

swiglu_mlp does not keep y, F more columns that dw2 needs, nor does its backward pass write dy: the GEMM dz · w2 has dy
in its accumulators, reads gate and up in its epilogue, and writes dgate, dup and y. That moves 5F columns where a GEMM
and a pass over its result move 7F: 2.9 ns less per token, and the 7.1 that are left run beside 8.9 of multiplication.

Counted in the binary (sm_90, 128 x 128, bf16; triton 3.6 and 3.8 agree), then argued. An H200's SM does 2048 bf16
multiply-adds per cycle; L2 gives it at most 64 bytes, shared memory 128.
 - 64 channels of a forward tile are 4 wgmma 64 x 256 x 16 a warp group, 1024 cycles. They stay in flight until those of
   the next step are issued; the tensor cores are drained once, at a tile's end. A step has 4 barriers.
 - L2: 48 KB a step, 48 bytes a cycle; 128 x 64 would need 64. Shared memory: a wgmma reads 2 KB of x and 8 of weights
   in 128 cycles, 80 bytes a cycle; with an accumulator each for w1 and w3, x would be read twice: 96.
 - 128 x 128 is the widest tile Triton can hold: its accumulator is 128 of the 255 registers a thread can have, of 177.
   Programs stay on their SM and walk over the tiles in groups of GROUP tile rows, so that those running at one time
   read few distinct bytes (10 MB at XL/2), once from memory, then from L2. On sm_90 the ring of four stages and the
   32 KB staged for the stores take 229,408 of 232,448 bytes.
 - The loops over tiles and channels are one (flatten), so that the next tile's loads are in flight in the epilogue. On
   sm_100 it also alternates between two accumulators in tensor memory. It is off where y's rows are no multiple of 16
   bytes on these chips: stores by pointer then take the registers that it would need.
 - The epilogue's floor is the special-function unit: 2 instructions for each element of y (ex2, rcp), 16 a cycle, 2048
   cycles beside a tile's 18,432. Its `silu` errs by at most (4 + 0.62·|min(gate, 0)|) · 2^-23 of its value, or by
   1.1e-36, which it reaches below -87.3, where it is 0. (0.62·|gate| is the rounding of gate · log2 e.)
 - dz · w2: 128 x 128 needs 64 bytes a cycle from L2, but two programs fit on an SM (124 registers, 98,328 bytes), so
   that one multiplies while the other's epilogue waits for memory. 128 x 256 needs 48, and is alone. The epilogue
   takes a quarter of the columns at a time, for which its registers suffice.
 - From sm_90 on, tiles move by descriptor (TMA), in both directions, if the row pitch is a multiple of 16 bytes. sm_80
   has no TMA and uses pointers, whose loads become cp.async.

Tile suffixes: M rows of x, F columns of y (rows of w1 and w3), K channels.
"""

from ddt_kernels.runtime import _compiling, tl, triton

if _compiling:

    @triton.jit
    def _sigmoid(x):
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;  // -log2 e
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;  // 1
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )

else:

    @triton.jit
    def _sigmoid(x):
        return 1.0 / (1.0 + tl.exp2(x * -1.44269504))


@triton.jit
def _load_tile(
    source, row, col, rows, row_stride, COLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Rows past the end repeat the last one (and are never stored); columns past the end are zero, as dots require."""
    if DESCRIPTOR:
        tile = source.load([row, col])
    else:
        row_R = tl.minimum(row + tl.arange(0, BLOCK_R), rows - 1).to(tl.int64)
        col_C = col + tl.arange(0, BLOCK_C)
        pointers = source + row_R[:, None] * row_stride + col_C[None, :]
        tile = tl.load(pointers, mask=(col_C < COLS)[None, :], other=0.0)
    return tile


@triton.jit
def _load_pair(
    source, row, col, rows, half_stride, row_stride, COLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """The same rows of both halves of a (2, rows, COLS), one below the other: a tile of 2 · BLOCK_R rows."""
    if DESCRIPTOR:
        tile = tl.reshape(source.load([0, row, col]), [2 * BLOCK_R, BLOCK_C])
    else:
        i_R = tl.arange(0, 2 * BLOCK_R)
        row_R = tl.minimum(row + i_R % BLOCK_R, rows - 1).to(tl.int64) * row_stride
        row_R += (i_R // BLOCK_R).to(tl.int64) * half_stride
        col_C = col + tl.arange(0, BLOCK_C)
        tile = tl.load(source + row_R[:, None] + col_C[None, :], mask=(col_C < COLS)[None, :], other=0.0)
    return tile


@triton.jit
def _store_tile(
    target, row, col, rows, row_stride, tile, COLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    if DESCRIPTOR:
        target.store([row, col], tile.to(target.dtype))
    else:
        row_R = row + tl.arange(0, BLOCK_R)
        col_C = col + tl.arange(0, BLOCK_C)
        pointers = target + row_R.to(tl.int64)[:, None] * row_stride + col_C[None, :]
        tl.store(pointers, tile.to(target.dtype.element_ty), mask=(row_R < rows)[:, None] & (col_C < COLS)[None, :])


@triton.jit
def _origin(tile, tiles_m, TILES_F: tl.constexpr, GROUP: tl.constexpr):
    """Tile row and column: GROUP tile rows are walked together, one column of them after the other."""
    first = tile // (GROUP * TILES_F) * GROUP
    within = tile % (GROUP * TILES_F)
    group = tl.minimum(tiles_m - first, GROUP)
    return first + within % group, within // group


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a tile's columns, which the same thread holds."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLS // 2]), [0, 2, 1]))


@triton.jit
def _add_bias(tile, bias_ptr, col, COLS: tl.constexpr, BLOCK_C: tl.constexpr):
    if bias_ptr is not None:
        col_C = col + tl.arange(0, BLOCK_C)
        tile += tl.load(bias_ptr + col_C, mask=col_C < COLS, other=0.0).to(tl.float32)[None, :]
    return tile


@triton.jit
def swiglu_forward_kernel(
    x,  # (M, C), as are the others a descriptor or a pointer
    weights,  # (2, F, C): w1 and w3
    y,  # out, (M, F) contiguous
    gate,  # out, the halves of a contiguous (M, 2F); None if not KEEP
    up,
    b1_ptr,  # (F,) contiguous, or None
    b3_ptr,
    M,
    x_sm,
    weights_sh,
    weights_sf,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    LOAD_DESCRIPTORS: tl.constexpr,
    STORE_DESCRIPTORS: tl.constexpr,
    KEEP: tl.constexpr,
):
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_f: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    flatten: tl.constexpr = STORE_DESCRIPTORS or not LOAD_DESCRIPTORS
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_f, tl.num_programs(0), flatten=flatten):
        row, column = _origin(tile, tiles_m, tiles_f, GROUP)
        m, f = row * BLOCK_M, column * BLOCK_F
        both_MF = tl.zeros([BLOCK_M, 2 * BLOCK_F], tl.float32)
        for c in range(0, C, BLOCK_K):
            x_MK = _load_tile(x, m, c, M, x_sm, C, BLOCK_M, BLOCK_K, LOAD_DESCRIPTORS)
            weights_FK = _load_pair(weights, f, c, F, weights_sh, weights_sf, C, BLOCK_F, BLOCK_K, LOAD_DESCRIPTORS)
            both_MF = tl.dot(x_MK, weights_FK.T, both_MF, input_precision="tf32")

        gate_MF, up_MF = _halves(both_MF, BLOCK_M, 2 * BLOCK_F)
        gate_MF = _add_bias(gate_MF, b1_ptr, f, F, BLOCK_F)
        up_MF = _add_bias(up_MF, b3_ptr, f, F, BLOCK_F)
        if KEEP:
            _store_tile(gate, m, f, M, 2 * F, gate_MF, F, BLOCK_M, BLOCK_F, STORE_DESCRIPTORS)
            _store_tile(up, m, f, M, 2 * F, up_MF, F, BLOCK_M, BLOCK_F, STORE_DESCRIPTORS)
        y_MF = gate_MF * _sigmoid(gate_MF) * up_MF
        _store_tile(y, m, f, M, F, y_MF, F, BLOCK_M, BLOCK_F, STORE_DESCRIPTORS)


@triton.jit
def _activation_backward(grad, g, u, s):
    """The gradients of gate g and up u from that of y, and y itself; s = sigmoid(g)."""
    silu = g * s
    return grad * u * (s + silu * (1.0 - s)), grad * silu, silu * u


@triton.jit
def _store_gradients(
    grad_MF, gate_up_ptr, grad_gate_up_ptr, y_ptr, m, f, M, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The epilogue of `swiglu_mlp_backward_kernel` for BLOCK_F of its columns."""
    row_M = m + tl.arange(0, BLOCK_M)[:, None]
    col_F = f + tl.arange(0, BLOCK_F)[None, :]
    mask = (row_M < M) & (col_F < F)
    gate_MF = row_M.to(tl.int64) * (2 * F) + col_F
    g_MF = tl.load(gate_up_ptr + gate_MF, mask=mask, other=0.0).to(tl.float32)
    u_MF = tl.load(gate_up_ptr + gate_MF + F, mask=mask, other=0.0).to(tl.float32)
    grad_gate_MF, grad_up_MF, y_MF = _activation_backward(grad_MF, g_MF, u_MF, _sigmoid(g_MF))
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + row_M.to(tl.int64) * F + col_F, y_MF.to(dtype), mask=mask)
    tl.store(grad_gate_up_ptr + gate_MF, grad_gate_MF.to(dtype), mask=mask)
    tl.store(grad_gate_up_ptr + gate_MF + F, grad_up_MF.to(dtype), mask=mask)


@triton.jit
def swiglu_mlp_backward_kernel(
    grad_z,  # (M, OUT), as is w2 a descriptor or a pointer
    w2,  # (OUT, F)
    gate_up_ptr,  # (M, 2F) contiguous, as is the gradient
    grad_gate_up_ptr,  # out
    y_ptr,  # out, (M, F) contiguous
    M,
    grad_z_sm,
    w2_so,
    OUT: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """The gradient of y, which exists in registers only, becomes that of gate and up, a quarter of the columns at a
    time: what a quarter loads and stores takes the registers that the one before it leaves."""
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_f: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_f, tl.num_programs(0), flatten=FLATTEN):
        row, column = _origin(tile, tiles_m, tiles_f, GROUP)
        m, f = row * BLOCK_M, column * BLOCK_F
        grad_MF = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for o in range(0, OUT, BLOCK_K):
            grad_z_MK = _load_tile(grad_z, m, o, M, grad_z_sm, OUT, BLOCK_M, BLOCK_K, DESCRIPTORS)
            w2_KF = _load_tile(w2, o, f, OUT, w2_so, F, BLOCK_K, BLOCK_F, DESCRIPTORS)
            grad_MF = tl.dot(grad_z_MK, w2_KF, grad_MF)

        left_MF, right_MF = _halves(grad_MF, BLOCK_M, BLOCK_F)
        first_MF, second_MF = _halves(left_MF, BLOCK_M, BLOCK_F // 2)
        third_MF, fourth_MF = _halves(right_MF, BLOCK_M, BLOCK_F // 2)
        part: tl.constexpr = BLOCK_F // 4
        _store_gradients(first_MF, gate_up_ptr, grad_gate_up_ptr, y_ptr, m, f, M, F, BLOCK_M, part)
        _store_gradients(second_MF, gate_up_ptr, grad_gate_up_ptr, y_ptr, m, f + part, M, F, BLOCK_M, part)
        _store_gradients(third_MF, gate_up_ptr, grad_gate_up_ptr, y_ptr, m, f + 2 * part, M, F, BLOCK_M, part)
        _store_gradients(fourth_MF, gate_up_ptr, grad_gate_up_ptr, y_ptr, m, f + 3 * part, M, F, BLOCK_M, part)


@triton.jit
def swiglu_activation_kernel(
    gate_up_ptr,  # (M, 2F) contiguous
    y_ptr,  # out, (M, F) contiguous
    M,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """silu(gate) · up where another kernel computed gate and up. Blocks as in `swiglu_backward_kernel`."""
    tiles_f: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    row_M = (pid // tiles_f * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    col_F = (pid % tiles_f * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    mask = (row_M < M) & (col_F < F)
    g = tl.load(gate_up_ptr + row_M * (2 * F) + col_F, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up_ptr + row_M * (2 * F) + col_F + F, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row_M * F + col_F, (g * _sigmoid(g) * u).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    grad_y_ptr,  # (M, F) contiguous
    gate_up_ptr,  # (M, 2F) contiguous, as is the gradient
    grad_gate_up_ptr,
    y_ptr,  # out, (M, F) contiguous, may be grad_y_ptr; None to skip y
    M,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Bound by memory: five columns of F cross once, six with y. Column blocks are neighbours in the grid, so rows
    stream. The same thread reads and writes an element, so y may overwrite grad_y."""
    tiles_f: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    row_M = (pid // tiles_f * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    col_F = (pid % tiles_f * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    mask = (row_M < M) & (col_F < F)
    gate_MF = row_M * (2 * F) + col_F
    grad = tl.load(grad_y_ptr + row_M * F + col_F, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_up_ptr + gate_MF, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up_ptr + gate_MF + F, mask=mask, other=0.0).to(tl.float32)
    grad_gate, grad_up, y = _activation_backward(grad, g, u, _sigmoid(g))
    dtype = grad_gate_up_ptr.dtype.element_ty
    tl.store(grad_gate_up_ptr + gate_MF, grad_gate.to(dtype), mask=mask)
    tl.store(grad_gate_up_ptr + gate_MF + F, grad_up.to(dtype), mask=mask)
    if y_ptr is not None:
        tl.store(y_ptr + row_M * F + col_F, y.to(dtype), mask=mask)
