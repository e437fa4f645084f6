"""What a step of DDT-XL/2 costs at least on an H200, piece by piece: arithmetic from the cost functions of ddt_kernels.

Pieces are what FusedDDT runs, each at its floor: its FLOPs at the GEMM ceiling or its compulsory bytes at the copy
ceiling, whichever takes longer (`ddt_kernels.floors`). Overlap of pieces is not counted on, nor are launches. Left out,
each far below 1%: the time and label embeddings, and the sampler's own update.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import ddt_kernels as ops
from benchmarks.report.tables import table
from ddt_fast.config import DDTConfig
from ddt_fast.presets import PRESETS
from ddt_kernels import Cost
from ddt_kernels.floors import COPY_BYTES_PER_SECOND, GEMM_FLOPS_PER_SECOND, floor_seconds

DTYPE = torch.bfloat16
ENCODER, MODULATIONS, DECODER = "encoder", "modulations", "decoder"
SHAPES = (("256 px", "xl2_256", 128), ("512 px", "xl2_512", 32))  # (name, preset, images): 32,768 rows in both


@dataclass(frozen=True)
class Piece:
    """`count` calls of one kernel in one part of the model."""

    kind: str  # of work, a row of the table
    part: str  # ENCODER, MODULATIONS (all that the decoder derives from a state) or DECODER
    cost: Cost  # of one call
    count: int = 1

    @property
    def seconds(self) -> float:
        return self.count * floor_seconds(self.cost)

    @property
    def bound(self) -> str:
        gemm = self.cost.flops / GEMM_FLOPS_PER_SECOND
        return "GEMM" if gemm > self.cost.bytes_moved / COPY_BYTES_PER_SECOND else "memory"


def linear_cost(rows: int, inputs: int, outputs: int, weights: bool = True) -> Cost:
    """Of a GEMM, bias left out; weights: whether they are read from memory."""
    moved = rows * (inputs + outputs) + weights * inputs * outputs
    return Cost(moved * DTYPE.itemsize, 2 * rows * inputs * outputs)


def pieces(config: DDTConfig, batch: int, side: int) -> Iterator[Piece]:
    """Of a full forward of `batch` latents of `side` x `side`."""
    n, c, f = config.num_tokens(side, side), config.hidden_size, config.mlp_hidden_size
    rows, patch = batch * n, config.in_channels * config.patch_size**2
    heads = (batch, n, config.num_heads, config.head_dim)
    for part, blocks in ((ENCODER, config.num_encoder_blocks), (DECODER, config.num_decoder_blocks)):
        shape = (batch, n, c, DTYPE, part == DECODER)
        yield Piece("qkv and proj GEMMs", part, linear_cost(rows, c, 3 * c), blocks)
        yield Piece("qkv and proj GEMMs", part, linear_cost(rows, c, c), blocks)
        yield Piece("SwiGLU MLP", part, ops.swiglu_mlp_cost(batch, n, c, f, DTYPE), blocks)
        yield Piece("attention", part, ops.attention_cost(*heads, DTYPE), blocks)
        yield Piece("q, k norm and RoPE", part, ops.qk_norm_rope_cost(*heads, DTYPE, in_place=True), blocks)
        # The first of a half has no residual to add; the last residual is added after the last block.
        yield Piece("norm, residual", part, ops.gated_residual_rms_norm_modulate_cost(*shape), 2 * blocks - 1)
        yield Piece("norm, residual", part, ops.rms_norm_modulate_cost(*shape))
        yield Piece("embedders, final layer", part, linear_cost(rows, patch, c))
    # One GEMM before the loop makes the encoder's modulations of all steps: its weights are read once, not every step.
    encoder_rows = linear_cost(batch, c, 6 * config.num_encoder_blocks * c, weights=False)
    yield Piece("adaLN GEMM", ENCODER, encoder_rows)
    yield Piece("norm, residual", ENCODER, ops.gated_residual_cost(batch, n, c, DTYPE, False))
    yield Piece("adaLN GEMM", MODULATIONS, linear_cost(rows, c, (6 * config.num_decoder_blocks + 2) * c))
    yield Piece("norm, residual", DECODER, ops.gated_residual_layer_norm_modulate_cost(batch, n, c, DTYPE, True))
    yield Piece("embedders, final layer", DECODER, linear_cost(rows, c, patch))


def step_table(name: str, preset: str, batch: int) -> str:
    """Floors of a step that refreshes and of one that reuses a state, by kind of work, the most first."""
    refresh, reuse = defaultdict[str, float](float), defaultdict[str, float](float)
    bounds = defaultdict[str, set[str]](set)
    for piece in pieces(PRESETS[preset].model, batch, PRESETS[preset].data.sample_size):
        refresh[piece.kind] += piece.seconds
        reuse[piece.kind] += piece.seconds * (piece.part == DECODER)
        bounds[piece.kind].add(piece.bound)
    rows: list[list[object]] = []
    for kind in sorted(refresh, key=lambda kind: -refresh[kind]):
        rows.append([kind, " and ".join(sorted(bounds[kind]))])
        for seconds in (refresh, reuse):
            rows[-1] += [f"{1e3 * seconds[kind]:.2f}", f"{seconds[kind] / sum(seconds.values()):.1%}"]
    sums = [f"{1e3 * sum(seconds.values()):.2f}" for seconds in (refresh, reuse)]
    rows.append(["all", "", sums[0], "", sums[1], ""])
    head = f"XL/2, {name}, {batch} images, bf16 | bound by"
    return table(f"{head} | refresh step, ms | share | reuse step, ms | share", rows)


def paragraphs() -> Iterator[str]:
    yield (
        "**Arithmetic, not a measurement:** each piece at its floor on one H200, "
        f"{GEMM_FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s and {COPY_BYTES_PER_SECOND / 1e12:g} TB/s, one after the other. A "
        "refresh step is a full forward; a reuse step is the decoder on kept modulations."
    )
    yield from (step_table(*shape) for shape in SHAPES)
