"""The log of a training run: JSON lines, and TensorBoard and Weights & Biases on request."""

import importlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from ddt_fast.files import atomic_file
from ddt_fast.wording import one_line, warn

LOG_NAMES = ("log.jsonl", "samples", "tensorboard", "wandb", "wandb_run.txt")
"""Everything that a TrainingLog writes into its folder."""


class TrainingLog:
    """The log of one run, in its folder; construct it in the first process only, and use it as a context manager.

    log.jsonl gets a line for each write: step, the metrics, and "seconds" of training so far, earlier parts of the run
    included. NaN and infinite metrics are null, because JSON has no such numbers; TensorBoard and W&B get them
    unchanged. Samples go to samples/NAME_step_0000100.png. Steps must ascend.

    A resumed run continues from the step of its checkpoint. A killed run may have logged more than it saved, so later
    steps are dropped from log.jsonl and TensorBoard, and an incomplete last line too. W&B resumes the run whose id is
    in wandb_run.txt and ignores steps that it has seen. W&B obeys its environment variables (WANDB_MODE,
    WANDB_API_KEY). If TensorBoard or W&B fails during the run, it is left out from then on, with a warning. ValueError
    if a package is missing, W&B is not logged in or refuses, a new run cannot reach W&B (a resumed one continues
    offline, with a warning), or the log.jsonl to continue is damaged.

    Args:
        folder: the run's folder; created if missing.
        tensorboard: write event files to folder/tensorboard.
        wandb: project at Weights & Biases; None logs nothing there.
        settings: nested dict of the run's settings, for W&B's config.
        first_step: step of the checkpoint that the run continues from; 0 starts new logs, and a new run at W&B.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool = False,
        wandb: str | None = None,
        *,
        settings: dict[str, Any],
        first_step: int = 0,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [row for row in read_log(path) if row["step"] <= first_step] if first_step and path.exists() else []
        self._watchers: list[_TensorBoard | _WandB] = []
        if tensorboard:
            self._watchers.append(_TensorBoard(folder, first_step))
        if wandb is not None and _wandb().setup().settings.mode != "disabled":
            self._watchers.append(_WandB(folder, wandb, settings, first_step))
        with atomic_file(path) as file:
            file.write_text("".join(map(_line, kept)))
        self._file = path.open("a")
        self._started = time.perf_counter() - (kept[-1].get("seconds", 0.0) if kept else 0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step; OSError if the line cannot be written."""
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(_line({"step": step, **values, "seconds": round(time.perf_counter() - self._started, 3)}))
        self._file.flush()
        self._tell_watchers(lambda watcher: watcher.write(step, values))

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Save a picture of a step as samples/NAME_step_0000100.png; OSError if it cannot be written."""
        with atomic_file(self.folder / "samples" / f"{name}_step_{step:07d}.png") as file:
            image.save(file)
        self._tell_watchers(lambda watcher: watcher.image(step, name, image))

    def close(self, failed: bool = False) -> None:
        """Finish all files and uploads. W&B gets at most a minute to upload (WANDB_FINISH_TIMEOUT, in seconds), and
        marks a failed run as failed."""
        self._file.close()
        self._tell_watchers(lambda watcher: watcher.close(failed))
        self._watchers = []

    def _tell_watchers(self, action: Callable[["_TensorBoard | _WandB"], None]) -> None:
        for watcher in tuple(self._watchers):
            # A run of days must not fail because a log does.
            try:
                action(watcher)
            except Exception as error:
                self._watchers.remove(watcher)
                warn(f"{watcher.name} failed and is switched off for the rest of the run: {one_line(error)}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, as numbers and None by name, without an incomplete last one; ValueError if another line
    is not a JSON object with a step."""
    rows = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines) or row is not None:
            raise ValueError(f"{path}, line {number}: not a line of a training log, {line[:60]!r}; remove it")
    return rows


def _line(row: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            raise ValueError("logging to TensorBoard needs a package: pip install tensorboard") from error
        self._writer = writer(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        # A resumed run does not log again what a kill left unwritten before the checkpoint.
        self._writer.flush()

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandB:
    """A run at W&B; it is continued if first_step is above 0 and the folder has an id."""

    name = "W&B"

    def __init__(self, folder: Path, project: str, settings: dict[str, Any], first_step: int) -> None:
        wandb = self._wandb = _wandb()
        own = wandb.setup().settings
        online = own.mode not in ("offline", "dryrun")
        id_file = folder / "wandb_run.txt"
        resumed = first_step > 0 and id_file.is_file()
        options = {
            "project": project,
            "dir": str(folder),
            "id": id_file.read_text().strip() if resumed else None,
            "name": folder.resolve().name,
            "config": settings,
            # A resumed run may have other settings; `run_folder` has checked them.
            "allow_val_change": True,
            # Never the run that a caller has open, nor the global one.
            "reinit": "create_new",
            "settings": wandb.Settings(finish_timeout=own.finish_timeout or 60.0),
        }
        try:
            # wandb.init would ask for the key, and nobody is there to answer a job.
            if online and not wandb.login(prompt=False, verify=False):
                raise ValueError(
                    "Weights & Biases is not logged in here; run `wandb login`, set WANDB_API_KEY, or set "
                    "WANDB_MODE=offline and upload later with `wandb sync`"
                )
            # Offline, W&B ignores `resume`, and `wandb sync` appends by the id.
            self._run = wandb.init(**options, resume="allow" if resumed and online else None)
        except wandb.errors.CommError as error:
            reason = f"Weights & Biases cannot be reached ({one_line(error)})"
            if not resumed or isinstance(error, wandb.errors.AuthenticationError):
                raise ValueError(f"{reason}; set WANDB_MODE=offline to continue without it") from error
            warn(f"{reason}; logging offline, upload later with `wandb sync`")
            wandb.teardown()  # otherwise the id counts as in use
            self._run = wandb.init(**options, mode="offline")
        except wandb.errors.Error as error:
            raise ValueError(f"Weights & Biases: {one_line(error)}") from error
        with atomic_file(id_file) as file:
            file.write_text(self._run.id + "\n")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb() -> Any:
    """W&B's package. A folder called wandb here, such as W&B's own, would be imported as an empty package."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        wandb = None
    if not hasattr(wandb, "setup"):
        raise ValueError("logging to Weights & Biases needs a package: pip install wandb")
    return wandb
