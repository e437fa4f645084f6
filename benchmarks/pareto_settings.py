"""The settings that `benchmarks.pareto` compares, and how tables call them and their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ddt_fast.config import SamplingConfig, Solver, StateForecast
from ddt_fast.presets import PRESETS
from ddt_fast.sampling.fast import fast_settings

MEASURES = {"error": "error", "error_median": "median", "error_p90": "90%"}
"""Of samples' distances from the truth: the names in `digits_runs.SampleErrors`, and in tables."""

PUBLISHED = PRESETS["xl2_256"].sampling
BASE = replace(PUBLISHED, last_step=None)
"""Even steps: the published last one is ten times as long as the others, for the solver's error alone a bad choice."""

STEPS = (10, 15, 25, 35, 55, 105, 245)
SOLVERS: tuple[tuple[Solver, int], ...] = (("euler", 2), ("lms", 2), ("lms", 3), ("lms", 4))
"""And their orders, which Euler does not read."""

FORECASTS: tuple[StateForecast, ...] = ("linear", "quadratic")
PERIODS = (2, 3, 4, 6, 10, 16)
"""Of the encoder and of guidance."""

MANY_STEPS = 40
"""Beyond which shortcuts are tried with order 3 alone: there orders differ little, and Euler's own error hides a
shortcut's."""


def grid(steps: Sequence[int]) -> Iterator[SamplingConfig]:
    """Every solver with everything evaluated, and with shortcuts."""
    for count in steps:
        for solver, order in SOLVERS:
            config = replace(BASE, num_steps=count, solver=solver, order=order)
            yield config
            if count <= MANY_STEPS or (solver, order) == ("lms", 3):
                yield from shortcuts(config)


def shortcuts(config: SamplingConfig) -> Iterator[SamplingConfig]:
    """The encoder, guidance, or both at every K-th step; where both, guidance one notch more rarely, or as often."""
    # Too few refreshes are all noise; where there are very many, the next period does as well for less.
    periods = [p for p in PERIODS if 5 <= config.num_steps / p <= 45]
    few_steps = config.num_steps <= MANY_STEPS
    for i, period in enumerate(periods):
        if few_steps:
            if i == 0:
                # Held values are here for comparison: they lose to forecast ones at every period.
                yield replace(config, refresh_every=period)
                yield replace(config, guidance_every=period)
            yield replace(config, guidance_every=period, guidance_forecast="linear")
        for forecast in FORECASTS:
            once = replace(config, refresh_every=period, state_forecast=forecast)
            yield once
            for guidance in periods[i : i + 2] if few_steps else periods[i + 1 : i + 2]:
                yield replace(once, guidance_every=guidance, guidance_forecast="linear")


def named() -> Iterator[tuple[str, SamplingConfig]]:
    """What people run: as published, the paper's sharing, and --fast."""
    yield "published", PUBLISHED
    yield "published, K 2 held", replace(PUBLISHED, refresh_every=2)
    for steps in (250, 100, 50):
        yield f"--fast, Euler {steps}", fast_settings(replace(PUBLISHED, num_steps=steps))
    for steps in (50, 25):
        config = replace(BASE, num_steps=steps, solver="lms", order=2)
        yield f"multistep 2, {steps}", config
        yield f"--fast, multistep 2, {steps}", fast_settings(config)


def label(config: SamplingConfig) -> str:
    """A setting in a few words."""
    solver = "Euler" if config.solver == "euler" else f"multistep {config.order}"
    words = [solver, f"{config.num_steps} steps"]
    if config.refresh_every > 1:
        words.append(f"K {config.refresh_every} {config.state_forecast}")
    if config.guidance_every > 1:
        words.append(f"M {config.guidance_every} {config.guidance_forecast}")
    return ", ".join(words)
