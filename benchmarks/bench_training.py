"""One training step: draw times and noise, forward, backward, AdamW, EMA; REPA on random cached features.

The baseline is what the original does: float32 weights under autocast (on a GPU), PyTorch's AdamW, an EMA of every
parameter. The other variants are this repository's step (`ddt_fast.training`) on either model. Verified are the loss
and all gradients of a step, which the optimiser would hide. Data are on the host, as a loader leaves them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Variant, Workload
from benchmarks.models import as_vector, lively_std, random_model, released_gradients
from benchmarks.shapes import DEVICE, DTYPE, ON_GPU, dtype_name, randn
from ddt_fast.config import DataConfig, DDTConfig, Experiment, TrainingConfig
from ddt_fast.data.loader import LatentBatch
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.presets import PRESETS
from ddt_fast.training.ema import EMA
from ddt_fast.training.model import TrainingModel
from ddt_fast.training.objective import Objective
from ddt_fast.training.parallel import MixedPrecisionReplica, process_group
from ddt_fast.training.repa import Projector
from ddt_fast.training.throughput import training_flops
from ddt_kernels import Cost

SMALL = DDTConfig(4, 2, 192, 6, 6, 4, num_classes=1000)
FEATURES = 768
EMA_DECAY = 0.9999
BASELINE, PLAIN, FUSED = "DDT, autocast, AdamW as PyTorch has it", "DDT, this repository's step", "FusedDDT"
COMPILED = ("DDT, torch.compile, this repository's step", "FusedDDT, torch.compile")


class Step:
    """This repository's training step on a copy of `reference`, as `ddt_fast.training.loop` does it."""

    def __init__(
        self, experiment: Experiment, reference: TrainingModel, engine: str, compile: bool, dtype: str
    ) -> None:
        denoiser, projector = copy.deepcopy((reference.denoiser, reference.projector))
        assert isinstance(denoiser, DDT)
        self.denoiser = FusedDDT.from_reference(denoiser) if engine == "fused" else denoiser
        self.masters = TrainingModel(self.denoiser, projector, experiment.training.repa_block)
        self.replica = MixedPrecisionReplica(self.masters, getattr(torch, dtype), "ddp", compile)
        self.objective = Objective(experiment, DEVICE, (1, FEATURES))
        self.optimizer = torch.optim.AdamW(self.masters.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.ema = EMA(self.denoiser, EMA_DECAY)

    def backward(self, inputs: Inputs) -> Tensor:
        latents, labels, features = inputs.tensors
        return self.objective.backward(self.replica, LatentBatch(latents, labels, features, None), step=1)

    def __call__(self, inputs: Inputs) -> Sequence[Tensor]:
        losses = self.backward(inputs)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.replica.copy_master_weights()
        self.ema.update(self.denoiser)
        return [losses]

    def check(self, inputs: Inputs) -> Sequence[Tensor]:
        """Losses and gradients; the weights stay as they are."""
        losses = self.backward(inputs)
        gradients = as_vector(released_gradients(self.denoiser))
        self.optimizer.zero_grad()
        return [losses, gradients]


class PlainStep(Step):
    """The same without this repository's machinery: one set of weights, autocast, AdamW and EMA parameter by
    parameter, as PyTorch does it unasked."""

    def __init__(self, experiment: Experiment, reference: TrainingModel) -> None:
        super().__init__(experiment, reference, "reference", False, "float32")
        self.optimizer = torch.optim.AdamW(self.masters.parameters(), lr=1e-4, betas=(0.9, 0.95))

    def backward(self, inputs: Inputs) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            return super().backward(inputs)

    @torch.no_grad()
    def _average(self) -> None:
        parameters = self.denoiser.parameters()
        for average, parameter in zip(self.ema.weights.values(), parameters, strict=True):
            average.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)

    def __call__(self, inputs: Inputs) -> Sequence[Tensor]:
        losses = self.backward(inputs)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average()
        return [losses]


def training_case(name: str, model: DDTConfig, side: int, batch: int, variants: tuple[str, ...]) -> Case:
    """A step on `batch` latents of `side` x `side`."""
    experiment = Experiment(
        model=model,
        data=DataConfig(dataset="latents", image_size=8 * side, autoencoder="none: latents are random"),
        training=TrainingConfig(batch_size=batch, repa_weight=0.5, repa_block=model.num_encoder_blocks // 2),
    )

    def inputs(number: int) -> Inputs:
        generator = torch.Generator().manual_seed(number)
        latents = randn(generator, batch, 4, side, side, dtype=torch.float32)
        labels = torch.randint(model.num_classes, (batch,), generator=generator)
        features = randn(generator, batch, model.num_tokens(side, side), FEATURES, dtype=torch.bfloat16)
        tensors = (latents, labels, features)
        return Inputs(tuple(t.pin_memory() for t in tensors) if ON_GPU else tensors)

    def build() -> Workload:
        stack = contextlib.ExitStack()
        # One process talks to nobody, but asks for its rank: the CPU's group does, and starts no NCCL.
        stack.enter_context(process_group(torch.device("cpu")))
        torch.manual_seed(0)
        projector = Projector(model.hidden_size, FEATURES).to(DEVICE)
        reference = TrainingModel(random_model(model, lively_std(model), DEVICE).requires_grad_(True), projector)
        step = partial(Step, experiment, reference, dtype=dtype_name(DTYPE))
        made = {
            BASELINE: Variant(
                partial(PlainStep, experiment, reference),
                check=Step.check,
                note="" if ON_GPU else "float32, without autocast, on a CPU",
            ),
            PLAIN: Variant(partial(step, "reference", False), check=Step.check, ours=True),
            FUSED: Variant(partial(step, "fused", False), check=Step.check, ours=True),
            COMPILED[0]: Variant(partial(step, "reference", True), check=Step.check, ours=True),
            COMPILED[1]: Variant(partial(step, "fused", True), check=Step.check, ours=True),
        }

        def expected(x: Inputs) -> Sequence[Tensor]:
            # In fp32, or on a CPU, where the steps are in fp32 themselves, by the plain one again.
            return Step(experiment, reference, "reference", False, "float32").check(x)

        weights = sum(p.numel() for p in reference.parameters())
        # Master weights and two moments read and written, averages too, gradients read: float32.
        cost = Cost(weights * 4 * 9, batch * training_flops(model, side, side, projector=True))
        chosen = {name: made[name] for name in variants}
        return Workload(inputs, chosen, expected, DTYPE, cost, images=batch, clean_up=stack.close)

    return Case("training", "step with REPA", f"{name} B {batch} {dtype_name(DTYPE)}", variants, build, seconds=3.0)


def training_cases() -> Iterator[Case]:
    if not ON_GPU:
        yield training_case(
            "small, 4+2 blocks, C 192, 16x16 latents,", SMALL, 16, 8, (BASELINE, PLAIN, FUSED, *COMPILED)
        )
        return
    b2, xl2 = PRESETS["b2_256"].model, PRESETS["xl2_256"].model
    yield training_case("B/2 256 px", b2, 32, 64, (BASELINE, PLAIN, FUSED, *COMPILED))
    yield training_case("XL/2 256 px", xl2, 32, 16, (BASELINE, FUSED))


CASES = list(training_cases())


def test_training(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
