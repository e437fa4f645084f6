# mypy: allow-untyped-defs, allow-untyped-decorators
"""The Triton kernels of swiglu; `swiglu_launch.py` launches them, `swiglu.py` is the operator.

    gate = x · w1ᵀ,  up = x · w3ᵀ,  y = silu(gate) · up                    fp32 until the store
    dgate = dy · up · s·(1 + gate·(1 - s)),  dup = dy · gate · s           s = sigmoid(gate)
    dx = dgate · w1 + dup · w3,  dw1 = dgateᵀ · x,  dw3 = dupᵀ · x
    of a whole MLP, z = y · w2ᵀ:  dy = dz · w2,  dw2 = dzᵀ · y

Forward: one dual GEMM. A tile of x is loaded once and multiplied into two accumulators; the activation is the epilogue;
F columns are written, and (gate | up) packed, (M, 2F), if the backward pass will need it.

Keep or recompute? Per token at C = 1152, F = 3072 in bf16 on an H200; this is arithmetic from its ceilings
(790 TFLOP/s, 4.3 TB/s), not timings. The GEMMs that follow take 35.7 ns either way.

                       kept       forward          backward, before its GEMMs                      sum
    keep gate and up   12288 B    17.9 + 2.9 ns    7.1 ns: a pass over 5F columns                  63.6 ns
    recompute them         0 B    17.9 ns          17.9 to 22.2 ns: this GEMM again, its           71.5 to 75.8 ns
                                                   epilogue's 3F columns hidden or not

They are kept, because time is the scarcer resource: this saves 11 to 16% of the op for 344 KB per token over 28 blocks
(5.6 GB for 64 images of 256 px), where the rest of the network keeps about 1.1 MB. To save memory instead, put
torch.utils.checkpoint around the MLP, at the price of a second forward pass. The packed layout makes dx one GEMM over
2F with a single accumulation, and (dw1; dw3) another, both cuBLAS's. They need w1 and w3 stacked; that copy moves
28 MB, 2% of dx's time at 16K rows, less than rereading dx in a second GEMM, and rounds once less.

swiglu_mlp does not keep y, F more columns that dw2 needs: the backward kernel has gate and up in registers, and writes
y over dy, which no other program reads. That is one more store in a pass of five columns, 1.4 ns per token, for 172 KB.

Why the forward looks like this (an H200's SM does 2048 bf16 multiply-adds per cycle; L2 gives it at most 64 bytes):
 - 128 x 128 twice is the widest tile Triton can hold: its two accumulators are 128 of a thread's 255 registers, as in
   a plain 128 x 256 GEMM. 64 channels of it are 1024 cycles and 48 KB, 48 bytes a cycle; 128 x 64 would need 64.
 - Programs stay on their SM and walk over the tiles in groups of GROUP tile rows, so that those running at one time
   read few distinct bytes (10 MB at XL/2), once from memory, then from L2. On sm_90 the ring of four stages and the
   32 KB staged for the stores take 229,408 of 232,448 bytes.
 - FLATTEN fuses the two loops, so that the next tile's first loads are in flight during the epilogue. On sm_100 it also
   alternates between two pairs of accumulators in tensor memory; on sm_80 it keeps the kernel from spilling. It is off
   where wgmma is used (sm_90): in the fused loop the compiler waits for the two accumulators one after the other, and
   ptxas (advisory C7515) then drains the tensor cores after every single wgmma. A test reads that off the binary.
   The price: about 1000 of a tile's 22,000 cycles, in which the ring refills.
 - From sm_90 on, tiles move by descriptor (TMA), in both directions, if the row pitch is a multiple of 16 bytes. sm_80
   has no TMA and uses pointers, whose loads become cp.async; odd pitches use pointers everywhere.

Tile suffixes: M rows of x, F columns of y (rows of w1 and w3), K channels.
"""

from ddt_kernels.runtime import tl, triton


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
def swiglu_forward_kernel(
    x,  # (M, C), as are the others a descriptor or a pointer
    w1,  # (F, C)
    w3,
    y,  # out, (M, F) contiguous
    gate,  # out, the halves of a contiguous (M, 2F); None if not KEEP
    up,
    M,
    x_sm,
    w1_sf,
    w3_sf,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    LOAD_DESCRIPTORS: tl.constexpr,
    STORE_DESCRIPTORS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_f: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_f, tl.num_programs(0), flatten=FLATTEN):
        first = tile // (GROUP * tiles_f) * GROUP
        within = tile % (GROUP * tiles_f)
        group = tl.minimum(tiles_m - first, GROUP)
        m = (first + within % group) * BLOCK_M
        f = within // group * BLOCK_F

        gate_MF = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        up_MF = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for c in range(0, C, BLOCK_K):
            x_MK = _load_tile(x, m, c, M, x_sm, C, BLOCK_M, BLOCK_K, LOAD_DESCRIPTORS)
            w1_FK = _load_tile(w1, f, c, F, w1_sf, C, BLOCK_F, BLOCK_K, LOAD_DESCRIPTORS)
            w3_FK = _load_tile(w3, f, c, F, w3_sf, C, BLOCK_F, BLOCK_K, LOAD_DESCRIPTORS)
            gate_MF = tl.dot(x_MK, w1_FK.T, gate_MF, input_precision=PRECISION)
            up_MF = tl.dot(x_MK, w3_FK.T, up_MF, input_precision=PRECISION)

        if KEEP:
            _store_tile(gate, m, f, M, 2 * F, gate_MF, F, BLOCK_M, BLOCK_F, STORE_DESCRIPTORS)
            _store_tile(up, m, f, M, 2 * F, up_MF, F, BLOCK_M, BLOCK_F, STORE_DESCRIPTORS)
        y_MF = gate_MF / (1.0 + tl.exp(-gate_MF)) * up_MF
        _store_tile(y, m, f, M, F, y_MF, F, BLOCK_M, BLOCK_F, STORE_DESCRIPTORS)


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
    s = 1.0 / (1.0 + tl.exp(-g))
    dtype = grad_gate_up_ptr.dtype.element_ty
    tl.store(grad_gate_up_ptr + gate_MF, (grad * u * s * (1.0 + g * (1.0 - s))).to(dtype), mask=mask)
    tl.store(grad_gate_up_ptr + gate_MF + F, (grad * g * s).to(dtype), mask=mask)
    if y_ptr is not None:
        tl.store(y_ptr + row_M * F + col_F, (g * s * u).to(dtype), mask=mask)
