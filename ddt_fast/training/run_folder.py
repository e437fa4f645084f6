"""The files of a run: its settings, the checks before it is continued, and its provenance."""

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from ddt_fast.config import Experiment
from ddt_fast.evaluation.digits_score import DigitsScore
from ddt_fast.files import atomic_file, check_replaceable, plain, write_json
from ddt_fast.model.weights import OWNED_NAMES as MODEL_NAMES
from ddt_fast.provenance import environment
from ddt_fast.training import checkpoint
from ddt_fast.training.checkpoint import list_checkpoints, read_numbers
from ddt_fast.training.log import LOG_NAMES
from ddt_fast.training.parallel import wait_for_all
from ddt_kernels.tuning import running

_NAMES = ("recipe.yaml", "model", "checkpoints", "samples.png", "curves.png", "training.json", *LOG_NAMES)
_MAY_CHANGE = {
    # The data in these places are compared by content, when they are opened and when the position in them is set.
    *("data.folder", "data.images", "data.channel_stats", "data.verify"),
    *("training.max_steps", "training.accumulation_steps"),
    *("training.parallel", "training.gradient_checkpointing", "training.compile", "training.checkpoint_every"),
    *("training.keep_checkpoints", "training.log_every", "training.sample_every", "training.sample_images"),
    *("training.score_samples", "training.init", "training.tensorboard", "training.wandb"),
}


def settings_of(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """All settings as plain JSON values."""
    return plain(asdict(experiment))


def check_continuable(
    checkpoint: Path, numbers: dict[str, Any], experiment: Experiment, frozen: Mapping[str, str | None]
) -> None:
    """ValueError if the settings would continue a checkpoint as another run; the message names them.

    How samples are drawn, how often things are written, the number of processes and how they share the work may change.
    So may the paths of data and models, which are compared by content. `numbers` is the checkpoint's trainer.json,
    `frozen` the checksums of the models that settings name, by setting. A model that is not loaded, now or then, has
    None and cannot be compared: a warning says so.
    """
    limit = experiment.training.max_steps
    if numbers["step"] > limit:
        raise ValueError(f"max_steps is {limit}, but {checkpoint} is past it; allowed: {numbers['step']} or more")
    parts = ("model", "data", "training")
    saved, ours = (
        {f"{part}.{name}": value for part in parts for name, value in given.get(part, {}).items()}
        for given in (numbers["settings"], settings_of(experiment))
    )
    changed = []
    for setting, value in ours.items():
        before = saved.get(setting)
        if setting in _MAY_CHANGE or before == value:
            continue
        change = f"{setting} was {before!r}, now {value!r}"
        if setting in frozen and before is not None and value is not None:
            sums = {numbers.get("frozen_sha256", {}).get(setting), frozen[setting]}
            if None in sums:
                warnings.warn(f"{change}: cannot tell whether it is the same model; continuing", stacklevel=2)
            if None in sums or len(sums) == 1:
                continue
            change += ", with other weights"
        changed.append(change)
    if changed:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(changed)}; use the same, or start a new run "
            f"from its weights with training.init {checkpoint / 'model'}"
        )


def prepare(folder: Path, experiment: Experiment, group: dist.ProcessGroup, keep: bool) -> None:
    """Write recipe.yaml; without `keep`, first remove an earlier run's files. All processes call it together.
    ValueError if files of the same names are not a run's."""
    check_replaceable(folder / "model", MODEL_NAMES)
    check_replaceable(folder / "checkpoints", checkpoint.OWNED_NAMES)
    check_replaceable(folder / "samples", r"\w+_step_\d+\.png")
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        stale = list((folder / "checkpoints").glob(".step_*"))
        if not keep:
            stale += [folder / name for name in _NAMES]
        for path in stale:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with atomic_file(folder / "recipe.yaml") as file:
            file.write_text(yaml.safe_dump(settings_of(experiment), sort_keys=False))
    wait_for_all(group)


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from: none, for "auto" the latest in the folder if any, or the one named. ValueError
    if the folder holds checkpoints that are later than the one named, or of another run: two histories in one folder
    could not be told apart."""
    if resume is None:
        return None
    found = list_checkpoints(folder / "checkpoints")
    if resume == "auto":
        return found[-1] if found else None
    named = Path(resume)
    if found and found[-1].resolve() != named.resolve():
        raise ValueError(
            f"{folder} holds a run that has reached {found[-1].name}; `resume` auto continues it there; to continue "
            f"from {named}, name another folder, or remove the checkpoints after it"
        )
    return named


def open_checkpoint(
    folder: Path, resume: str | None, experiment: Experiment, frozen: Mapping[str, str | None], group: dist.ProcessGroup
) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to continue from and its trainer.json; None and {} for a new run.

    All processes of the group call it together. The first one looks for all of them, because a shared file system may
    show the others an older state; only it needs `frozen` (see `check_continuable`). ValueError if this experiment
    cannot continue the checkpoint.
    """
    answer: list[Any] = [(None, {})]
    if dist.get_rank() == 0:
        try:
            if (checkpoint := find_checkpoint(folder, resume)) is not None:
                numbers = read_numbers(checkpoint)
                check_continuable(checkpoint, numbers, experiment, frozen)
                answer = [(checkpoint, numbers)]
        except (ValueError, OSError) as error:
            answer = [error]
    dist.broadcast_object_list(answer, group=group)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def write_provenance(
    folder: Path, steps: int, seconds: float, device: torch.device, scores: dict[str, DigitsScore]
) -> None:
    """Write training.json: what a reader needs to trust or repeat a run."""
    content = {
        "steps": steps,
        "training_seconds": round(seconds, 1),
        "device": device.type,
        "processes": dist.get_world_size(),
        **environment(device),
        **({"kernels": running()} if device.type == "cuda" else {}),
        "scores": {kind: asdict(score) for kind, score in scores.items()},
    }
    write_json(folder / "training.json", content)
