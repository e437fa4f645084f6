"""Whole models, forward and backward: FusedDDT against the plain DDT, torch.compile of it, and diffusers' DiT.

On a GPU DDT-XL/2 in bf16, and two blocks of it, for which torch.compile's slower modes are affordable; on a CPU a small
model in fp32. The forward pass is one of training or of an unguided step: encoder, modulations, decoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Inputs, Run, Variant, Workload, wider
from benchmarks.models import Model, as_vector, compiled_copy, lively_std, random_model, released_gradients
from benchmarks.peers import COMPILE, MAX_AUTOTUNE, NEEDS_GPU, not_installed
from benchmarks.shapes import DEVICE, DTYPE, ON_GPU, dtype_name, randn
from ddt_fast.config import DDTConfig
from ddt_fast.model import FusedDDT
from ddt_fast.model.flops import model_flops
from ddt_fast.presets import PRESETS
from ddt_kernels import Cost

EAGER, FUSED, FUSED_COMPILED = "DDT, eager", "FusedDDT", "FusedDDT, torch.compile"
BY_BLOCK, DIT = "DDT, torch.compile block by block", "diffusers DiT, another architecture"
SMALL = DDTConfig(4, 2, 384, 6, 8, 6, num_classes=1000)


def run_forward(model: Callable[..., Any]) -> Run:
    @torch.no_grad()
    def run(inputs: Inputs) -> Sequence[Tensor]:
        return [_velocity(model(*inputs.tensors))]

    return run


def run_both(model: nn.Module) -> Run:
    """Leaves the gradients in the parameters."""

    def run(inputs: Inputs) -> Sequence[Tensor]:
        model.zero_grad(set_to_none=True)
        velocity = _velocity(model(*inputs.tensors))
        velocity.backward(inputs.gradients[0])
        return [velocity.detach()]

    return run


def _velocity(output: Any) -> Tensor:
    velocity: Tensor = output[0]
    return velocity


def checked(model: nn.Module, gradients: Callable[[], dict[str, Tensor]] | None, run: Run, x: Inputs) -> list[Tensor]:
    """The output, and all gradients end to end, where they are computed."""
    outputs = list(run(x))
    return outputs if gradients is None else [*outputs, as_vector(gradients())]


def model_case(
    name: str, config: DDTConfig, side: int, batch: int, backward: bool, compiled: tuple[str, ...] = (BY_BLOCK,)
) -> Case:
    """One model on latents of `side` x `side`; compiled: which of torch.compile's ways are affordable."""
    wrap: Callable[..., Run] = run_both if backward else run_forward

    def inputs(number: int) -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(number)
        x, gradient = (randn(generator, batch, 4, side, side) for _ in range(2))
        t = torch.rand(batch, generator=generator, device=DEVICE)
        y = torch.randint(config.num_classes, (batch,), generator=generator, device=DEVICE)
        return Inputs((x, t, y), (gradient,) if backward else ())

    def build() -> Workload:
        reference = random_model(config, lively_std(config), DEVICE).to(DTYPE).requires_grad_(backward)
        exact = copy.deepcopy(reference).to(wider(DTYPE))

        def ddt(model: Model, run: Callable[[Model], Callable[..., Any]] = lambda model: model) -> dict[str, Any]:
            gradients = partial(released_gradients, model) if backward else None
            return {"make": lambda: wrap(run(model)), "check": partial(checked, model, gradients)}

        def compile_whole(mode: str) -> Callable[[Model], Callable[..., Any]]:
            return lambda model: torch.compile(model, dynamic=False, mode=mode)

        fused = FusedDDT.from_reference(reference)
        autotuned = Variant(**ddt(reference, compile_whole("max-autotune")))
        variants: dict[str, Variant | str] = {EAGER: Variant(**ddt(reference)), FUSED: Variant(**ddt(fused), ours=True)}
        variants[FUSED_COMPILED] = Variant(**ddt(fused, lambda _: compiled_copy(fused)), ours=True)
        ways: dict[str, Variant | str] = {
            BY_BLOCK: Variant(**ddt(by_block := copy.deepcopy(reference), lambda _: compile_blocks(by_block))),
            COMPILE: Variant(**ddt(reference, compile_whole("default"))),
            MAX_AUTOTUNE: autotuned if ON_GPU else NEEDS_GPU,
        }
        variants |= {way: ways[way] for way in compiled}
        variants[DIT] = not_installed("diffusers", "diffusers") or diffusers_variant(config, side, batch, backward)

        def expected(x: Inputs) -> Sequence[Tensor]:
            gradients = partial(released_gradients, exact) if backward else None
            return checked(exact, gradients, wrap(exact), x.to(wider(DTYPE)))

        flops = batch * model_flops(config, side, side).total * (3 if backward else 1)
        weights = sum(p.numel() * p.element_size() for p in reference.parameters())
        return Workload(inputs, variants, expected, DTYPE, Cost(weights, flops), images=batch)

    size = f"{name} B {batch} {dtype_name(DTYPE)}"
    names = (EAGER, FUSED, FUSED_COMPILED, *compiled, DIT)
    return Case("model", "forward+backward" if backward else "forward", size, names, build, seconds=2.0)


def compile_blocks(model: Model) -> Model:
    """Every block by itself, in place: what is compiled for one serves all."""
    for block in model.blocks:
        block.compile(dynamic=False)
    return model


def diffusers_variant(config: DDTConfig, side: int, batch: int, backward: bool) -> Variant:
    """diffusers' DiTTransformer2DModel of the same width, depth and patch size; compared with itself in higher
    precision. One modulation per sample and block, LayerNorm, GELU, an MLP of 4C, no RoPE, no decoder."""
    wrap: Callable[..., Run] = run_both if backward else run_forward
    c, n = config.hidden_size, config.num_tokens(side, side)
    flops = batch * config.num_blocks * (24 * n * c * c + 4 * n * n * c + 12 * c * c) * (3 if backward else 1)

    @cache
    def model() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(DEVICE):  # a GPU draws XL/2's weights in no time
            made = DiffusersDiT(config, side)
        return made.eval().requires_grad_(backward).to(DEVICE, DTYPE)

    def check(model: nn.Module, x: Inputs) -> list[Tensor]:
        return checked(model, partial(_gradients, model) if backward else None, wrap(model), x)

    return Variant(
        lambda: wrap(model()),
        check=lambda _, x: check(model(), x),
        expected=lambda x: check(copy.deepcopy(model()).to(wider(DTYPE)), x.to(wider(DTYPE))),
        cost=Cost(0, flops),
    )


class DiffusersDiT(nn.Module):
    """Takes what a DDT takes."""

    def __init__(self, config: DDTConfig, side: int) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.dit: Any = DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_channels,
            num_layers=config.num_blocks,
            sample_size=side,
            patch_size=config.patch_size,
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return self.dit(x, timestep=1000 * t, class_labels=y, return_dict=False)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def model_cases() -> Iterator[Case]:
    """The most wanted first: time may run out."""
    every = (BY_BLOCK, COMPILE, MAX_AUTOTUNE)
    if not ON_GPU:
        for backward in (False, True):
            yield model_case("small, 6+2 blocks, C 384, 16x16 latents,", SMALL, 16, 2, backward, every)
        return
    xl2 = PRESETS["xl2_256"].model
    two = replace(xl2, num_blocks=2, num_encoder_blocks=1)
    for backward in (False, True):
        yield model_case("XL/2 256 px", xl2, 32, 16 if backward else 64, backward)
    for backward in (False, True):
        yield model_case("XL/2 512 px", xl2, 64, 4 if backward else 16, backward)
    for backward in (False, True):
        yield model_case("two blocks of XL/2 256 px", two, 32, 64, backward, every)


CASES = list(model_cases())


def test_model(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
