"""What a measurement was made on, and by what: the record in every results file."""

import datetime
import os
import platform
import subprocess
import sys
from typing import Any

import torch

from ddt_fast.device import cpu_capabilities
from ddt_fast.provenance import device_name, package_version, source_commit

# The instruction sets that matter to PyTorch's GEMMs.
CPU_FLAGS = ("avx2", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "bf16", "i8mm")
PACKAGES = ("numpy", "triton", "flash-attn", "xformers", "liger-kernel", "diffusers", "ddt-fast")
# Environment variable that names the commit where the source came without its history.
COMMIT_VARIABLE = "DDT_FAST_COMMIT"


def environment() -> dict[str, Any]:
    """Hardware, driver, versions, commit, command and load average, ready for JSON. Call it before measuring: the load
    average says what else was running."""
    capabilities, commit, driver = cpu_capabilities(), source_commit(), _nvidia_smi("driver_version")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "date": now(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        **commit,
        "commit": commit["commit"] or os.environ.get(COMMIT_VARIABLE),
        "cpu": {
            "model": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "flags": [flag for flag in CPU_FLAGS if capabilities.get(flag)],
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": [
            {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": gpu.total_memory >> 30}
            for gpu in gpus
        ],
        "driver": driver and driver["driver_version"],
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version for name in PACKAGES if (version := package_version(name)) is not None},
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def load_average() -> list[float] | None:
    """Runnable processes over the last 1, 5 and 15 minutes; None where the system does not tell."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def gpu_state() -> dict[str, str] | None:
    """The first GPU's clocks (MHz), temperature (°C) and power (W) as nvidia-smi prints them; None without one."""
    return _nvidia_smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def _nvidia_smi(*fields: str) -> dict[str, str] | None:
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return dict(zip(fields, map(str.strip, result.stdout.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):  # absent, or another answer than asked for
        return None
