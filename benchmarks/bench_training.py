"""One training step: draw times and noise, forward, backward, AdamW, EMA; REPA on random cached features.

The baseline is what the original does: float32 weights under autocast (on a GPU), PyTorch's AdamW, an EMA of every
parameter. The other variants are this repository's step on either model (`benchmarks.training_step`). Verified are the
losses and all gradients of a step, which the optimiser would hide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DEVICE, DTYPE, ON_GPU, Case, Inputs, Workload, dtype_name
from benchmarks.harness import Variant as Timed
from benchmarks.models import lively_std, random_model
from benchmarks.training_step import FEATURES, Step, Variant, experiment_of, random_batch, states
from ddt_fast.config import DDTConfig
from ddt_fast.data.loader import LatentBatch
from ddt_fast.presets import PRESETS
from ddt_fast.training.objective import Objective
from ddt_fast.training.parallel import process_group
from ddt_fast.training.throughput import training_flops
from ddt_kernels import Cost

SMALL = DDTConfig(4, 2, 192, 6, 6, 4, num_classes=1000)
BASELINE, PLAIN, FUSED = "DDT, autocast, AdamW as PyTorch has it", "DDT, this repository's step", "FusedDDT"
COMPILED = ("DDT, torch.compile, this repository's step", "FusedDDT, torch.compile")
ALL = (BASELINE, PLAIN, FUSED, *COMPILED)
STEPS = {
    BASELINE: Variant(BASELINE, "reference", DTYPE, autocast=ON_GPU),
    PLAIN: Variant(PLAIN, "reference", DTYPE),
    FUSED: Variant(FUSED, "fused", DTYPE),
    COMPILED[0]: Variant(COMPILED[0], "reference", DTYPE, compile=True),
    COMPILED[1]: Variant(COMPILED[1], "fused", DTYPE, compile=True),
}


class PlainStep(Step):
    """The update without this repository's machinery: AdamW and EMA parameter by parameter, PyTorch's defaults."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.optimizer = torch.optim.AdamW(self.state.masters.parameters(), lr=1e-9, weight_decay=0.0)

    def __call__(self, batch: LatentBatch) -> Tensor:
        losses = self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        averages, parameters = self.state.ema.weights.values(), self.state.masters.denoiser.parameters()
        with torch.no_grad():
            for average, parameter in zip(averages, parameters, strict=True):
                average.mul_(0.9999).add_(parameter, alpha=1e-4)
        return losses


@dataclass(frozen=True)
class TimedStep:
    """A step as the harness calls it."""

    step: Step

    def __call__(self, inputs: Inputs) -> Sequence[Tensor]:
        return [self.step(_batch(inputs))]

    def check(self, inputs: Inputs) -> Sequence[Tensor]:
        return self.step.check(_batch(inputs))


def _batch(inputs: Inputs) -> LatentBatch:
    latents, labels, features = inputs.tensors
    return LatentBatch(latents, labels, features, None)


def training_case(name: str, model: DDTConfig, side: int, batch: int, variants: tuple[str, ...]) -> Case:
    """A step on `batch` latents of `side` x `side`, which have as many tokens as `FEATURES`."""

    def inputs() -> Inputs:
        made = random_batch(model, side, batch, repa=True)
        assert made.features is not None
        tensors = (made.latents, made.labels, made.features)
        return Inputs(tuple(t.pin_memory() for t in tensors) if ON_GPU else tensors)

    def build() -> Workload:
        stack = contextlib.ExitStack()
        # One process talks to nobody, but asks for its rank: the CPU's group does, and starts no NCCL.
        stack.enter_context(process_group(torch.device("cpu")))
        objective = Objective(experiment_of(model, batch, side, repa=True), DEVICE, FEATURES)
        state = states(random_model(model, lively_std(model), DEVICE), True, DEVICE)

        def make(name: str) -> TimedStep:
            step = PlainStep if name == BASELINE else Step
            return TimedStep(step(STEPS[name], state(STEPS[name].engine), objective))

        note = "" if ON_GPU else "float32, without autocast, on a CPU"
        made = {name: Timed(partial(make, name), ours=name != BASELINE, check=TimedStep.check) for name in variants}
        made[BASELINE] = replace(made[BASELINE], note=note)
        weights = sum(p.numel() for p in state("reference").masters.parameters())
        # Master weights and two moments read and written, averages too, gradients read: float32.
        cost = Cost(weights * 4 * 9, batch * training_flops(model, side, side, projector=True))
        exact = TimedStep(Step(Variant("exact", "reference"), state("reference"), objective))
        return Workload(inputs, made, exact.check, DTYPE, cost, images=batch, clean_up=stack.close)

    return Case("training", "step with REPA", f"{name} B {batch} {dtype_name(DTYPE)}", variants, build, seconds=3.0)


def training_cases() -> Iterator[Case]:
    if not ON_GPU:
        yield training_case("small, 4+2 blocks, C 192, 32x32 latents,", SMALL, 32, 4, ALL)
        return
    yield training_case("B/2 256 px", PRESETS["b2_256"].model, 32, 64, ALL)
    yield training_case("XL/2 256 px", PRESETS["xl2_256"].model, 32, 16, (BASELINE, FUSED))


CASES = list(training_cases())


def test_training(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
