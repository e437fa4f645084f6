"""What a user might run instead, and why it cannot be had on this machine.

Plain eager PyTorch is not here: it is `ddt_kernels.reference` and `ddt_fast.model.DDT`, in the original's structure.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Run, Variant

COMPILE, MAX_AUTOTUNE = "torch.compile", "torch.compile max-autotune"
NEEDS_GPU = "needs an NVIDIA GPU"

Wrap = Callable[[Callable[..., Any]], Run]
"""Makes what is timed of a function: `cases.forward`, for example."""

Peer = Callable[[Wrap], Variant | str]
"""A variant, or the reason why it is missing here."""


def compiled(function: Callable[..., Any], autotune: bool = False) -> dict[str, Peer]:
    """`function` by torch.compile, by default and, if wanted, with max-autotune (without its CUDA graphs: launches are
    hidden, or the same for all)."""

    def peer(mode: str, wrap: Wrap) -> Variant:
        return Variant(lambda: wrap(torch.compile(function, fullgraph=True, dynamic=False, mode=mode)))

    def autotuned(wrap: Wrap) -> Variant | str:
        return peer("max-autotune-no-cudagraphs", wrap) if torch.cuda.is_available() else NEEDS_GPU

    return {COMPILE: partial(peer, "default")} | ({MAX_AUTOTUNE: autotuned} if autotune else {})


def not_installed(module: str, package: str) -> str | None:
    """Why a module cannot be imported; None if it is there."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed: pip install {package}"


def liger(function: Callable[..., Any]) -> Peer:
    """A function on Liger's kernels, if they are installed and there is a GPU for them."""

    def peer(wrap: Wrap) -> Variant | str:
        reason = not_installed("liger_kernel", "liger-kernel")
        if reason is None and not torch.cuda.is_available():
            reason = NEEDS_GPU
        return reason or Variant(lambda: wrap(function))

    return peer


def liger_rms_norm_modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Liger's RMSNorm in Llama's rounding order, which is DDT's, then PyTorch's modulation."""
    from liger_kernel.ops import LigerRMSNormFunction

    y: Tensor = LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)
    return y * (1 + scale) + shift


def liger_swiglu(x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    """Two GEMMs, and Liger's activation of both."""
    from liger_kernel.ops import LigerSiLUMulFunction

    y: Tensor = LigerSiLUMulFunction.apply(F.linear(x, w1), F.linear(x, w3))
    return y


def liger_swiglu_mlp(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """That, and the third GEMM."""
    return F.linear(liger_swiglu(x, w1, w3), w2)
