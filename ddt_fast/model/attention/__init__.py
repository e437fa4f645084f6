"""Attention behind one function: softmax(q·kᵀ / √D)·v per sample and head, by any of the `BACKENDS`.

    attention(q, k, v, backend="auto")

`python -m benchmarks.attention` checks and times the backends of this machine.
"""

import operator
import warnings
from functools import cache

import torch
from torch import Tensor

from ddt_fast.checks import require
from ddt_fast.device import cpu_has_bf16
from ddt_fast.model.attention.backends import BACKENDS, preferences, sdpa, unavailable
from ddt_fast.model.attention.choice import fastest, latest
from ddt_kernels.runtime import constant_result
from ddt_kernels.tuning import timing_enabled

AttentionBackend = str
""""auto", or the name of one of `BACKENDS`."""

CONCRETE_BACKENDS = tuple(BACKENDS)
ATTENTION_BACKENDS = ("auto", *CONCRETE_BACKENDS)

FEW_TOKENS_COMPILED = 256
"""Up to this many tokens, bf16 attention compiled for a CPU with bf16 units is two GEMMs with a softmax in between: for
16 heads of 72 and 256 tokens, this takes 0.6 of sdpa_flash's time. All scores are written, twice."""


def attention(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """softmax(q·kᵀ / √D)·v for every sample and head: no mask, not causal, differentiable.

    Args:
        q, k, v: (B, N, H, D), with the same shape, floating dtype and device; the stride of the last dimension is 1.
            They are usually views of one packed (B, N, 3, H, D).
        backend: one of `ATTENTION_BACKENDS`; `resolve_backend` says what "auto" means. On a GPU, only triton's
            gradients are known to repeat bit for bit.

    Returns: (B, N, H, D), in q's dtype. `.flatten(2)` gives (B, N, C); it copies if the backend returns a view
        (sdpa_math: heads outermost; backends that pad D: the unpadded columns).

    Raises: ValueError for other tensors, or for a backend that cannot be used, with the reason and usable ones.
    Works under torch.compile(fullgraph=True) if the backend does. Source: arXiv 1706.03762.
    """
    _check(q, k, v)
    if torch.compiler.is_compiling() and backend == "auto" and q.device.type == "cpu":
        if q.dtype == torch.bfloat16 and q.shape[1] <= FEW_TOKENS_COMPILED and _has_bf16():
            return _two_gemms(q, k, v)
        return sdpa(q, k, v)  # lets Inductor choose; PyTorch itself takes flash attention
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return BACKENDS[backend_for(q, backend, gradient)].call(q, k, v)


def backend_for(x: Tensor, backend: AttentionBackend, gradient: bool) -> str:
    """`resolve_backend` for tensors like x (B, N, ..., H, D), even in a compiled function."""
    if torch.compiler.is_compiling():  # B and N may be symbolic, and stay so; operator.index makes D a number
        return resolve_backend(backend, x.device, x.dtype, operator.index(x.shape[-1]), gradient=gradient)
    batch, tokens, *_, heads, head_dim = x.shape
    return resolve_backend(backend, x.device, x.dtype, head_dim, tokens, gradient, batch, heads)


@constant_result
def resolve_backend(
    backend: AttentionBackend,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int | None = None,
    gradient: bool = False,
    batch: int | None = None,
    heads: int | None = None,
) -> str:
    """The concrete backend that `attention` uses for such tensors. `tokens` is N, if known; it matters to "auto" and
    sdpa_cudnn. Whether gradients are needed, B and H, if known, matter to "auto".

    On a GPU, "auto" verifies and times the usable ones at the first call for a shape (`choice.py`), and warns once per
    case if only sdpa_math is left, which is slow and writes all N² scores. Raises ValueError if `backend` cannot be
    used: why, how to get it, and which backends are usable.
    """
    device = torch.device(device)
    if device.type != "cuda" or backend != "auto" or tokens is None or batch is None or heads is None:
        names = _usable(backend, device, dtype, head_dim, tokens, gradient, all_of_them=False)
        return (
            names[0] if len(names) == 1 or device.type != "cuda" else latest(names, dtype, device, head_dim, gradient)
        )
    names = _usable(backend, device, dtype, head_dim, tokens, gradient, all_of_them=timing_enabled())
    return fastest(names, (batch, tokens, heads, head_dim), dtype, device, gradient)


@cache
def _usable(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int | None,
    gradient: bool,
    all_of_them: bool,
) -> tuple[str, ...]:
    """That backend, or those that "auto" may take, the preferred ones first. all_of_them: others too, if any is."""

    def reason(name: str) -> str | None:
        return unavailable(name, device, dtype, head_dim, tokens)

    require(backend in ATTENTION_BACKENDS, "attention backend", backend, ", ".join(ATTENTION_BACKENDS))
    if backend != "auto":
        if (why := reason(backend)) is not None:
            usable = ", ".join(name for name in CONCRETE_BACKENDS if reason(name) is None)
            raise ValueError(f"attention backend {backend!r} cannot be used here: {why}; usable: {usable}")
        return (backend,)
    preferred = preferences(device, dtype, tokens, gradient)
    names = [name for name in preferred if reason(name) is None]
    if names and all_of_them:
        others = [name for name in CONCRETE_BACKENDS if name not in (*names, "sdpa_math")]
        names += [name for name in others if reason(name) is None]
    if preferred and not names:
        reasons = ". ".join(f"{name}: {reason(name)}" for name in preferred)
        warnings.warn(f"attention runs as sdpa_math, which is slow and writes all scores. {reasons}", stacklevel=4)
    return tuple(names) or ("sdpa_math",)


def available_backends(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """For every backend except "auto": None if it can be used for such tensors, else why not and how to get it, in one
    line."""
    return {name: unavailable(name, torch.device(device), dtype, head_dim) for name in CONCRETE_BACKENDS}


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: (B, N, H, D), the same for q, k and v")
        if x.dtype != q.dtype or not x.is_floating_point() or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}; allowed: one floating dtype and device for q, k, v")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tuple(x.stride())}; allowed: 1 for the last dimension")


def _two_gemms(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # This copy, which fuses with earlier passes, costs less than GEMMs of strided matrices.
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


_has_bf16 = constant_result(cpu_has_bf16)
