"""Every op of ddt_kernels against plain PyTorch, torch.compile of that, and the packages that do the same.

On a GPU in bf16 at the shapes of DDT-XL/2 at 256 and 512 px; on a CPU, where the ops are plain PyTorch themselves, in
fp32 at a small shape. Backward passes are timed together with their forward. The element-wise ops have as many rows at
512 px as at 256 px: what torch.compile makes of them is measured once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

import ddt_kernels as ops
from benchmarks.harness import DEVICE, DTYPE, ON_GPU, Case, randn
from benchmarks.peers import OURS, Function, Peer, attention_backends, compiled, function_case, packed
from ddt_fast.device import dtype_name
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


def kernel_cases(
    name: str,
    shape: Shape,
    make: Callable[[torch.Generator], tuple[Tensor, ...]],
    plain: Function,
    fused: Function,
    forward: Cost | None = None,
    both: Cost | None = None,
    peers: Mapping[str, Peer] | None = None,
    detail: str = "",
    dtype: torch.dtype = DTYPE,
    fixed: int = 0,
) -> Iterator[Case]:
    """A case of an op, `fused`, for each cost that is given: of its forward pass, and of both passes together. See
    `function_case` for the rest; peers are by default `plain` by torch.compile, at the first shape."""
    if peers is None:
        peers = compiled(plain) if shape is SHAPES[0] else {}
    for words, cost in (("forward", forward), ("forward+backward", both)):
        if cost is not None:
            names, ways = ("kernels", f"{name} {words}", f"{shape}{detail}"), {OURS: lambda: fused, **peers}
            yield function_case(names, make, plain, ways, DEVICE, dtype, cost, cost is both, fixed, seconds=0.5)


NORMS = (
    *("rms_norm_modulate", "layer_norm_modulate", "gated_residual_rms_norm_modulate"),
    *("gated_residual_layer_norm_modulate", "gated_residual"),
)
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


def plain_forecast(plain: Function, names: tuple[str, ...], *tensors: Tensor) -> Any:
    *rest, weights, step = tensors
    named = zip(names, rest, strict=True)
    return plain(*(reference.forecast(t, weights, step) if name in MODULATIONS else t for name, t in named))


def fused_forecast(fused: Function, *tensors: Tensor) -> Any:
    *rest, weights, step = tensors
    return fused(*rest, forecast=(weights, step))


def norm_cases(shape: Shape) -> Iterator[Case]:
    """The norm family, at both granularities of modulation, and reading modulations forecast from two."""
    for name in NORMS:
        plain, fused = getattr(reference, name), getattr(ops, name)
        names = tuple(parameter for parameter in signature(plain).parameters if parameter not in ("eps", "keep"))
        cost: Callable[..., Cost] = partial(getattr(ops, f"{name}_cost"), *shape.activations, DTYPE)
        for per_token in (True, False):
            make = partial(norm_tensors, shape, names, per_token, 1)
            costs = cost(per_token), cost(per_token) + cost(per_token, backward=True)
            detail = f", modulated per {'token' if per_token else 'sample'}"
            yield from kernel_cases(name, shape, make, plain, fused, *costs, detail=detail)
        if name != "gated_residual":
            make = partial(norm_tensors, shape, names, True, 2)
            ways = partial(plain_forecast, plain, names), partial(fused_forecast, fused)
            work, title = cost(True, history=2), f"{name}, forecast from 2,"
            yield from kernel_cases(title, shape, make, *ways, work, detail=", modulated per token")


def packed_projection(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    """qkv, weights of q and k, cos and sin."""
    B, N, H, D = shape.packed_heads
    weights = (1 + randn(generator, D) / 4 for _ in range(2))
    return randn(generator, B, N, 3, H, D), *weights, *rotary_tables(D, shape.side, shape.side, device=DEVICE)


def qk_norm_rope_cases(shape: Shape) -> Iterator[Case]:
    """Norm and rotation of q and k: as a new tensor, differentiated, and in place."""
    make, cost = partial(packed_projection, shape), partial(ops.qk_norm_rope_cost, *shape.packed_heads, DTYPE)

    def in_place(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, _ = qkv.unbind(2)
        q.copy_(reference.norm_rope(q, q_weight, cos, sin))
        k.copy_(reference.norm_rope(k, k_weight, cos, sin))
        return qkv

    functions, costs = (reference.qk_norm_rope, ops.qk_norm_rope), (cost(), cost() + cost(backward=True))
    yield from kernel_cases("qk_norm_rope", shape, make, *functions, *costs, fixed=2)
    name = "qk_norm_rope_, in place,"
    yield from kernel_cases(name, shape, make, in_place, ops.qk_norm_rope_, cost(in_place=True))


def qkv_attention_cases(shape: Shape) -> Iterator[Case]:
    """A layer between its GEMMs as it is trained, also by the two operators that qkv_attention is made of."""

    def two(qkv: Tensor, *others: Tensor) -> Tensor:
        q_weight, k_weight, cos, sin = others
        q, k, v = ops.qk_norm_rope(qkv, q_weight, k_weight, cos, sin).unbind(2)
        return ops.attention(q, k, v)

    plain, make = reference.qkv_attention, partial(packed_projection, shape)
    cost = partial(ops.qkv_attention_cost, *shape.packed_heads, DTYPE)
    peers, both = {"qk_norm_rope, attention": lambda: two, **compiled(plain)}, cost() + cost(backward=True)
    yield from kernel_cases("qkv_attention", shape, make, plain, ops.qkv_attention, None, both, peers, fixed=2)


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
        costs = cost(), cost(training=True) + cost(backward=True)
        for detail, peers in (("", {}), (", torch.compile", compiled(plain))):  # to compile takes a minute
            yield from kernel_cases(name + detail, shape, partial(make, whole), plain, fused, *costs, peers)


def attention_cases(shape: Shape) -> Iterator[Case]:
    """Attention on heads read from a packed qkv, by every backend that is installed."""

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        B, N, H, D = shape.packed_heads
        return (randn(generator, B, N, 3, H, D),)

    peers = attention_backends(DEVICE, DTYPE, shape.packed_heads[3])
    del peers["triton"]  # ddt_kernels' own
    cost, backward = (ops.attention_cost(*shape.packed_heads, DTYPE, b) for b in (False, True))
    plain, fused = partial(packed, reference.attention), partial(packed, ops.attention)
    yield from kernel_cases("attention", shape, make, plain, fused, cost, cost + backward, peers)


def guided_step_cases(shape: Shape) -> Iterator[Case]:
    """A sampler's step after the network: Euler guided, as a new tensor and in place, and the most it can do."""
    B, p = shape.batch, 2
    size = (B, 4, p * shape.side, p * shape.side)

    def make(velocities: int, differences: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        cond, uncond = randn(generator, 2 * B, shape.side**2, 4 * p * p).chunk(2)
        shares = [0.004] if not velocities else [0.01, -0.008, 0.003, -0.001]
        row = ops.guided_step_coefficients(shares, shares)
        table, step = torch.tensor([row] * 2, device=DEVICE), torch.tensor([1], device=DEVICE)
        depths = [depth for depth in (velocities, differences) if depth]
        histories = [randn(generator, depth, *size, dtype=torch.float32) for depth in depths]
        return randn(generator, *size, dtype=torch.float32), cond, uncond, table, step, *histories

    def plain_in_place(x: Tensor, *rest: Tensor) -> Tensor:
        return x.copy_(reference.guided_step(x, *rest, patch_size=p))

    plain, cost = partial(reference.guided_step, patch_size=p), partial(ops.guided_step_cost, *size, DTYPE)
    fused, in_place = (partial(function, patch_size=p) for function in (ops.guided_step, ops.guided_step_))
    euler, most = partial(make, 0, 0), partial(make, 3, 3)
    for name, inputs, baseline, ours, work in (
        ("guided_step, Euler,", euler, plain, fused, cost()),
        ("guided_step, 4 velocities and 4 differences,", most, plain, fused, cost(True, 3, 3)),
        ("guided_step_, Euler, in place,", euler, plain_in_place, in_place, cost()),
    ):
        yield from kernel_cases(name, shape, inputs, baseline, ours, work, dtype=torch.float32)


OPS = (swiglu_cases, attention_cases, qkv_attention_cases, norm_cases, qk_norm_rope_cases, guided_step_cases)
CASES = [case for shape in SHAPES for cases in OPS for case in cases(shape)]


def test_kernels(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
