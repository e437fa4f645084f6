"""One training step: draw times and noise, forward, backward, AdamW, EMA; REPA on random cached features.

The baseline is what the original does: float32 weights under autocast (on a GPU), PyTorch's AdamW, an EMA of every
parameter. The other variants are this repository's step on either model (`benchmarks.training_step`). Verified are the
losses and all gradients of a step, which the optimiser would hide.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DEVICE, DTYPE, ON_GPU, Case, Inputs, Workload
from benchmarks.harness import Variant as Timed
from benchmarks.models import lively_std, random_model
from benchmarks.training_step import SIDE, Setup, Step, Variant
from ddt_fast.config import DDTConfig
from ddt_fast.device import dtype_name
from ddt_fast.presets import PRESETS
from ddt_fast.training.parallel import process_group
from ddt_fast.training.throughput import training_flops
from ddt_kernels import Cost

SMALL = DDTConfig(4, 2, 192, 6, 6, 4, num_classes=1000)
BASELINE, FUSED = "DDT, autocast, AdamW as PyTorch has it", "FusedDDT"
STEPS = (
    Variant(BASELINE, "reference", DTYPE, autocast=ON_GPU),
    Variant("DDT, this repository's step", "reference", DTYPE),
    Variant(FUSED, "fused", DTYPE),
    Variant("DDT, torch.compile, this repository's step", "reference", DTYPE, compile=True),
    Variant("FusedDDT, torch.compile", "fused", DTYPE, compile=True),
)
ALL = tuple(step.name for step in STEPS)


class PlainStep(Step):
    """The update without this repository's machinery: AdamW and EMA parameter by parameter, PyTorch's defaults."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.optimizer = torch.optim.AdamW(self.state.masters.parameters(), lr=1e-9, weight_decay=0.0)

    def __call__(self, *_: object) -> list[Tensor]:
        losses = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        averages, parameters = self.state.ema.weights.values(), self.state.masters.denoiser.parameters()
        with torch.no_grad():
            for average, parameter in zip(averages, parameters, strict=True):
                average.mul_(0.9999).add_(parameter, alpha=1e-4)
        return [losses]


def training_case(name: str, model: DDTConfig, batch: int, variants: tuple[str, ...] = ALL) -> Case:
    def build() -> Workload:
        stack = contextlib.ExitStack()
        # One process talks to nobody, but asks for its rank: the CPU's group does, and starts no NCCL.
        stack.enter_context(process_group(torch.device("cpu")))
        setup = Setup(random_model(model, lively_std(model), DEVICE), batch, True, DEVICE)
        note = "" if ON_GPU else "float32, without autocast, on a CPU"
        made = {
            step.name: Timed(partial(Step, step, setup), ours=True, check=Step.check)
            for step in STEPS
            if step.name in variants
        }
        made[BASELINE] = Timed(partial(PlainStep, STEPS[0], setup), check=Step.check, note=note)
        weights = sum(p.numel() for p in setup.state("reference").masters.parameters())
        # Master weights and two moments read and written, averages too, gradients read: float32.
        cost = Cost(weights * 4 * 9, batch * training_flops(model, SIDE, SIDE, projector=True))
        exact = Step(Variant("exact", "reference"), setup)
        return Workload(lambda: Inputs(()), made, exact.check, DTYPE, cost, images=batch, clean_up=stack.close)

    return Case("training", "step with REPA", f"{name} B {batch} {dtype_name(DTYPE)}", variants, build, seconds=3.0)


def training_cases() -> Iterator[Case]:
    if not ON_GPU:
        yield training_case("small, 4+2 blocks, C 192, 32x32 latents,", SMALL, 4)
        return
    yield training_case("XL/2 256 px", PRESETS["xl2_256"].model, 16, (BASELINE, FUSED))
    yield training_case("B/2 256 px", PRESETS["b2_256"].model, 64)


CASES = list(training_cases())


def test_training(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
