"""Settings for a budget of FLOPs: as many steps of solver "pec" as it affords, by a table measured on the digits model.

`python -m benchmarks.pareto` measures the table. With this solver, steps that evaluate everything are at least as near
to the ODE's solution as more steps that share states or guidance differences, at the same cost.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ddt_fast.config import DDTConfig, SamplingConfig

BUDGETS_FILE = Path(__file__).parents[1] / "assets" / "sampling" / "budgets.json"
FAST_SUMMARY = "21 steps of solver pec, order 3, about 10 TFLOP an image at XL/2, 256 px, in place of 111"


def fast_settings(config: SamplingConfig) -> SamplingConfig:
    """`config` with what the table has for 10 TFLOP at XL/2, 256 px; guidance and timeshift stay.

    Tested on the digits model (`budget_table`); there is no ImageNet FID yet.
    """
    return corrected_steps(config, 21, 3)


def settings_within(
    config: SamplingConfig, model: DDTConfig, height: int, width: int, tflop: float
) -> tuple[SamplingConfig, str]:
    """`config` with the steps that have the least error of those within a budget, and what to expect of them, in words.

    The error is the one measured at the nearest guidance scale of the table; costs are this model's.

    Args:
        config: guidance and timeshift are kept.
        model: the model that samples.
        height, width: size of the model's input.
        tflop: the most TFLOP per image.

    Raises:
        ValueError: the budget affords nothing in the table.
    """
    from ddt_fast.sampling.plan import SamplingPlan  # imports torch

    table = budget_table()
    nearest = min(
        {row["guidance_scale"] for row in table["rows"]}, key=lambda scale: abs(scale - config.guidance_scale)
    )
    costs = []
    for row in table["rows"]:
        if row["guidance_scale"] == nearest:
            plan = SamplingPlan.from_config(corrected_steps(config, row["num_steps"], row["order"]))
            costs.append((plan.flops(model, height, width) / 1e12, row))
    affordable = [(cost, row) for cost, row in costs if cost <= tflop]
    if not affordable:
        least = min(cost for cost, _ in costs)
        raise ValueError(
            f"budget is {tflop:g} TFLOP an image; allowed: {least:.3g} or more with this model and guidance"
        )
    cost, row = min(affordable, key=lambda option: (option[1]["error"], option[0]))
    chosen = corrected_steps(config, row["num_steps"], row["order"])
    return chosen, (
        f"{describe(chosen)}: {cost:.3g} TFLOP an image. On the digits model at guidance {nearest:g}: error "
        f"{row['error']:.2g} of all samples, {row['error_median']:.2g} in median ({table['evidence']})"
    )


@cache
def budget_table() -> dict[str, Any]:
    """rows: guidance_scale, num_steps and order of runs in (0.3, 1), with their errors against the ODE's solution, as
    `benchmarks.sampler_errors` defines them; evidence: how they were measured, in words."""
    table: dict[str, Any] = json.loads(BUDGETS_FILE.read_text())
    return table


def describe(config: SamplingConfig) -> str:
    """The steps of solver "pec" in words."""
    low, high = config.guidance_interval
    edges = [f"{bound:g}" for bound in (low, high) if 0 < bound < 1 and config.guidance_scale != 1]
    return f"{config.num_steps} steps of solver pec, order {config.order}" + (
        f", with an edge at {' and '.join(edges)}, encoder and guidance at every step" if edges else ""
    )


def corrected_steps(config: SamplingConfig, num_steps: int, order: int) -> SamplingConfig:
    """`config` with so many steps of solver "pec", each evaluating everything; guidance and timeshift stay."""
    whole: dict[str, Any] = {"refresh_every": 1, "refresh_steps": None, "num_refreshes": None, "state_forecast": "hold"}
    whole |= {"guidance_every": 1, "guidance_forecast": "hold", "schedule": None}
    return replace(config, solver="pec", num_steps=num_steps, order=order, **whole)
