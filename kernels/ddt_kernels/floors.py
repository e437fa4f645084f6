"""`python -m ddt_kernels.floors`: the least time each op can take on an H200, at the shapes of DDT-XL/2.

Prints a Markdown table computed from the cost functions and two measured ceilings of the chip. It is arithmetic, not a
measurement: it runs no op and needs no GPU.
"""

from collections.abc import Iterator

import torch

import ddt_kernels as ops
from ddt_kernels.cost import Cost

COPY_BYTES_PER_SECOND = 4.3e12  # measured on an H200: device-to-device copy
GEMM_FLOPS_PER_SECOND = 790e12  # measured on an H200: bf16 GEMM
CHANNELS, HEADS, HEAD_DIM, WIDTH = 1152, 16, 72, 3072
BATCH, TOKENS = 128, 256  # 32K rows; 256 px


def floor_seconds(cost: Cost) -> float:
    """The least time any implementation can take: memory or tensor cores, whichever is slower."""
    return max(cost.bytes_moved / COPY_BYTES_PER_SECOND, cost.flops / GEMM_FLOPS_PER_SECOND)


def costs() -> Iterator[tuple[str, str, Cost]]:
    """(op, case, cost) of every op, in bf16."""
    dtype, norm_shape = torch.bfloat16, (BATCH, TOKENS, CHANNELS)
    norms = {
        "rms_norm_modulate": ops.rms_norm_modulate_cost,
        "layer_norm_modulate": ops.layer_norm_modulate_cost,
        "gated_residual_rms_norm_modulate": ops.gated_residual_rms_norm_modulate_cost,
        "gated_residual_layer_norm_modulate": ops.gated_residual_layer_norm_modulate_cost,
    }
    for name, norm_cost in (*norms.items(), ("gated_residual", ops.gated_residual_cost)):
        for per_token, granularity in ((False, "per sample"), (True, "per token")):
            for backward, direction in ((False, "forward"), (True, "backward")):
                yield name, f"{granularity}, {direction}", norm_cost(*norm_shape, dtype, per_token, backward)
    for name, forecast_cost in norms.items():
        yield name, "per token, forecast from 2", forecast_cost(*norm_shape, dtype, True, history=2)
    heads = (BATCH, TOKENS, HEADS, HEAD_DIM)
    yield "qk_norm_rope_", "in place", ops.qk_norm_rope_cost(*heads, dtype, in_place=True)
    yield "qk_norm_rope", "forward", ops.qk_norm_rope_cost(*heads, dtype)
    yield "qk_norm_rope", "backward", ops.qk_norm_rope_cost(*heads, dtype, backward=True)
    for name, mlp_cost in (("swiglu", ops.swiglu_cost), ("swiglu_mlp", ops.swiglu_mlp_cost)):
        yield name, "forward, inference", mlp_cost(*norm_shape, WIDTH, dtype)
        yield name, "forward, training", mlp_cost(*norm_shape, WIDTH, dtype, training=True)
        yield name, "backward", mlp_cost(*norm_shape, WIDTH, dtype, backward=True)
    for batch, tokens in ((BATCH, TOKENS), (BATCH // 4, 4 * TOKENS)):
        for backward, direction in ((False, "forward"), (True, "backward")):
            cost = ops.attention_cost(batch, tokens, HEADS, HEAD_DIM, dtype, backward)
            yield "attention", f"N {tokens}, {direction}", cost
    for backward, direction in ((False, "forward"), (True, "backward")):
        yield "qkv_attention", f"N {TOKENS}, {direction}", ops.qkv_attention_cost(*heads, dtype, backward)
    latents = (BATCH, 4, 32, 32)
    yield "guided_step", "Euler, guided", ops.guided_step_cost(*latents, dtype)
    yield "guided_step", "4 velocities, 4 differences", ops.guided_step_cost(*latents, dtype, True, 3, 3)


def table() -> str:
    """The floors as a Markdown table."""
    lines = ["| op | case | MB | GFLOP | floor, µs | bound by |", "|---|---|---|---|---|---|"]
    for name, case, cost in costs():
        memory = cost.bytes_moved / COPY_BYTES_PER_SECOND >= cost.flops / GEMM_FLOPS_PER_SECOND
        size = f"{cost.bytes_moved / 1e6:.1f} | {cost.flops / 1e9:.2f} | {floor_seconds(cost) * 1e6:.1f}"
        lines.append(f"| `{name}` | {case} | {size} | {'memory' if memory else 'tensor cores'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
