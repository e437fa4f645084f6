"""Every implementation of attention, in one dict: `BACKENDS`.

To add one, write a function of q, k and v and add a `Backend` for it there; one that runs
without CUDA also needs a case in `unavailable`: `--attention NAME` then accepts it. On a
GPU, "auto" takes the fastest that is right (`choice.py`).
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ddt_kernels
from ddt_kernels.verification import mode

HALF = (torch.bfloat16, torch.float16)
WIDE = (*HALF, torch.float32)
CPU_DTYPES = (*WIDE, torch.float64)
MIN_CUDNN = 91501  # older versions are wrong if 128 does not divide N: PyTorch issue 169849


@dataclass(frozen=True)
class Backend:
    """An implementation of attention, and its requirements for the GPU, the tensors and the installation.

    Attributes:
        call: q, k, v (B, N, H, D) → (B, N, H, D).
        module, function: a package to look for, and what `call` uses from it, see `_imported`.
        install: how to get it.
        capability, before: the oldest compute capability that it runs on, and the first that is too new.
        dtypes: the dtypes it accepts.
        multiple, max_head_dim: a divisor of the head dimension, always 4 for float32, and its limit.
    """

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    module: str | None = None
    function: str | None = None
    install: str = "a CUDA build of PyTorch"
    capability: tuple[int, int] = (8, 0)
    before: tuple[int, int] = (1000, 0)
    dtypes: tuple[torch.dtype, ...] = HALF
    multiple: int = 8
    max_head_dim: int = 256


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _sdpa_only(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return sdpa(q, k, v)


def _sdpa_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type != "cpu":
        return _sdpa_only(SDPBackend.FLASH_ATTENTION, q, k, v)
    # Without sdpa_kernel, which would add 10 µs, a tenth of a small call.
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    return out.transpose(1, 2)


def _flash_attn(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = _imported[name](q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False)
    return out[0] if isinstance(out, tuple) else out  # some versions return (out, log-sum-exp)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _imported["xformers"](q, k, v, scale=q.shape[-1] ** -0.5)


# Limits from: flash-attention's README, hopper/ and flash_attn/cute/interface.py (flash-attn-4 4.0.0b36), xformers
# 0.0.35 ops/fmha, PyTorch's sdp_utils.cpp. FlashAttention 4 takes wider heads only on 9.x.
BACKENDS = {
    "triton": Backend(
        ddt_kernels.attention, "triton", install="pip install triton", dtypes=WIDE, multiple=4, max_head_dim=128
    ),
    "flash_attn_2": Backend(
        partial(_flash_attn, "flash_attn_2"),
        "flash_attn",
        "flash_attn_func",
        install="pip install flash-attn --no-build-isolation",
        multiple=1,
    ),
    "flash_attn_3": Backend(
        partial(_flash_attn, "flash_attn_3"),
        "flash_attn_interface",
        "flash_attn_func",
        install="build hopper/ of github.com/Dao-AILab/flash-attention",
        capability=(9, 0),
        before=(10, 0),
    ),
    "flash_attn_4": Backend(
        partial(_flash_attn, "flash_attn_4"),
        "flash_attn.cute",
        "flash_attn_func",
        install="pip install --pre flash-attn-4",
        capability=(9, 0),
        max_head_dim=128,
    ),
    "xformers": Backend(
        _xformers, "xformers.ops", "memory_efficient_attention", "pip install xformers", (7, 0), dtypes=WIDE
    ),
    "sdpa_cudnn": Backend(partial(_sdpa_only, SDPBackend.CUDNN_ATTENTION), max_head_dim=128),
    "sdpa_flash": Backend(_sdpa_flash, multiple=1),
    "sdpa_efficient": Backend(
        partial(_sdpa_only, SDPBackend.EFFICIENT_ATTENTION), capability=(5, 0), dtypes=WIDE, max_head_dim=65536
    ),
    "sdpa_math": Backend(partial(_sdpa_only, SDPBackend.MATH)),
}

FEW_TOKENS = {torch.float32: 16, torch.bfloat16: 128}
"""Up to this many tokens, training on a CPU uses sdpa_math: its backward pass gains more than its forward loses."""


def preferences(device: torch.device, dtype: torch.dtype, tokens: int | None, gradient: bool) -> tuple[str, ...]:
    """What "auto" tries, in this order, before sdpa_math; where it times, the first wins ties.

    CPU: measured with torch 2.13 on 2 cores of an AMD EPYC with AVX-512 bf16 (XL/2: B 2, N 256, H 16, D 72). sdpa_flash
    takes 0.65 of sdpa_math's time in fp32 and 0.62 in bf16; with the backward pass and few tokens, sdpa_math wins.

    CUDA: reasoned, not measured. In bf16 and fp16, triton reads q, k, v in place from the packed projection, pads a D
    of 72 to 80 (FlashAttention 2 and 3: 96), and its gradients repeat bit for bit. Then comes PyTorch's own order:
    cuDNN before flash on 9.x and 10.x. In fp32, efficient attention forms a product from three TF32 ones on tensor
    cores, two to three times as fast as the FMA units that triton uses. DDT_KERNELS=triton always puts triton first.
    """
    if device.type == "cpu":
        few = gradient and tokens is not None and tokens <= FEW_TOKENS.get(dtype, 0)
        return () if few else ("sdpa_flash",)
    if device.type != "cuda":
        return ()
    if mode() == "triton":
        return ("triton", "sdpa_flash", "sdpa_efficient")
    if dtype.itemsize > 2:
        return ("sdpa_efficient", "triton")
    if (_capability(device) or (0,))[0] in (9, 10):
        return ("triton", "sdpa_cudnn", "sdpa_flash")
    return ("triton", "sdpa_flash", "sdpa_efficient")


def unavailable(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None = None
) -> str | None:
    """Why a backend cannot be used for such tensors and how to get it, in one line; None if it can be used.

    An optional package is imported only if there is no other reason; one that is installed but cannot be imported is
    reported with its error.
    """
    if name == "sdpa_math":
        return None
    if name == "sdpa_flash" and device.type == "cpu":
        return None if dtype in CPU_DTYPES else f"takes {_names(CPU_DTYPES)}, not {_names([dtype])}"
    backend = BACKENDS[name]
    reasons = [_gpu_reason(name, backend, device, dtype)]
    if dtype not in backend.dtypes:
        reasons.append(f"takes {_names(backend.dtypes)}, not {_names([dtype])}")
    multiple = 4 if dtype == torch.float32 else backend.multiple
    if head_dim % multiple or not 1 <= head_dim <= backend.max_head_dim:
        reasons.append(f"takes head dimensions up to {backend.max_head_dim} divisible by {multiple}, not {head_dim}")
    if name == "sdpa_cudnn" and tokens == 1:
        reasons.append("takes 2 tokens or more, not 1")
    if name == "triton" and mode() == "torch":
        reasons.append("DDT_KERNELS=torch turns it off")
    elif backend.module is not None and not _is_installed(backend.module):
        reasons.append(f"{backend.module} is not installed: {backend.install}")
    elif not any(reasons):
        module, function = backend.module, backend.function
        reasons.append(_build_reason(name, backend) if module is None else _import_reason(name, module, function))
    return "; ".join(filter(None, reasons)) or None


def _capability(device: torch.device) -> tuple[int, int] | None:
    usable = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if usable else None


def _gpu_reason(name: str, backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    capability = _capability(device)
    version = "compute capability {}.{} or newer".format(*backend.capability)
    if backend.before[0] < 1000:
        version += ", below {}.{}".format(*backend.before)
    if capability is None:
        return f"needs an NVIDIA GPU of {version}; this is {device}"
    if not backend.capability <= capability < backend.before:
        return "needs {}; this is {}.{}".format(version, *capability)
    if dtype == torch.bfloat16 and capability < (8, 0):
        return "needs compute capability 8.0 for bfloat16, not {}.{}".format(*capability)
    if name == "xformers" and dtype == torch.float32 and capability > (9, 0):
        return "takes float32 up to compute capability 9.0, not {}.{}".format(*capability)
    return None


def _build_reason(name: str, backend: Backend) -> str | None:
    """What this build of PyTorch lacks."""
    if name == "sdpa_flash" and not torch.backends.cuda.is_flash_attention_available():
        return f"this PyTorch was built without it: install {backend.install}"
    version = torch.backends.cudnn.version() or 0
    if name == "sdpa_cudnn" and version < MIN_CUDNN:
        return f"needs cuDNN {MIN_CUDNN}, not {version or 'none'}: install {backend.install} that brings it"
    return None


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _is_installed(module: str) -> bool:
    """Whether a module can be found; nothing is imported, not even a parent package."""
    top, _, sub = module.partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return False
    if sub:
        return any((Path(folder) / sub).is_dir() for folder in spec.submodule_search_locations or ())
    return spec.origin is not None  # with only flash-attn-4, flash_attn has no __init__


_imported: dict[str, Callable[..., Any]] = {}
"""Functions of optional packages, by backend, imported on first use."""


def _import_reason(name: str, module: str, function: str | None) -> str | None:
    """Import what the backend calls; if that fails, return the reason."""
    try:
        if function is not None and name not in _imported:
            _imported[name] = getattr(importlib.import_module(module), function)
    except Exception as error:  # a broken binary raises anything
        message = (str(error).splitlines() or [""])[0]
        return f"{module} is installed but fails to import ({type(error).__name__}: {message})"
    return None
