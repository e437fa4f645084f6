"""Every op of ddt_kernels against plain PyTorch, torch.compile of that, and the packages that do the same.

On a GPU in bf16 at the shapes of DDT-XL/2 at 256 and 512 px; on a CPU, where the ops are plain PyTorch themselves, in
fp32 at a small shape. Backward passes are timed together with their forward. The element-wise ops have as many rows at
512 px as at 256 px: what torch.compile makes of them is measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ddt_kernels as ops
from benchmarks.harness import (
    DEVICE,
    DTYPE,
    ON_GPU,
    Case,
    Inputs,
    Run,
    Variant,
    Workload,
    dtype_name,
    forward,
    forward_backward,
    randn,
    wider,
)
from benchmarks.peers import Peer, attention_backends, compiled, packed
from ddt_fast.model.base import rotary_tables
from ddt_kernels import Cost, reference


@dataclass(frozen=True)
class Shape:
    """B images of `side` x `side` tokens, C channels, H heads, F wide in the MLP."""

    name: str
    batch: int
    side: int
    channels: int
    heads: int
    width: int

    @property
    def activations(self) -> tuple[int, int, int]:
        """B, N, C."""
        return self.batch, self.side**2, self.channels

    @property
    def packed_heads(self) -> tuple[int, int, int, int]:
        """B, N, H, D."""
        return self.batch, self.side**2, self.heads, self.channels // self.heads

    def __str__(self) -> str:
        return f"{self.name} B {self.batch} N {self.side**2} C {self.channels} {dtype_name(DTYPE)}"


SHAPES = (
    [Shape("XL/2 256 px", 128, 16, 1152, 16, 3072), Shape("XL/2 512 px", 32, 32, 1152, 16, 3072)]
    if ON_GPU
    else [Shape("small", 4, 16, 288, 4, 768)]
)
EAGER, OURS = "plain PyTorch", "ddt_kernels"
NOTE = "" if ON_GPU else "plain PyTorch on a CPU"

Make = Callable[[torch.Generator], tuple[Tensor, ...]]
"""The arguments of a call."""


def kernel_case(
    name: str,
    size: str,
    make: Make,
    plain: Callable[..., Any],
    fused: Callable[..., Any],
    cost: Cost,
    backward: bool = False,
    peers: Mapping[str, Peer] | None = None,
    dtype: torch.dtype = DTYPE,
    fixed: int = 0,
) -> Case:
    """A case of one op; plain and fused take what `make` makes, and with `backward` are differentiated in all of it but
    the last `fixed` tensors. dtype: of the results."""
    wrap: Callable[[Callable[..., Any]], Run] = forward_backward if backward else forward
    peers = peers or {}

    def inputs() -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(0)
        tensors = make(generator)
        if not backward:
            return Inputs(tensors)
        gradients = tuple(randn(generator, *output.shape) for output in forward(plain)(Inputs(tensors)))
        count = len(tensors) - fixed
        return Inputs((*(t.detach().requires_grad_() for t in tensors[:count]), *tensors[count:]), gradients)

    def build() -> Workload:
        variants: dict[str, Variant | str] = {EAGER: Variant(lambda: wrap(plain))}
        variants[OURS] = Variant(lambda: wrap(fused), ours=True, note=NOTE)
        variants |= {peer: make_peer(wrap) for peer, make_peer in peers.items()}
        return Workload(inputs, variants, lambda x: wrap(plain)(x.to(wider(dtype))), dtype, cost)

    name += " forward+backward" if backward else " forward"
    return Case("kernels", name, size, (EAGER, OURS, *peers), build, seconds=0.5)


NORMS = {
    "rms_norm_modulate": ("x", "weight", "shift", "scale"),
    "gated_residual_rms_norm_modulate": ("x", "branch", "gate", "weight", "shift", "scale"),
    "gated_residual_layer_norm_modulate": ("x", "branch", "gate", "shift", "scale"),
    "gated_residual": ("x", "branch", "gate"),
}
MODULATIONS = ("shift", "scale", "gate")


def norm_tensors(
    shape: Shape, names: tuple[str, ...], per_token: bool, history: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """By name; modulations are chunks of one GEMM's result, as in the model, or of `history` cached ones, and then
    weights and step follow."""
    B, N, C = shape.activations
    lead = (history, B) if history > 1 else (B,)
    modulations = randn(generator, *lead, N if per_token else 1, 6 * C).div_(2).chunk(6, dim=-1)
    tensors = dict(zip(MODULATIONS, modulations, strict=False))
    tensors |= {name: randn(generator, B, N, C) for name in ("x", "branch")}
    tensors["weight"] = 1 + randn(generator, C) / 4
    made = tuple(tensors[name] for name in names)
    if history == 1:
        return made
    weights = torch.tensor([[1.0, 0.0], [1.7, -0.7]], device=DEVICE)
    return (*made, weights, torch.tensor([1], device=DEVICE))


def plain_forecast(plain: Callable[..., Any], names: tuple[str, ...], *tensors: Tensor) -> Any:
    """`plain` on combined modulations."""
    *rest, weights, step = tensors
    named = zip(names, rest, strict=True)
    return plain(*(reference.forecast(t, weights, step) if name in MODULATIONS else t for name, t in named))


def fused_forecast(fused: Callable[..., Any], *tensors: Tensor) -> Any:
    """`fused` on cached modulations."""
    *rest, weights, step = tensors
    return fused(*rest, forecast=(weights, step))


def norm_cases(shape: Shape) -> Iterator[Case]:
    """The norm family, at both granularities of modulation, and reading modulations forecast from two."""
    for name, names in NORMS.items():
        plain, fused = getattr(reference, name), getattr(ops, name)
        cost: Callable[..., Cost] = partial(getattr(ops, f"{name}_cost"), *shape.activations, DTYPE)
        for per_token, words in ((True, "token"), (False, "sample")):
            peers = compiled(plain) if shape is SHAPES[0] else {}
            size = f"{shape}, modulated per {words}"
            make = partial(norm_tensors, shape, names, per_token, 1)
            yield kernel_case(name, size, make, plain, fused, cost(per_token), peers=peers)
            both = cost(per_token) + cost(per_token, backward=True)
            yield kernel_case(name, size, make, plain, fused, both, backward=True, peers=peers)
        if name != "gated_residual":
            forecast = partial(plain_forecast, plain, names)
            yield kernel_case(
                f"{name}, forecast from 2,",
                f"{shape}, modulated per token",
                partial(norm_tensors, shape, names, True, 2),
                forecast,
                partial(fused_forecast, fused),
                cost(True, history=2),
                peers=compiled(forecast) if shape is SHAPES[0] else {},
            )


def packed_projection(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    """qkv, weights of q and k, cos and sin."""
    B, N, H, D = shape.packed_heads
    weights = (1 + randn(generator, D) / 4 for _ in range(2))
    return randn(generator, B, N, 3, H, D), *weights, *rotary_tables(D, shape.side, shape.side, device=DEVICE)


def qk_norm_rope_cases(shape: Shape) -> Iterator[Case]:
    """Norm and rotation of q and k: as a new tensor, differentiated, and in place."""
    make = partial(packed_projection, shape)

    def plain_in_place(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, _ = qkv.unbind(2)
        q.copy_(reference.norm_rope(q, q_weight, cos, sin))
        k.copy_(reference.norm_rope(k, k_weight, cos, sin))
        return qkv

    size, plain = str(shape), reference.qk_norm_rope
    cost, backward = (ops.qk_norm_rope_cost(*shape.packed_heads, DTYPE, backward=b) for b in (False, True))
    peers = compiled(plain) if shape is SHAPES[0] else {}
    yield kernel_case("qk_norm_rope", size, make, plain, ops.qk_norm_rope, cost, peers=peers)
    both = cost + backward
    yield kernel_case("qk_norm_rope", size, make, plain, ops.qk_norm_rope, both, backward=True, peers=peers, fixed=2)
    cost = ops.qk_norm_rope_cost(*shape.packed_heads, DTYPE, in_place=True)
    peers = compiled(plain_in_place) if shape is SHAPES[0] else {}
    yield kernel_case("qk_norm_rope_, in place,", size, make, plain_in_place, ops.qk_norm_rope_, cost, peers=peers)


def qkv_attention_cases(shape: Shape) -> Iterator[Case]:
    """A layer between its GEMMs as it is trained, also by the two operators that qkv_attention is made of."""

    def two(qkv: Tensor, *others: Tensor) -> Tensor:
        q_weight, k_weight, cos, sin = others
        q, k, v = ops.qk_norm_rope(qkv, q_weight, k_weight, cos, sin).unbind(2)
        return ops.attention(q, k, v)

    def peer(wrap: Callable[[Callable[..., Any]], Run]) -> Variant:
        return Variant(lambda: wrap(two))

    plain, make, cost = reference.qkv_attention, partial(packed_projection, shape), ops.qkv_attention_cost
    both = cost(*shape.packed_heads, DTYPE) + cost(*shape.packed_heads, DTYPE, backward=True)
    arguments = ("qkv_attention", str(shape), make, plain, ops.qkv_attention, both)
    peers = {"qk_norm_rope, attention": peer} | compiled(plain)
    yield kernel_case(*arguments, backward=True, peers=peers, fixed=2)


def swiglu_cases(shape: Shape) -> Iterator[Case]:
    """The MLP's first two GEMMs and its activation, and the whole MLP."""
    B, N, C = shape.activations

    def make(whole: bool, generator: torch.Generator) -> tuple[Tensor, ...]:
        w1, w3 = (randn(generator, shape.width, C) / C**0.5 for _ in range(2))
        w2 = (randn(generator, C, shape.width) / shape.width**0.5,) if whole else ()
        return randn(generator, B, N, C), w1, w3, *w2

    for name, whole in (("swiglu", False), ("swiglu_mlp", True)):
        plain, fused = getattr(reference, name), getattr(ops, name)
        cost = partial(getattr(ops, f"{name}_cost"), B, N, C, shape.width, DTYPE)
        both = cost(training=True) + cost(backward=True)
        arguments = (name, str(shape), partial(make, whole), plain, fused)
        yield kernel_case(*arguments, cost(), peers=compiled(plain))
        yield kernel_case(*arguments, both, backward=True, peers=compiled(plain))


def attention_cases(shape: Shape) -> Iterator[Case]:
    """Attention on heads read from a packed qkv, by every backend that is installed."""

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        B, N, H, D = shape.packed_heads
        return (randn(generator, B, N, 3, H, D),)

    peers = attention_backends(DEVICE, DTYPE, shape.packed_heads[3])
    del peers["triton"]  # ddt_kernels' own
    cost, backward = (ops.attention_cost(*shape.packed_heads, DTYPE, b) for b in (False, True))
    arguments = ("attention", str(shape), make, partial(packed, reference.attention), partial(packed, ops.attention))
    yield kernel_case(*arguments, cost, peers=peers)
    yield kernel_case(*arguments, cost + backward, backward=True, peers=peers)


def guided_step_cases(shape: Shape) -> Iterator[Case]:
    """A sampler's step after the network: Euler guided, as a new tensor and in place, and the most it can do."""
    B, p = shape.batch, 2
    size = (B, 4, p * shape.side, p * shape.side)

    def make(velocities: int, differences: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        cond, uncond = randn(generator, 2 * B, shape.side**2, 4 * p * p).chunk(2)
        shares = [0.004] if not velocities else [0.01, -0.008, 0.003, -0.001]
        row = ops.guided_step_coefficients(shares, [1.0] if not differences else [1.6, -0.6])
        table, step = torch.tensor([row] * 2, device=DEVICE), torch.tensor([1], device=DEVICE)
        histories = [
            randn(generator, depth, *size, dtype=torch.float32) for depth in (velocities, differences) if depth
        ]
        return randn(generator, *size, dtype=torch.float32), cond, uncond, table, step, *histories

    def plain_in_place(x: Tensor, *rest: Tensor) -> Tensor:
        return x.copy_(reference.guided_step(x, *rest, patch_size=p))

    plain, cost = partial(reference.guided_step, patch_size=p), partial(ops.guided_step_cost, *size, DTYPE)
    fused, in_place = (partial(function, patch_size=p) for function in (ops.guided_step, ops.guided_step_))
    euler, most = partial(make, 0, 0), partial(make, 3, 2)
    for name, inputs, baseline, ours, work in (
        ("guided_step, Euler,", euler, plain, fused, cost()),
        ("guided_step, 4 velocities and 2 differences,", most, plain, fused, cost(True, 3, 2)),
        ("guided_step_, Euler, in place,", euler, plain_in_place, in_place, cost()),
    ):
        peers = compiled(baseline) if shape is SHAPES[0] else {}
        yield kernel_case(name, str(shape), inputs, baseline, ours, work, peers=peers, dtype=torch.float32)


OPS = (swiglu_cases, attention_cases, qkv_attention_cases, norm_cases, qk_norm_rope_cases, guided_step_cases)
CASES = [case for shape in SHAPES for cases in OPS for case in cases(shape)]


def test_kernels(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
