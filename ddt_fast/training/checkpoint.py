"""Checkpoints of a run: saved while training continues, whole or not at all, and loaded by any number of processes.

checkpoints/step_0010000/state/          weights, average, optimiser: torch.distributed.checkpoint, sharded
checkpoints/step_0010000/trainer.json    step, position in the data, settings
checkpoints/step_0010000/model/          the averaged weights as a model folder, for sampling
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ddt_fast.files import read_json, sync, sync_folder
from ddt_fast.model.lightning import LightningWeights
from ddt_fast.model.settings import read_settings
from ddt_fast.training.parallel import patient_group
from ddt_fast.training.state import TrainingState, released_weights
from ddt_fast.training.state_reader import StateReader
from ddt_fast.weight_files import reason
from ddt_fast.wording import warn

_NAME = re.compile(r"step_(\d+)")
OWNED_NAMES = r"\.?step_\d+(\.old)?"
VERSION = 1
TRAINER = "trainer.json"
# The warning comes from a background thread, out of reach of a filter around the call.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")


class Checkpoints:
    """The checkpoints of one run.

    All processes construct one and call its methods together. `save` copies the tensors to the CPU; the rest happens in
    the background. A checkpoint gets its name when all of it is on the disk. The latest `keep` are kept, or with 0
    all; `continued` is the one that the run continues from, if any.
    """

    def __init__(self, folder: Path, keep: int, continued: Path | None) -> None:
        self._folder = folder / "checkpoints"
        self._keep = keep
        self._first = dist.get_rank() == 0
        # The latest complete checkpoint; never rewritten, so that it is never missing, not even for a moment.
        self._latest = None if continued is None else continued.resolve()
        # A separate group: background messages must not mix with those of training.
        self._group = patient_group()
        self._saving: Future[None] | None = None

    def save(
        self, state: TrainingState, numbers: dict[str, Any], save_model: Callable[[Path], None], wait: bool = False
    ) -> None:
        """Save a checkpoint of the state's step, unless there is one; first wait for the previous save.

        Args:
            state: what to save.
            numbers: the content of trainer.json.
            save_model: writes the model folder; called in the first process, in the background.
            wait: return when the checkpoint is on the disk; OSError if it could not be written. Without it, that is a
                warning: training continues, and earlier checkpoints stay.
        """
        self.close()
        name = f"step_{state.step:07d}"
        temporary = self._folder / f".{name}"
        present = torch.tensor(self._latest == (self._folder / name).resolve())
        if self._first:
            shutil.rmtree(temporary, ignore_errors=True)
        # The first process decides: another may have written its part without the rest.
        dist.broadcast(present, 0, group=self._group)
        if present:
            return
        # A single process does not communicate: that would leave threads that slow down training on a CPU.
        alone = dist.get_world_size() == 1
        target = temporary / "state"
        started = dcp.async_save(state.tensors(), checkpoint_id=target, process_group=self._group, no_dist=alone)
        written = cast(Future[Any], started)
        content = json.dumps({"version": VERSION, **numbers}, indent=2) + "\n"

        def finish() -> None:
            try:
                written.result()
                if not self._first:
                    return
                save_model(temporary / "model")
                (temporary / TRAINER).write_text(content)
                sync_folder(temporary)
                temporary.rename(self._folder / name)
                sync(self._folder)
                sync(self._folder.parent)
                self._latest = (self._folder / name).resolve()
                for stale in list_checkpoints(self._folder)[: -self._keep] if self._keep else ():
                    _remove(stale)
            except BaseException:
                if self._first:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise

        # A new thread for each checkpoint: OpenMP counts threads that only wait, and slows down training on a CPU.
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving = thread.submit(finish)
        thread.shutdown(wait=False)
        if wait:
            self.close(strict=True)

    def close(self, strict: bool = False) -> None:
        """Wait for the save in progress. If it fails, warn, or, if strict, raise OSError."""
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        except (OSError, CheckpointException, RuntimeError) as error:
            message = f"the checkpoint could not be saved: {failure(error)}"
            if strict:
                raise OSError(message) from error
            warn(f"{message}; training continues, earlier checkpoints are kept")


def failure(error: BaseException) -> str:
    """Why saving or loading failed in any of the processes, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return reason(error)


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a run's checkpoints/ folder, the latest last."""
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def read_numbers(checkpoint: Path) -> dict[str, Any]:
    """Read trainer.json of a checkpoint; ValueError if the folder is not a run's checkpoint or has another version."""
    file = checkpoint / TRAINER
    if not file.is_file() or not (checkpoint / "state" / ".metadata").is_file():
        raise ValueError(f"{checkpoint} is not a checkpoint of a run; expected RUN/checkpoints/step_0010000 or such")
    numbers = read_json(file)
    if numbers.get("version") != VERSION:
        raise ValueError(f"{file} has version {numbers.get('version')}; this ddt-fast reads version {VERSION}")
    return numbers


def load_state(checkpoint: Path, state: TrainingState) -> None:
    """Fill the state's tensors from a checkpoint that any number of processes wrote. All processes call it together.
    ValueError if files are missing, damaged or of another model."""
    reader = StateReader(checkpoint / "state")
    try:
        reader.read_metadata()  # dcp.load of torch 2.11 does not say why it failed
        dcp.load(state.tensors(), storage_reader=reader, no_dist=dist.get_world_size() == 1)
    except (Exception, CheckpointException) as error:  # the unpickler may raise anything on damaged bytes
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {failure(error)}") from error


def newest_checkpoint(folder: Path) -> Path | None:
    """The folder itself if it is a checkpoint, the latest checkpoint if it is a run, else None; ValueError for a run
    without a finished checkpoint."""
    if (folder / TRAINER).is_file():
        return folder
    if not (folder / "recipe.yaml").is_file() or not (folder / "checkpoints").is_dir():
        return None
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        raise ValueError(f"{folder} holds a run without a finished checkpoint")
    return found[-1]


def read_checkpoint(checkpoint: Path) -> LightningWeights:
    """Read the averaged and the trained weights of a checkpoint, and REPA's projector, by released names, on the CPU.
    ValueError if the folder is not a checkpoint, or is damaged."""
    numbers, config = read_numbers(checkpoint), read_settings(checkpoint / TRAINER).model
    state: dict[str, dict[str, Tensor]] = {"weights": {}, "ema": {}}
    try:
        fused = numbers["settings"]["training"]["engine"] == "fused"
        reader = StateReader(checkpoint / "state")
        described = reader.read_metadata().state_dict_metadata
        for key, tensor in described.items():
            part, _, name = key.partition(".")
            if part in state:
                state[part][name] = torch.empty(tensor.size, dtype=tensor.properties.dtype)  # type: ignore[union-attr]
        dcp.load(state, storage_reader=reader, no_dist=True)
        ema = released_weights(config, fused, state["ema"])
        raw = released_weights(config, fused, _below("denoiser.", state["weights"]))
    except (Exception, CheckpointException) as error:  # the unpickler may raise anything on damaged bytes
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {failure(error)}") from error
    return LightningWeights(ema, raw, _below("projector.", state["weights"]), [])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _remove(folder: Path) -> None:
    """Remove a folder such that a kill in between leaves nothing that looks complete."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
