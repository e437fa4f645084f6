"""What a measurement was made on, and by what: the record that every file of results carries."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ddt_fast.provenance import package_version, source_commit

CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "bf16",
    "i8mm",
)
"""Those that PyTorch's GEMMs make a difference by, as Linux calls them."""

PACKAGES = ("numpy", "triton", "flash-attn", "xformers", "liger-kernel", "diffusers", "ddt-fast")
COMMIT_VARIABLE = "DDT_FAST_COMMIT"
"""Environment variable that says the commit where the source came without its history."""


def environment() -> dict[str, Any]:
    """Hardware, driver, versions, commit, command and load average, ready for JSON. Call it before measuring: the load
    average says what else was running."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        **_commit(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "driver": driver[0] if torch.cuda.is_available() and (driver := _nvidia_smi("driver_version")) else None,
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version for name in PACKAGES if (version := package_version(name)) is not None},
    }


def load_average() -> list[float] | None:
    """Runnable processes over the last 1, 5 and 15 minutes; None where the system does not tell."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def gpu_state() -> dict[str, float | None] | None:
    """The first GPU's clocks (MHz), temperature (°C) and power (W) as nvidia-smi reads them; None without one."""
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    values = _nvidia_smi(*fields) if torch.cuda.is_available() else None
    return None if values is None else dict(zip(fields, map(_number, values), strict=True))


def _nvidia_smi(*fields: str) -> list[str] | None:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in result.stdout.strip().split(",")]
    return values if len(values) == len(fields) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _commit() -> dict[str, Any]:
    commit = source_commit()
    if commit["commit"] is None and COMMIT_VARIABLE in os.environ:
        commit["commit"] = os.environ[COMMIT_VARIABLE]
    return commit


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(_memory() / 2**30, 1),
    }


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def _gpus() -> list[dict[str, Any]]:
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": d.name, "capability": f"{d.major}.{d.minor}", "memory_gib": round(d.total_memory / 2**30, 1)}
        for d in devices
    ]
