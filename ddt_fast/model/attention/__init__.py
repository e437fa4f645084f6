"""Attention behind one function: softmax(q·kᵀ / √D)·v per sample and head, by whichever implementation is asked for.

    attention(q, k, v, backend="auto")

`python -m ddt_fast.model.attention` (`__main__.py`) checks and times every backend on this machine; `AUTO` is refreshed
from what it prints.
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ddt_kernels
from ddt_fast.device import cpu_has_bf16

AttentionBackend = Literal[
    "auto",
    "triton",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "xformers",
    "sdpa_cudnn",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_math",
]
ATTENTION_BACKENDS: tuple[str, ...] = get_args(AttentionBackend)
CONCRETE_BACKENDS = ATTENTION_BACKENDS[1:]

HALF = (torch.bfloat16, torch.float16)
Capability = tuple[int, int]

AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("sdpa_flash", "sdpa_math"),
    "cpu, gradients of few tokens": ("sdpa_math",),
    "cuda, 2 bytes": ("triton", "sdpa_flash", "sdpa_efficient", "sdpa_math"),
    "cuda, 2 bytes, 9.x and 10.x": ("triton", "sdpa_cudnn", "sdpa_flash", "sdpa_math"),
    "cuda, 4 bytes": ("sdpa_efficient", "triton", "sdpa_math"),
    "other": ("sdpa_math",),
}
"""What "auto" takes: the first of its row that `available_backends` has for the compute capability, dtype and head dim.

cpu: MEASURED by `python -m ddt_fast.model.attention --device cpu --threads 2` on 2 cores of an AMD EPYC with AVX-512
    bf16, torch 2.13, in one run; time of sdpa_math over that of sdpa_flash, forward (and with backward), by B, N, H, D:

                     fp32         bf16                            fp32         bf16
    256, 16, 2, 32   0.68 (0.58)  1.20 (0.12)    2, 256, 16, 64   1.67 (1.18)  1.71 (1.11)
    32, 16, 16, 72   0.90 (0.78)  1.27 (0.23)    2, 256, 16, 72   1.53 (1.12)  1.60 (1.08)
    2, 16, 16, 72    1.49 (1.11)  2.04 (0.41)    2, 256, 8, 128   1.53 (1.08)  1.59 (1.19)
    64, 32, 2, 32    1.42 (0.94)  1.87 (0.31)    1, 1024, 16, 72  2.75 (1.72)  2.71 (2.08)
    2, 128, 16, 72   1.26 (0.96)  1.40 (0.64)

    Hence sdpa_flash, but where a gradient is asked for with no more than `FEW_TOKENS`. (fp32 with 16 tokens could go
    either way: it depends on how many heads there are in all.)

cuda: REASONED, NOT MEASURED: nothing here has been timed on a GPU.
    2 bytes (bf16, fp16): triton reads q, k, v in place from the packed projection and pads D to a sum of two powers of
    two (72 to 80; FlashAttention 2 and 3 take 96), never wider than they do; its gradients repeat bit for bit. Without
    triton, or for D above 128, PyTorch's own order: cuDNN before flash on 9.x and 10.x.
    4 bytes (fp32): PyTorch's efficient attention forms fp32 products from three TF32 ones on tensor cores, which is
    a third of their TF32 rate and two to three times that of the FMA units the Triton kernel is left to.
    Below 8.0 there is efficient attention alone, above fp32 (fp64) sdpa_math alone.

No row names an optional package: installing one must not change anybody's samples. Name it once you have timed it.
"""
FEW_TOKENS = {torch.float32: 16, torch.bfloat16: 128}
"""Up to so many tokens a CPU's sdpa_math is taken for training: its backward pass gains more than its forward loses."""

FEW_TOKENS_COMPILED = 256
"""Up to so many tokens, bf16 attention compiled for a CPU with bf16 units is two GEMMs and a softmax between: with 16
heads of 72 and 256 tokens 0.6 of sdpa_flash's time, where AUTO was measured. All scores are written, twice."""


@dataclass(frozen=True)
class _Needs:
    """What a backend needs of a GPU, the tensors and the installation.

    module: looked for; function: imported from it and called, unless ddt_kernels does. before: the first compute
    capability that is too new. row_bytes divides the head dim times the element size, `multiple` the head dim.
    """

    install: str
    module: str | None = None
    function: str | None = "flash_attn_func"
    capability: Capability = (8, 0)
    before: Capability | None = None
    dtypes: tuple[torch.dtype, ...] = HALF
    row_bytes: int = 1
    multiple: int = 1
    max_head_dim: int = 256


_PYTORCH = "a CUDA build of PyTorch"
# Sources: flash-attention's README, hopper/ and flash_attn/cute/interface.py (flash-attn-4 4.0.0b36), xformers 0.0.35
# ops/fmha, PyTorch's sdp_utils.cpp. FlashAttention 4 takes wider heads on 9.x alone.
_NEEDS = {
    "triton": _Needs("pip install triton", "triton", None, dtypes=(*HALF, torch.float32), multiple=4, max_head_dim=128),
    "flash_attn_2": _Needs("pip install flash-attn --no-build-isolation", "flash_attn"),
    "flash_attn_3": _Needs(
        "build hopper/ of github.com/Dao-AILab/flash-attention",
        "flash_attn_interface",
        capability=(9, 0),
        before=(10, 0),
        row_bytes=16,
    ),
    "flash_attn_4": _Needs(
        "pip install --pre flash-attn-4", "flash_attn.cute", capability=(9, 0), row_bytes=16, max_head_dim=128
    ),
    "xformers": _Needs(
        "pip install xformers",
        "xformers.ops",
        "memory_efficient_attention",
        capability=(7, 0),
        dtypes=(*HALF, torch.float32),
        row_bytes=16,
    ),
    "sdpa_cudnn": _Needs(_PYTORCH, row_bytes=16, max_head_dim=128),
    "sdpa_flash": _Needs(_PYTORCH),
    "sdpa_efficient": _Needs(
        _PYTORCH, capability=(5, 0), dtypes=(*HALF, torch.float32), row_bytes=16, max_head_dim=65536
    ),
}
MIN_CUDNN = 91501  # older ones are wrong where 128 does not divide N: PyTorch issue 169849

_loaded: dict[str, Callable[..., Any]] = {}
"""The functions of optional packages, imported when first wanted."""


def attention(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """softmax(q·kᵀ / √D)·v for every sample and head: no mask, not causal, differentiable.

    Args:
        q, k, v: (B, N, H, D), one shape, floating dtype and device, any strides but for the last dimension's, which
            is 1: usually views of one packed (B, N, 3, H, D).
        backend: one of `ATTENTION_BACKENDS`; "auto": see `AUTO`, and `resolve_backend` for what it comes to. On a
            GPU only triton's gradients are known to repeat bit for bit.

    Returns: (B, N, H, D), q's dtype. `.flatten(2)` gives (B, N, C) for all; it copies where the backend returns a view
        (sdpa_math: heads outermost; where a backend pads D: the unpadded columns).

    Raises: ValueError on other tensors, or a backend that cannot be used, with the reason and those that can.
    Works under torch.compile(fullgraph=True), as far as the named backend does. Source: arXiv 1706.03762.
    """
    _check(q, k, v)
    compiling = torch.compiler.is_compiling()
    if compiling and backend == "auto" and q.device.type == "cpu":
        if q.dtype == torch.bfloat16 and q.shape[1] <= FEW_TOKENS_COMPILED and _has_bf16():
            return _two_gemms(q, k, v)
        return _sdpa(q, k, v)  # lets inductor choose; left to PyTorch it is flash attention
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _RUN[backend_for(q, backend, gradient)](q, k, v)


def backend_for(x: Tensor, backend: AttentionBackend, gradient: bool) -> str:
    """`resolve_backend` for tensors like x (B, N, ..., D), in a compiled function too."""
    # While compiling N may be symbolic, and stays so; operator.index makes D the number that it always is.
    head_dim, tokens = operator.index(x.shape[-1]), None if torch.compiler.is_compiling() else x.shape[1]
    return resolve_backend(backend, x.device, x.dtype, head_dim, tokens, gradient)


@torch.compiler.assume_constant_result
def resolve_backend(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int | None = None,
    gradient: bool = False,
) -> str:
    """The concrete backend that `attention` uses for such tensors, for callers to print.

    tokens: N, if known; gradient: whether one will be asked for; both matter to "auto" alone, and tokens to sdpa_cudnn.
    "auto" warns, once per case, where on a GPU nothing is left but sdpa_math, which is slow and writes all N² scores.
    Raises ValueError if `backend` cannot be used: why, how to get it, what can be.
    """
    return _resolve(backend, torch.device(device), dtype, head_dim, tokens, gradient)


@cache
def _resolve(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None, gradient: bool
) -> str:
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend is {backend!r}; allowed: {', '.join(ATTENTION_BACKENDS)}")
    if backend == "auto":
        return _automatic(device, dtype, head_dim, tokens, gradient)
    reason = _reason(backend, device, dtype, head_dim, tokens)
    if reason is not None:
        usable = [name for name in CONCRETE_BACKENDS if _reason(name, device, dtype, head_dim, tokens) is None]
        raise ValueError(f"attention backend {backend!r} cannot be used here: {reason}; usable: {', '.join(usable)}")
    return backend


def _automatic(device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None, gradient: bool) -> str:
    kind, capability = _hardware(device)
    row = kind if kind in AUTO else "other"
    if kind == "cpu" and gradient and tokens is not None and tokens <= FEW_TOKENS.get(dtype, 0):
        row = "cpu, gradients of few tokens"
    elif kind == "cuda":
        row = "cuda, 4 bytes" if dtype.itemsize > 2 else "cuda, 2 bytes"
        if dtype.itemsize == 2 and capability is not None and capability[0] in (9, 10):
            row = "cuda, 2 bytes, 9.x and 10.x"
    reasons = {}
    for name in AUTO[row]:
        reasons[name] = _reason(name, device, dtype, head_dim, tokens)
        if reasons[name] is None:
            break
    if name == "sdpa_math" and len(reasons) > 1:
        others = ". ".join(f"{other}: {reason}" for other, reason in reasons.items() if reason)
        warnings.warn(f"attention runs as sdpa_math, which is slow and writes all scores. {others}", stacklevel=4)
    return name


def available_backends(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """Every backend but "auto": None if it can be used for such tensors, else one line: why not, and how to get it.

    An optional package is looked for, and imported only if nothing else speaks against it; one that is installed but
    cannot be imported is reported with its error.
    """
    return {name: _reason(name, torch.device(device), dtype, head_dim) for name in CONCRETE_BACKENDS}


def _hardware(device: torch.device) -> tuple[str, Capability | None]:
    """(device type, compute capability); None where it has none, or PyTorch sees no such GPU."""
    usable = device.type == "cuda" and torch.cuda.is_available()
    return device.type, torch.cuda.get_device_capability(device) if usable else None


def _reason(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None = None
) -> str | None:
    """Why `backend` cannot be used, in one line; None if it can."""
    if backend == "sdpa_math":
        return None
    kind, capability = _hardware(device)
    needs = _NEEDS[backend]
    if backend == "sdpa_flash" and kind == "cpu":
        allowed = (*HALF, torch.float32, torch.float64)
        return None if dtype in allowed else f"takes {_names(allowed)}, not {_names((dtype,))}"
    reasons = []
    version = "compute capability {}.{} or newer".format(*needs.capability)
    if needs.before is not None:
        version += ", below {}.{}".format(*needs.before)
    if capability is None:
        reasons.append(f"needs an NVIDIA GPU of {version}; this is {device}")
    elif not needs.capability <= capability < (needs.before or (1000, 0)):
        reasons.append("needs {}; this is {}.{}".format(version, *capability))
    elif dtype == torch.bfloat16 and capability < (8, 0):
        reasons.append("needs compute capability 8.0 for bfloat16, not {}.{}".format(*capability))
    elif backend == "xformers" and dtype == torch.float32 and capability > (9, 0):
        reasons.append("takes float32 up to compute capability 9.0, not {}.{}".format(*capability))
    if dtype not in needs.dtypes:
        reasons.append(f"takes {_names(needs.dtypes)}, not {_names((dtype,))}")
    multiple = max(needs.multiple, needs.row_bytes // dtype.itemsize)
    if head_dim % multiple or not 1 <= head_dim <= needs.max_head_dim:
        reasons.append(f"takes head dimensions up to {needs.max_head_dim} divisible by {multiple}, not {head_dim}")
    if backend == "sdpa_cudnn" and tokens == 1:
        reasons.append("takes 2 tokens or more, not 1")
    if needs.module is None:
        if not reasons:
            reasons += _build_reasons(backend)
    elif not _installed(needs.module):
        reasons.append(f"{needs.module} is not installed: {needs.install}")
    elif not reasons and needs.function is not None and backend not in _loaded:
        reasons += _load(backend, needs.module, needs.function)
    return "; ".join(reasons) or None


def _build_reasons(backend: str) -> list[str]:
    """What this build of PyTorch lacks."""
    if backend == "sdpa_flash" and not torch.backends.cuda.is_flash_attention_available():
        return [f"this PyTorch was built without it: install {_PYTORCH}"]
    if backend == "sdpa_cudnn":
        version = torch.backends.cudnn.version() or 0
        if version < MIN_CUDNN:
            return [f"needs cuDNN {MIN_CUDNN}, not {version or 'none'}: install {_PYTORCH} that brings it"]
    return []


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _installed(module: str) -> bool:
    """Whether it can be found; nothing is imported, not even a parent package."""
    top, _, sub = module.partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return False
    if sub:
        return any((Path(folder) / sub).is_dir() for folder in spec.submodule_search_locations or ())
    return spec.origin is not None  # flash-attn-4 alone leaves a flash_attn without an __init__


def _load(backend: str, module: str, function: str) -> list[str]:
    """Import what the backend calls; on failure the reason, in a list."""
    try:
        _loaded[backend] = getattr(importlib.import_module(module), function)
    except Exception as error:  # a broken binary raises anything
        message = (str(error).splitlines() or [""])[0]
        return [f"{module} is installed but fails to import ({type(error).__name__}: {message})"]
    return []


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: (B, N, H, D), one for q, k and v")
        if x.dtype != q.dtype or not x.is_floating_point() or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}; allowed: one floating dtype and device for q, k, v")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tuple(x.stride())}; allowed: a last one of 1")


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _two_gemms(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # GEMMs of strided matrices are slower by more than the copy, which the passes before it make anyway.
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


_has_bf16 = torch.compiler.assume_constant_result(cpu_has_bf16)


def _sdpa_only(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return _sdpa(q, k, v)


def _sdpa_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type != "cpu":
        return _sdpa_only(SDPBackend.FLASH_ATTENTION, q, k, v)
    # Without sdpa_kernel, whose 10 µs are a tenth of a small call.
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    return out.transpose(1, 2)


def _flash_attn(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = _loaded[backend](q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False)
    return out[0] if isinstance(out, tuple) else out  # versions 3 and 4 used to, or do, return (out, log-sum-exp)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _loaded["xformers"](q, k, v, scale=q.shape[-1] ** -0.5)


_RUN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "triton": ddt_kernels.attention,
    "flash_attn_2": partial(_flash_attn, "flash_attn_2"),
    "flash_attn_3": partial(_flash_attn, "flash_attn_3"),
    "flash_attn_4": partial(_flash_attn, "flash_attn_4"),
    "xformers": _xformers,
    "sdpa_cudnn": partial(_sdpa_only, SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": _sdpa_flash,
    "sdpa_efficient": partial(_sdpa_only, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_math": partial(_sdpa_only, SDPBackend.MATH),
}
