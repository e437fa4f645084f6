"""Refresh schedules: found by a probe of the model and a search, and kept beside the checkpoint."""

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
from ddt_fast.files import read_json, write_json
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.sampling.refresh.probe import probe_states
from ddt_fast.sampling.refresh.search import optimal_refresh_schedule, step_errors, uniform_refresh_steps

CACHE_NAME = "refresh_schedules.json"

# Raise this when a probe or a search would give another result than before.
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
    """Replace refresh_steps "dp" with step numbers; any other configuration is returned unchanged.

    The schedule comes from the cache, or from a probe of the model, and is then added to the cache. ValueError if the
    size does not fit the model, or the probe is not finite.

    Args:
        model: the model, on the device and in the dtype to compute with.
        config: the sampling settings; num_refreshes is the budget.
        height, width: size of the model's input.
        cache: file of schedules, `schedule_cache_path` of the checkpoint; None keeps nothing.
        report: called with messages of one line: the choice and its source, or why a cache cannot be used.
        progress: called after every step of the probe, if there is one, as by `probe_states`.
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
    """The configuration with the steps of a cache's entry, which is reported; raises several kinds of errors for an
    entry that `resolve_refresh_steps` did not make."""
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
    """Where the schedules of a local checkpoint are kept: refresh_schedules.json in its folder, or
    NAME.refresh_schedules.json beside a file. If that place cannot be written or belongs to the installed package, in
    the user's cache (XDG_CACHE_HOME, or ~/.cache), and one line of `report` says so."""
    beside = checkpoint / CACHE_NAME if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.name}.{CACHE_NAME}")
    package = Path(__file__).resolve().parents[2]
    in_package = package in checkpoint.resolve().parents
    if not in_package and os.access(beside.parent, os.W_OK):
        return beside
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    elsewhere = root / "ddt_fast" / CACHE_NAME
    reason = "belongs to the package" if in_package else "cannot be written"
    report(f"{beside.parent} {reason}; refresh schedules are kept in {elsewhere}")
    return elsewhere


def schedule_key(model: DDT | FusedDDT, config: SamplingConfig, height: int, width: int) -> str:
    """SHA-256 of what a schedule depends on: the model's shape and weights, the settings that the probe and the search
    read, and the image size.

    It reads about 256 evenly spread values of every tensor, in float32: enough to tell checkpoints of one run apart.
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
        schedules = read_json(cache).get("schedules")
    except FileNotFoundError:
        return {}
    except OSError as error:
        report(f"{cache} cannot be read ({error.strerror or error}); probing again")
        return {}
    except ValueError:
        schedules = None
    if not isinstance(schedules, dict):
        report(f"{cache} is not a cache of refresh schedules; it will be replaced")
        return {}
    return schedules


def _store(cache: Path, key: str, entry: dict[str, Any], report: Report) -> None:
    """Add an entry to the cache, whole or not at all; a cache that cannot be written is reported, and is not an error.
    If two processes store at the same moment, one entry may be lost, which costs another probe."""
    try:
        # Read again: during the probe, another process may have added entries.
        schedules = {**_read(cache, lambda _: None), key: entry}
        write_json(cache, {"version": _VERSION, "schedules": schedules})
    except OSError as error:
        report(f"the schedule could not be kept in {cache}: {error.strerror or error}")
