"""Whole models, forward and backward: FusedDDT against the plain DDT, and torch.compile of it.

On a GPU DDT-XL/2 in bf16, and two blocks of it, for which torch.compile's slower modes are affordable; on a CPU a small
model in fp32. The forward pass is one of training or of an unguided step: encoder, modulations, decoder.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE, DTYPE, ON_GPU, Case, Inputs, Run, Variant, Workload, randn, wider
from benchmarks.models import (
    Model,
    as_vector,
    compiled_copy,
    lively_std,
    random_model,
    released_gradients,
    weight_bytes,
)
from benchmarks.peers import COMPILE
from ddt_fast.config import DDTConfig
from ddt_fast.device import dtype_name
from ddt_fast.model import FusedDDT
from ddt_fast.model.flops import model_flops
from ddt_fast.presets import PRESETS
from ddt_kernels import Cost

BY_BLOCK = "DDT, torch.compile block by block"
SMALL = DDTConfig(4, 2, 384, 6, 8, 6, num_classes=1000)


def model_run(model: Callable[..., Any], backward: bool) -> Run:
    """Yields the velocity; with `backward` leaves the gradients in the parameters."""

    def run(inputs: Inputs) -> Sequence[Tensor]:
        with torch.set_grad_enabled(backward):
            velocity: Tensor = model(*inputs.tensors)[0]
        if backward:
            assert isinstance(model, nn.Module)
            model.zero_grad(set_to_none=True)
            velocity.backward(*inputs.gradients)
        return [velocity.detach()]

    return run


def model_case(
    name: str, config: DDTConfig, side: int, batch: int, backward: bool, compiled: tuple[str, ...] = (BY_BLOCK,)
) -> Case:
    """One model on latents of `side` x `side`; compiled: which of torch.compile's ways are affordable."""

    def inputs() -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(0)
        x, gradient = (randn(generator, batch, 4, side, side) for _ in range(2))
        t = torch.rand(batch, generator=generator, device=DEVICE)
        y = torch.randint(config.num_classes, (batch,), generator=generator, device=DEVICE)
        return Inputs((x, t, y), (gradient,) if backward else ())

    def checked(model: Any, run: Run, x: Inputs) -> list[Tensor]:
        outputs = list(run(x))
        return [*outputs, as_vector(released_gradients(model))] if backward else outputs

    def exactly(model: nn.Module, x: Inputs) -> list[Tensor]:
        exact = copy.deepcopy(model).to(wider(DTYPE))
        return checked(exact, model_run(exact, backward), x.to(wider(DTYPE)))

    def variant(model: Model, runnable: Callable[[], Any]) -> Variant:
        ours = isinstance(model, FusedDDT)
        return Variant(lambda: model_run(runnable(), backward), ours, check=partial(checked, model))

    def build() -> Workload:
        reference = random_model(config, lively_std(config), DEVICE).to(DTYPE).requires_grad_(backward)
        fused, by_block = FusedDDT.from_reference(reference), copy.deepcopy(reference)
        made = {
            "DDT, eager": variant(reference, lambda: reference),
            "FusedDDT": variant(fused, lambda: fused),
            "FusedDDT, torch.compile": variant(fused, lambda: compiled_copy(fused)),
            BY_BLOCK: variant(by_block, lambda: compile_blocks(by_block)),
            COMPILE: variant(reference, lambda: torch.compile(reference, dynamic=False)),
        }
        cost = Cost(weight_bytes(reference), batch * model_flops(config, side, side).total * (3 if backward else 1))
        chosen = {name: made[name] for name in names}
        return Workload(inputs, chosen, partial(exactly, reference), DTYPE, cost, images=batch)

    names = ("DDT, eager", "FusedDDT", "FusedDDT, torch.compile", *compiled)
    what, size = "forward+backward" if backward else "forward", f"{name} B {batch} {dtype_name(DTYPE)}"
    return Case("model", what, size, names, build, seconds=2.0)


def compile_blocks(model: Model) -> Model:
    """Every block by itself, in place: what is compiled for one serves all."""
    for block in model.blocks:
        block.compile(dynamic=False)
    return model


def model_cases() -> Iterator[Case]:
    """The most wanted first: time may run out."""
    xl2 = PRESETS["xl2_256"].model
    two = replace(xl2, num_blocks=2, num_encoder_blocks=1)
    for backward in (False, True):
        if not ON_GPU:
            name = "small, 6+2 blocks, C 384, 16x16 latents,"
            yield model_case(name, SMALL, 16, 2, backward, (BY_BLOCK, COMPILE))
            continue
        yield model_case("XL/2 256 px", xl2, 32, 16 if backward else 64, backward)
        yield model_case("XL/2 512 px", xl2, 64, 4 if backward else 16, backward)
        yield model_case("two blocks of XL/2 256 px", two, 32, 64, backward, (BY_BLOCK, COMPILE))


CASES = list(model_cases())


def test_model(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
