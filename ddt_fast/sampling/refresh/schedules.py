"""Refresh schedules: found by a probe of the model and a search, kept beside the checkpoint they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddt_fast.config import SamplingConfig
from ddt_fast.files import atomic_file
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.sampling.refresh.probe import probe_states
from ddt_fast.sampling.refresh.search import optimal_refresh_schedule, step_errors, uniform_refresh_steps

CACHE_NAME = "refresh_schedules.json"

# To be raised whenever a probe or a search finds something else than before.
_VERSION = 1
_WEIGHTS_READ_PER_TENSOR = 256

Report = Callable[[str], object]


def resolve_refresh_steps(
    model: DDT | FusedDDT,
    config: SamplingConfig,
    height: int,
    width: int,
    cache: Path | None = None,
    report: Report = print,
    progress: Callable[[], object] | None = None,
) -> SamplingConfig:
    """A configuration whose refresh_steps "dp" are step numbers; any other is returned as it is.

    The schedule is taken from the cache, or found by a probe of the model and added to it.

    Args:
        model: on the device and in the dtype to compute in.
        config: the sampling settings; num_refreshes is the budget.
        height, width: of what the model sees.
        cache: file of schedules, `schedule_cache_path` of the checkpoint; None keeps nothing.
        report: called with one line a message: what was chosen, where it comes from, a cache that is of no use.
        progress: called after every step of the probe, if there is one, as `probe_states` does.

    Raises:
        ValueError: a size that does not fit the model, or a probe that is not finite.
    """
    if config.refresh_steps != "dp":
        return config
    assert config.num_refreshes is not None, "a configuration with dp has a budget"
    key = ""
    if cache is not None:
        key = schedule_key(model, config, height, width)
        entry = _read(cache, report).get(key)
        if entry is not None:
            try:
                return _resolved(config, entry, f"from {cache}", report)
            except (KeyError, TypeError, ValueError, OverflowError):
                report(f"an entry of {cache} is not a schedule; probing again")
    started = time.perf_counter()
    probe = probe_states(model, config, height, width, progress=progress)
    steps = optimal_refresh_schedule(probe, config.num_refreshes, config.state_forecast)
    seconds = time.perf_counter() - started
    uniform = uniform_refresh_steps(config.num_steps, config.num_refreshes)
    entry = {
        "refresh_steps": list(steps),
        "mean_error": float(step_errors(probe, steps, config.state_forecast).mean()),
        "mean_error_uniform": float(step_errors(probe, uniform, config.state_forecast).mean()),
        "sampling": asdict(config),
        "size": [height, width],
    }
    resolved = _resolved(config, entry, f"from a probe of {seconds:.1f} s", report)
    if cache is not None:
        _store(cache, key, entry, report)
    return resolved


def _resolved(config: SamplingConfig, entry: dict[str, Any], source: str, report: Report) -> SamplingConfig:
    """The configuration with the steps of a cache's entry, reported in a line; any of several errors for other entries
    than `resolve_refresh_steps` makes."""
    steps = tuple(entry["refresh_steps"])
    error, uniform = float(entry["mean_error"]), float(entry["mean_error_uniform"])
    if len(steps) != config.num_refreshes:
        raise ValueError(f"{len(steps)} refresh steps; expected {config.num_refreshes}")
    resolved = replace(config, refresh_steps=steps, num_refreshes=None)
    report(
        f"refresh at {len(steps)} of {config.num_steps} steps ({', '.join(map(str, steps))}), {config.state_forecast} "
        f"between: mean predicted error {error:.3g}, uniform {uniform:.3g}; {source}"
    )
    return resolved


def schedule_cache_path(checkpoint: Path, report: Report = print) -> Path:
    """Where the schedules of a checkpoint are kept.

    refresh_schedules.json in a checkpoint folder, NAME.refresh_schedules.json beside a file; where that place cannot be
    written, or belongs to the installed package, the user's cache (XDG_CACHE_HOME, or ~/.cache), which is reported.

    Args:
        checkpoint: the local folder or file of a checkpoint.
        report: called with a line that says so, where the place is not beside the checkpoint.
    """
    beside = checkpoint / CACHE_NAME if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.name}.{CACHE_NAME}")
    package = Path(__file__).resolve().parents[2]
    in_package = package in checkpoint.resolve().parents
    if not in_package and os.access(beside.parent, os.W_OK):
        return beside
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: relative paths are ignored.
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


def _read(cache: Path, report: Report) -> dict[str, Any]:
    """The cache's entries by key; a file that cannot be read or is not a cache is reported."""
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        report(f"{cache} cannot be read ({error.strerror or error}); probing again")
        return {}
    except (ValueError, RecursionError):
        content = None
    schedules = content.get("schedules") if isinstance(content, dict) else None
    if not isinstance(schedules, dict):
        report(f"{cache} is not a cache of refresh schedules; it will be replaced")
        return {}
    return schedules


def _store(cache: Path, key: str, entry: dict[str, Any], report: Report) -> None:
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
