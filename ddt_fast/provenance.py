"""What is recorded with outputs: the weights they depend on, and the machine and versions that made them."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("ddt-fast", "triton", "numpy", "diffusers", "safetensors", "pillow")


def weights_sha256(module: torch.nn.Module) -> str:
    """Checksum of a module's weights and their names, in the dtype they are used in."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """The hardware, versions and commit, as plain JSON values."""
    return {
        "hardware": {
            "device": device_name(device),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "torch": str(torch.__version__),  # with its build, which package metadata may leave out
            **{name: version for name in PACKAGES if (version := package_version(name)) is not None},
        },
        **source_commit(),
    }


def source_commit() -> dict[str, Any]:
    """The commit of this source tree, and whether it has uncommitted changes; None for an installed package."""
    status = _git("status", "--porcelain")
    return {"commit": _git("rev-parse", "HEAD"), "uncommitted_changes": None if status is None else bool(status)}


def package_version(name: str) -> str | None:
    """The version of an installed package, else None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git prints in this checkout; None outside a checkout of ddt-fast."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
