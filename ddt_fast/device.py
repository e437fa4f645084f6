"""The device and dtype to compute with, and which dtypes a CPU has units for."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from ddt_fast.checks import require
from ddt_fast.ranks import process_ranks
from ddt_fast.wording import one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 → "float32"."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def float32_as(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Inside, products and convolutions of float32 tensors are float32 ("ieee"), or on a GPU may round their inputs to
    TF32, whatever the caller's settings, which are restored. PyTorch's own default is TF32 for convolutions alone."""
    # Per operation, which no setting of another kind (torch.set_float32_matmul_precision, allow_tf32) makes raise.
    backends: Any = torch.backends
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [part.fp32_precision for part in parts]
    try:
        for part, wanted in zip(parts, (precision, precision, "ieee", "ieee"), strict=True):
            part.fp32_precision = wanted
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.fp32_precision = was


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Make cuDNN's convolutions give the same bits at every call, so that a job that was stopped and continued encodes
    or decodes like an uninterrupted one. The settings are restored."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark = False  # it would pick algorithms by their time
    cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA if available, else the CPU. Under torchrun, "cuda" is this process's own
    GPU. ValueError if the device cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = process_ranks()
    if name == "cuda" and ranks.world_size > 1:
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        allowed = "allowed: auto, cpu, cuda, cuda:N"
        raise ValueError(f"device {name!r} cannot be used here ({one_line(error)}); {allowed}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers; allowed: auto, cpu, cuda, cuda:N")
    return device


def choose_dtype(name: str, device: torch.device, latents: bool) -> torch.dtype:
    """The dtype called `name`. "auto" is bfloat16 for latent models if the device has bfloat16 units, else float32:
    small pixel models gain nothing from bfloat16."""
    if name != "auto":
        require(name in DTYPES, "dtype", name, f"auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    has_units = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    return torch.bfloat16 if latents and has_units else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 units (AVX512-BF16, AMX, or Arm's BF16). With them, bf16 GEMMs are about twice as fast
    as fp32 ones; without them, slower."""
    capabilities = cpu_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_has_int8() -> bool:
    """Whether this CPU has int8 units (VNNI, AMX, or Arm's I8MM); without them `quantize_int8` gains nothing."""
    capabilities = cpu_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm"))


def cpu_capabilities() -> Mapping[str, Any]:
    """The instruction sets of this CPU by name, such as avx512_bf16."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    amx = torch.cpu._is_amx_tile_supported()
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "avx512_vnni": torch.cpu._is_vnni_supported(),
        "amx_bf16": amx,
        "amx_int8": amx,
    }
