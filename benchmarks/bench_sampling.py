"""Sampling runs from noise to latents: images per second, and seconds for one image.

The baseline is the plain DDT run as published, both branches at every step; then come the exact saving (no
unconditional branch outside the guidance interval), FusedDDT, encoder sharing every 6th step or where dynamic
programming puts as many refreshes, the steps of `--fast`, eagerly, compiled, and as CUDA graphs.

On a GPU runs are short: `benchmarks.headline` has the times of long ones.

Every run is verified against the plain DDT's with the same settings, by what was added to the noise. (In the run's own
dtype: on a GPU an fp32 run of XL/2 would take minutes.) Weights are random, so this says nothing about what a shortcut
costs in quality: `benchmarks.forecast` does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.harness import DEVICE, DTYPE, ON_GPU, Case, Inputs, Run, Variant, Workload, forward
from benchmarks.models import PUBLISHED, lively_std, published_run, random_model, weight_bytes
from ddt_fast.config import DDTConfig, SamplingConfig
from ddt_fast.device import dtype_name
from ddt_fast.model import FusedDDT
from ddt_fast.model.flops import model_flops
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.budgets import fast_settings
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.refresh.schedules import resolve_refresh_steps
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


class Runs:
    """Runs of one length on one batch: guidance in (0.3, 1), Euler. A variant is called "MODEL, SETTING, ENGINE"."""

    def __init__(self, config: DDTConfig, side: int, batch: int, num_steps: int) -> None:
        self.config, self.side, self.batch = config, side, batch
        self.base = replace(PUBLISHED, num_steps=num_steps, last_step=0.04 if num_steps >= 50 else None)
        self.reference = random_model(config, lively_std(config), DEVICE).to(DTYPE)
        self.fused = FusedDDT.from_reference(self.reference)
        self.settings = cache(self._settings)
        # One function for a setting: what it yields is computed once.
        self.expected = {name: partial(self._expected, name) for name in SETTINGS}

    def inputs(self) -> Inputs:
        noise, _ = seeded_noise(range(self.batch), (4, self.side, self.side))
        return Inputs((noise.to(DEVICE), torch.arange(self.batch, device=DEVICE) % self.config.num_classes))

    def _settings(self, name: str) -> SamplingConfig:
        return resolve_refresh_steps(self.fused, SETTINGS[name](self.base), self.side, self.side)

    def _expected(self, setting: str, x: Inputs) -> Sequence[Tensor]:
        """What the plain DDT adds to the noise."""
        return added(self.run(f"DDT, {setting}, eager"), x)

    def run(self, name: str) -> Run:
        if name == BASELINE:
            return forward(lambda noise, labels: published_run(self.reference, noise, labels, self.base))
        kind, setting, engine = name.split(", ")
        config = replace(self.settings(setting), cuda_graphs=engine == "CUDA graphs")
        model, compiled = self.fused if kind == "FusedDDT" else self.reference, engine == "torch.compile"
        return forward(Sampler(model, config, self.batch, self.side, self.side, compile_model=compiled))

    def variant(self, name: str) -> Variant | str:
        if name.endswith("CUDA graphs") and not ON_GPU:
            return "needs an NVIDIA GPU"
        setting = "refresh 1" if name == BASELINE else name.split(", ")[1]
        plan = SamplingPlan.from_config(self.settings(setting))
        flops = plan.flops(self.config, self.side, self.side)
        note = f"{plan.network_evaluations} network and {plan.encoder_evaluations} encoder evaluations per image"
        if name == BASELINE:
            flops, note = 2 * self.base.num_steps * model_flops(self.config, self.side, self.side).total, ""
        cost, ours = Cost(weight_bytes(self.reference), self.batch * flops), name.startswith("FusedDDT")
        return Variant(partial(self.run, name), ours, added, self.expected[setting], cost, note)


def added(run: Run, x: Inputs) -> Sequence[Tensor]:
    return [samples - x.tensors[0] for samples in run(x)]


def sampling_case(
    name: str, config: DDTConfig, side: int, batch: int, steps: int, variants: tuple[str, ...] = ALL, rounds: int = 3
) -> Case:
    def build() -> Workload:
        runs = Runs(config, side, batch, steps)
        made, expected = {name: runs.variant(name) for name in variants}, runs.expected["refresh 1"]
        return Workload(runs.inputs, made, expected, DTYPE, images=batch, tolerance=TOLERANCE)

    size = f"{name} B {batch}, {steps} steps, {dtype_name(DTYPE)}"
    what = "one image" if batch == 1 else "throughput"
    return Case("sampling", what, size, variants, build, rounds=rounds)


def sampling_cases() -> Iterator[Case]:
    """The most wanted first: time may run out."""
    if not ON_GPU:
        yield sampling_case("tiny, 4+2 blocks, C 192, 16x16 latents,", TINY, 16, 4, 16, (*ALL, *COMPILED))
        yield sampling_case("tiny, 4+2 blocks, C 192, 16x16 latents,", TINY, 16, 1, 24)
        return
    xl2 = PRESETS["xl2_256"].model
    yield sampling_case("XL/2 256 px", xl2, 32, 8, 25, rounds=2)
    yield sampling_case("XL/2 256 px, compiled,", xl2, 32, 8, 25, (BASELINE, *COMPILED))


CASES = list(sampling_cases())


def test_sampling(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
