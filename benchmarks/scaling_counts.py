"""Exact counts, from the plan and the shapes: what sampling costs as images, batches, depth and refresh periods grow.

Floors are FLOPs at a stated GEMM ceiling, times that nothing can go below on such a device; nothing here is measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ddt_fast.config import DDTConfig
from ddt_fast.model import DDT
from ddt_fast.model.flops import model_flops
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling.fast import fast_settings

XL2 = PRESETS["xl2_256"].model
PUBLISHED = PRESETS["xl2_256"].sampling
PLANS = {
    "published": SamplingPlan.from_config(PUBLISHED),
    "K 6": SamplingPlan.from_config(replace(PUBLISHED, refresh_every=6)),
    "--fast": SamplingPlan.from_config(fast_settings(PUBLISHED)),
}
LATENT = 8
"""Pixels a latent."""

IMAGE_SIZES = (128, 256, 512, 1024)
BATCHES = (1, 4, 16, 64, 256)
REFRESHES = (1, 2, 3, 4, 6, 10, 16)
DTYPE = torch.bfloat16

Row = dict[str, Any]


def num_parameters(config: DDTConfig) -> int:
    """Of the model, without making any."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DDT(config).parameters())


def attention_flops(config: DDTConfig, height: int, width: int) -> int:
    """Of one forward: what grows with the square of the tokens."""
    return 4 * config.num_blocks * config.num_tokens(height, width) ** 2 * config.hidden_size


def by_image_size(ceiling: float) -> list[Row]:
    """XL/2 over the side of the image; `ceiling` in FLOP/s."""
    rows = []
    for pixels in IMAGE_SIZES:
        side = pixels // LATENT
        forward = model_flops(XL2, side, side).total
        row: Row = {
            "image_size": pixels,
            "tokens": XL2.num_tokens(side, side),
            "gflop_per_forward": forward / 1e9,
            "attention_share": attention_flops(XL2, side, side) / forward,
        }
        for name, plan in PLANS.items():
            flops = plan.flops(XL2, side, side)
            row |= {f"tflop_per_image {name}": flops / 1e12, f"floor_seconds_per_image {name}": flops / ceiling}
            row[f"cache_megabytes_per_image {name}"] = plan.cache_bytes(XL2, side, side, DTYPE) / 1e6
        rows.append(row)
    return rows


def by_batch(ceiling: float, bandwidth: float) -> list[Row]:
    """XL/2 at 256 px over the batch, for one full forward of a guidance pair; `bandwidth` in bytes/s."""
    weights = num_parameters(XL2) * DTYPE.itemsize
    forward = 2 * model_flops(XL2, 32, 32).total
    rows = []
    for batch in BATCHES:
        compute, read = batch * forward / ceiling, weights / bandwidth
        row: Row = {
            "batch": batch,
            "weights_gigabytes": weights / 1e9,
            "tflop_per_pair": batch * forward / 1e12,
            "compute_floor_seconds": compute,
            "weights_read_seconds": read,
            "weights_read_share": read / compute,
        }
        for name, plan in PLANS.items():
            row[f"cache_gigabytes {name}"] = batch * plan.cache_bytes(XL2, 32, 32, DTYPE) / 1e9
        rows.append(row)
    return rows


def by_depth(ceiling: float) -> list[Row]:
    """The paper's sizes at 256 px, and XL/2 of half and of twice the blocks."""
    models = {
        "B/2": PRESETS["b2_256"].model,
        "L/2": PRESETS["l2_256"].model,
        "XL/2, 11 + 3": replace(XL2, num_blocks=14, num_encoder_blocks=11),
        "XL/2": XL2,
        "XL/2, 44 + 12": replace(XL2, num_blocks=56, num_encoder_blocks=44),
    }
    rows = []
    for name, config in models.items():
        cost = model_flops(config, 32, 32)
        row: Row = {
            "model": name,
            "blocks": f"{config.num_encoder_blocks} + {config.num_decoder_blocks}",
            "parameters": num_parameters(config),
            "gflop_per_forward": cost.total / 1e9,
            "encoder_share": cost.encoder / cost.total,
        }
        for plan_name, plan in PLANS.items():
            flops = plan.flops(config, 32, 32)
            row[f"tflop_per_image {plan_name}"] = flops / 1e12
            row[f"floor_seconds_per_image {plan_name}"] = flops / ceiling
        rows.append(row)
    return rows


def by_refresh(ceiling: float) -> list[Row]:
    """XL/2 at 256 px, 250 steps, the encoder at every K-th, states held."""
    rows = []
    for every in REFRESHES:
        plan = SamplingPlan.from_config(replace(PUBLISHED, refresh_every=every))
        flops = plan.flops(XL2, 32, 32)
        rows.append(
            {
                "refresh_every": every,
                "network_evaluations": plan.network_evaluations,
                "encoder_evaluations": plan.encoder_evaluations,
                "tflop_per_image": flops / 1e12,
                "of_every_step": flops / PLANS["published"].flops(XL2, 32, 32),
                "floor_seconds_per_image": flops / ceiling,
            }
        )
    return rows
