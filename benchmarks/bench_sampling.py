"""Sampling runs from noise to latents: images per second, and seconds for one image.

The baseline is the plain DDT run as published, both branches at every step; then come the exact saving (no
unconditional branch outside the guidance interval), FusedDDT, encoder sharing every 6th step or where dynamic
programming puts as many refreshes, the recommended shortcut (`--fast`), eagerly, compiled, and as CUDA graphs.

Every run is verified against the plain DDT's with the same settings, by what was added to the noise. (In the run's own
dtype: on a GPU an fp32 run of XL/2 would take minutes.) Weights are random, so this says nothing about what a shortcut
costs in quality: `benchmarks.forecast` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from benchmarks.harness import DEVICE, DTYPE, NEEDS_GPU, ON_GPU, Case, Inputs, Run, Variant, Workload, dtype_name
from benchmarks.models import PUBLISHED, Model, lively_std, published_run, random_model
from ddt_fast.config import DDTConfig, SamplingConfig
from ddt_fast.model import FusedDDT
from ddt_fast.model.flops import model_flops
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.fast import fast_settings
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.refresh import resolve_refresh_steps
from ddt_kernels import Cost

TINY = DDTConfig(4, 2, 192, 6, 6, 4, num_classes=1000)
TOLERANCE = 0.03 if ON_GPU else 1e-4
BASELINE = "DDT, both branches always"
SETTINGS: dict[str, Callable[[SamplingConfig], SamplingConfig]] = {
    "refresh 1": lambda config: config,
    "refresh 6": lambda config: replace(config, refresh_every=6),
    "refresh dp": lambda config: replace(config, refresh_steps="dp", num_refreshes=-(-config.num_steps // 6)),
    "--fast": fast_settings,
}
EAGER = (BASELINE, "DDT, refresh 1, eager", *(f"FusedDDT, {setting}, eager" for setting in SETTINGS))
ALL = (*EAGER, *(f"FusedDDT, {setting}, CUDA graphs" for setting in SETTINGS))
COMPILED = ("FusedDDT, refresh 1, torch.compile",)
HEADLINE = (BASELINE, *(f"FusedDDT, {setting}, CUDA graphs" for setting in ("refresh 1", "refresh 6", "--fast")))


def sampling_case(
    name: str,
    model: DDTConfig,
    side: int,
    batch: int,
    num_steps: int,
    variants: tuple[str, ...] = ALL,
    rounds: int = 3,
) -> Case:
    """Runs of one length: guidance in (0.3, 1), Euler."""
    base = replace(PUBLISHED, num_steps=num_steps)
    base = base if num_steps >= 50 else replace(base, last_step=None)

    def inputs() -> Inputs:
        noise, _ = seeded_noise(range(batch), (4, side, side))
        return Inputs((noise.to(DEVICE), torch.arange(batch, device=DEVICE) % model.num_classes))

    def build() -> Workload:
        reference = random_model(model, lively_std(model), DEVICE).to(DTYPE)
        fused = FusedDDT.from_reference(reference)
        weights = sum(p.numel() * p.element_size() for p in reference.parameters())

        @cache
        def settings(name: str) -> SamplingConfig:
            return resolve_refresh_steps(fused, SETTINGS[name](base), side, side)

        @cache
        def expected(name: str) -> Tensor:
            return Sampler(reference, settings(name), batch, side, side)(*inputs().tensors)

        def variant(name: str) -> Variant | str:
            if name == BASELINE:
                flops = 2 * num_steps * model_flops(model, side, side).total
                return Variant(
                    lambda: published,
                    check=added,
                    expected=lambda x: [expected("refresh 1") - x.tensors[0]],
                    cost=Cost(weights, batch * flops),
                )
            kind, setting, engine = name.split(", ")
            if engine == "CUDA graphs" and not ON_GPU:
                return NEEDS_GPU
            plan = SamplingPlan.from_config(settings(setting))
            return Variant(
                lambda: runner(fused if kind == "FusedDDT" else reference, settings(setting), engine),
                ours=kind == "FusedDDT",
                check=added,
                expected=lambda x: [expected(setting) - x.tensors[0]],
                cost=Cost(weights, batch * plan.flops(model, side, side)),
                note=f"{plan.network_evaluations} network and {plan.encoder_evaluations} encoder evaluations per image",
            )

        def published(x: Inputs) -> Sequence[Tensor]:
            noise, labels = x.tensors
            return [published_run(reference, noise, labels, base)]

        def runner(model: Model, config: SamplingConfig, engine: str) -> Run:
            config = replace(config, cuda_graphs=engine == "CUDA graphs")
            sampler = Sampler(model, config, batch, side, side, compile_model=engine == "torch.compile")
            return lambda x: [sampler(*x.tensors)]

        made = {name: variant(name) for name in variants}
        return Workload(inputs, made, None, DTYPE, images=batch, tolerance=TOLERANCE)

    what = "one image" if batch == 1 else "throughput"
    return Case(
        "sampling", what, f"{name} B {batch}, {num_steps} steps, {dtype_name(DTYPE)}", variants, build, rounds=rounds
    )


def added(run: Run, x: Inputs) -> Sequence[Tensor]:
    """What a run added to the noise."""
    return [samples - x.tensors[0] for samples in run(x)]


def sampling_cases() -> Iterator[Case]:
    """The most wanted first: time may run out."""
    if not ON_GPU:
        yield sampling_case("tiny, 4+2 blocks, C 192, 16x16 latents,", TINY, 16, 4, 16, (*ALL, *COMPILED))
        yield sampling_case("tiny, 4+2 blocks, C 192, 16x16 latents,", TINY, 16, 1, 24)
        return
    xl2 = PRESETS["xl2_256"].model
    yield sampling_case("XL/2 256 px", xl2, 32, 16, 250, HEADLINE, rounds=2)
    yield sampling_case("XL/2 256 px", xl2, 32, 1, 250, HEADLINE)
    yield sampling_case("XL/2 256 px", xl2, 32, 32, 50)
    yield sampling_case("XL/2 256 px", xl2, 32, 1, 50)
    yield sampling_case("XL/2 512 px", xl2, 64, 8, 50, HEADLINE)
    yield sampling_case("XL/2 256 px, compiled,", xl2, 32, 32, 25, (BASELINE, *COMPILED))


CASES = list(sampling_cases())


def test_sampling(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
