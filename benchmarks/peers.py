"""What a user might run instead, or the reason why it is missing on this machine.

Plain eager PyTorch is not here: it is `ddt_kernels.reference` and `ddt_fast.model.DDT`, in the original's structure.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Run, Variant
from ddt_fast.model.attention import CONCRETE_BACKENDS, attention, available_backends

COMPILE = "torch.compile"

Wrap = Callable[[Callable[..., Any]], Run]
"""Turns a function into a run: `harness.forward`, for example."""

Peer = Callable[[Wrap], Variant | str]
"""A variant, or the reason why it is missing here."""


def compiled(function: Callable[..., Any]) -> dict[str, Peer]:
    """`function` by torch.compile."""
    return {COMPILE: lambda wrap: Variant(lambda: wrap(torch.compile(function, fullgraph=True, dynamic=False)))}


def packed(function: Callable[..., Tensor], qkv: Tensor) -> Tensor:
    """`function` on the heads of a packed (B, N, 3, H, D)."""
    return function(*qkv.unbind(2))


def attention_backends(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Peer]:
    """Every backend on a packed qkv."""

    def peer(name: Any, wrap: Wrap) -> Variant | str:
        function = partial(packed, partial(attention, backend=name))
        return available_backends(device, dtype, head_dim)[name] or Variant(lambda: wrap(function))

    return {name: partial(peer, name) for name in CONCRETE_BACKENDS}
