"""Cases of one function, and what a user might run instead, or the reason why it is missing on this machine.

Plain eager PyTorch is `ddt_kernels.reference` and `ddt_fast.model.DDT`, in the original's structure.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Inputs, Run, Variant, Workload, forward, forward_backward, randn, wider
from ddt_fast.model.attention import CONCRETE_BACKENDS, attention, available_backends
from ddt_kernels import Cost

EAGER, OURS, COMPILE = "plain PyTorch", "ddt_kernels", "torch.compile"
ON_CPU = "plain PyTorch on a CPU"

Function = Callable[..., Any]  # takes a case's tensors, returns one or several
Peer = Callable[[], Function | str]  # makes a function, or says why it is missing here


def compiled(function: Function) -> dict[str, Peer]:
    return {COMPILE: lambda: torch.compile(function, fullgraph=True, dynamic=False)}


def packed(function: Callable[..., Tensor], qkv: Tensor) -> Tensor:
    """`function` on the heads of a packed (B, N, 3, H, D)."""
    return function(*qkv.unbind(2))


def attention_backends(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Peer]:
    def peer(name: Any) -> Function | str:
        return available_backends(device, dtype, head_dim)[name] or partial(packed, partial(attention, backend=name))

    return {name: partial(peer, name) for name in CONCRETE_BACKENDS}


def function_case(
    name: tuple[str, str, str],
    make: Callable[[torch.Generator], tuple[Tensor, ...]],
    plain: Function,
    peers: Mapping[str, Peer],
    device: torch.device,
    dtype: torch.dtype,
    cost: Cost | None = None,
    backward: bool = False,
    fixed: int = 0,
    **options: Any,
) -> Case:
    """A case (group, name and size, other options of `Case`) of one function, whose arguments `make` draws.

    plain: the baseline, and in higher precision the right result. peers: the others. dtype: of the results.
    backward: differentiate in all arguments but the last `fixed`.
    """
    wrap: Callable[[Function], Run] = forward_backward if backward else forward

    def inputs() -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        tensors = make(generator)
        if not backward:
            return Inputs(tensors)
        gradients = tuple(randn(generator, *out.shape, dtype=dtype) for out in forward(plain)(Inputs(tensors)))
        count = len(tensors) - fixed
        return Inputs((*(t.detach().requires_grad_() for t in tensors[:count]), *tensors[count:]), gradients)

    def variant(name: str, function: Function | str) -> Variant | str:
        ours = name == OURS
        note = ON_CPU if ours and device.type == "cpu" else ""
        return function if isinstance(function, str) else Variant(partial(wrap, function), ours, note=note)

    def build() -> Workload:
        variants = {EAGER: variant(EAGER, plain)} | {peer: variant(peer, made()) for peer, made in peers.items()}
        return Workload(inputs, variants, lambda x: wrap(plain)(x.to(wider(dtype))), dtype, cost)

    return Case(*name, (EAGER, *peers), build, **options)
