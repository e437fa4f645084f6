"""Refresh schedules on disk: found once by a probe, kept beside the checkpoint they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddt_fast.config import SamplingConfig
from ddt_fast.files import atomic_file
from ddt_fast.model import DDT, FusedDDT

CACHE_NAME = "refresh_schedules.json"

# To be raised whenever a probe or a search would find something else than before.
_VERSION = 1
_WEIGHTS_READ_PER_TENSOR = 256

Report = Callable[[str], object]


def schedule_cache_path(checkpoint: Path, report: Report = print) -> Path:
    """Where the schedules of a checkpoint are kept.

    refresh_schedules.json in a checkpoint folder, NAME.refresh_schedules.json beside a file; where that place cannot be
    written, or belongs to the installed package, the user's cache (XDG_CACHE_HOME, or ~/.cache), which is reported.

    Args:
        checkpoint: the local folder or file of a checkpoint.
        report: called with a line that says so, where the place is not beside the checkpoint.
    """
    beside = checkpoint / CACHE_NAME if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.name}.{CACHE_NAME}")
    package = Path(__file__).resolve().parent.parent
    in_package = package in checkpoint.resolve().parents
    if not in_package and os.access(beside.parent, os.W_OK):
        return beside
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: relative paths are to be ignored.
    root = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    elsewhere = root / "ddt_fast" / CACHE_NAME
    reason = "belongs to the package" if in_package else "cannot be written"
    report(f"{beside.parent} {reason}; refresh schedules are kept in {elsewhere}")
    return elsewhere


def schedule_key(model: DDT | FusedDDT, config: SamplingConfig, height: int, width: int) -> str:
    """What a schedule depends on, as a SHA-256: the model's shape and weights, the settings that a probe and a search
    read, and the image size.

    Of every weight about 256 values are read, evenly spread, in float32: enough to tell checkpoints of one run apart.
    """
    settings = asdict(config)
    for unread in ("refresh_every", "refresh_steps", "guidance_forecast", "cuda_graphs"):
        del settings[unread]
    # Only whether the unconditional branch reuses states matters.
    settings["guidance_every"] = settings["guidance_every"] == 1
    description = {
        "version": _VERSION,
        "model": asdict(model.config),
        "dtype": str(next(model.parameters()).dtype),
        "sampling": settings,
        "size": [height, width],
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            values = value.detach().flatten()[:: max(1, value.numel() // _WEIGHTS_READ_PER_TENSOR)]
            digest.update(name.encode())
            digest.update(values.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_schedule(cache: Path, key: str, report: Report) -> dict[str, Any] | None:
    """The entry of that key, or None; a file that cannot be read or is no cache is reported."""
    entry = _read(cache, report).get(key)
    if entry is not None and not isinstance(entry, dict):
        report(f"an entry of {cache} is no schedule; probing again")
        return None
    return entry


def store_schedule(cache: Path, key: str, entry: dict[str, Any], report: Report) -> None:
    """Add an entry to the cache, whole or not at all. A cache that cannot be written is reported, not an error.

    Of two processes that store at the same moment the later one's file stands: it may lack the other's entry, which
    then costs another probe.
    """
    try:
        # Read again at the last moment: a probe takes long enough for another process to have added entries.
        schedules = {**_read(cache, lambda _: None), key: entry}
        with atomic_file(cache) as temporary:
            temporary.write_text(json.dumps({"version": _VERSION, "schedules": schedules}, indent=1) + "\n")
    except OSError as error:
        report(f"the schedule could not be kept in {cache}: {error.strerror or error}")


def _read(cache: Path, report: Report) -> dict[str, Any]:
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        report(f"{cache} cannot be read ({error.strerror or error}); probing again")
        return {}
    except (ValueError, RecursionError):
        report(f"{cache} is corrupt; it is made anew")
        return {}
    schedules = content.get("schedules") if isinstance(content, dict) else None
    if not isinstance(schedules, dict):
        report(f"{cache} is no cache of refresh schedules; it is made anew")
        return {}
    return schedules
