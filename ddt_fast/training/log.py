"""The log of a training run: JSON lines always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image
from tqdm import tqdm

from ddt_fast.files import atomic_file

LOG_NAMES = ("log.jsonl", "samples", "tensorboard", "wandb", "wandb_run.txt")
"""All that a TrainingLog writes into its folder."""

_FINISH_SECONDS = 60.0


class NullLog:
    """The log of every rank but the first: takes everything, keeps nothing."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step."""

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Log a picture made at a step."""

    def warn(self, message: str) -> None:
        """Tell the user something in one line."""

    def close(self, failed: bool = False) -> None:
        """Finish all files and uploads; failed marks the run as such where that can be told."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


class _Sink(Protocol):
    """Where metrics and pictures go beside the run folder."""

    name: str

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, image: Image.Image) -> None: ...

    def close(self, failed: bool) -> None: ...


class TrainingLog(NullLog):
    """The log of one run, in its folder; construct it on rank 0 alone, and use it as a context manager.

    log.jsonl holds a line for each write: step, the metrics, and "seconds" of training so far, resumed runs included.
    A metric that is NaN or infinite is null there, since JSON has no such numbers; TensorBoard and W&B get it as it is.
    Samples go to samples/NAME_step_0000100.png. Steps are to ascend.

    A resumed run goes on where its checkpoint ends: a killed run may have logged further than it saved, so what
    log.jsonl and TensorBoard hold of later steps is dropped, and a torn last line too. W&B resumes the run of the id in
    wandb_run.txt and ignores steps that it has seen. W&B obeys its environment variables (WANDB_MODE, WANDB_API_KEY).
    Where TensorBoard or W&B fails while the run goes on, it is left out from then on, with a warning.

    Args:
        folder: the run's folder; created where missing.
        tensorboard: write event files to folder/tensorboard.
        wandb: project at Weights & Biases; None logs nothing there.
        settings: plain nested dict of the run's settings, for W&B's config.
        first_step: step of the checkpoint that the run continues from; 0 begins all logs anew, W&B's under a new id.

    Raises:
        ValueError: an asked-for package is missing, W&B is not logged in or refuses, it cannot be reached by a new run
            (a resumed one goes on offline, with a warning), or a log.jsonl that is continued is damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: dict[str, Any],
        first_step: int = 0,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [row for row in read_log(path) if row["step"] <= first_step] if first_step and path.exists() else []
        self._sinks: list[_Sink] = []
        if tensorboard:
            self._sinks.append(_TensorBoard(folder, first_step))
        if wandb is not None and (run := _wandb_run(folder, wandb, settings, first_step, self.warn)) is not None:
            self._sinks.append(run)
        text = "".join(map(_line, kept))
        if not path.exists() or text != path.read_text(errors="replace"):
            with atomic_file(path) as file:
                file.write_text(text)
        self._file = path.open("a")
        self._started = time.perf_counter() - (kept[-1].get("seconds", 0.0) if kept else 0.0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step; OSError when the line cannot be written."""
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(_line({"step": step, **values, "seconds": round(time.perf_counter() - self._started, 3)}))
        self._file.flush()
        self._each(lambda sink: sink.write(step, values))

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Save a picture made at a step as samples/NAME_step_0000100.png; OSError when it cannot be written."""
        with atomic_file(self.folder / "samples" / f"{name}_step_{step:07d}.png") as file:
            image.save(file)
        self._each(lambda sink: sink.image(step, name, image))

    def warn(self, message: str) -> None:
        """Print one line to stderr, beside a progress bar and not into it."""
        tqdm.write(f"warning: {' '.join(message.split())}", file=sys.stderr)

    def close(self, failed: bool = False) -> None:
        """Finish all files and uploads; W&B gets at most a minute (WANDB_FINISH_TIMEOUT: seconds) for the latter."""
        self._file.close()
        self._each(lambda sink: sink.close(failed))
        self._sinks = []

    def _each(self, action: Callable[[_Sink], None]) -> None:
        for sink in tuple(self._sinks):
            # A run of days must not end because something that only watches it did.
            try:
                action(sink)
            except Exception as error:
                self._sinks.remove(sink)
                self.warn(f"{sink.name} failed and is left out from here on: {error}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, numbers and None by name; the last one is left out where it is torn.

    Raises:
        ValueError: another line is no JSON object with a step.
    """
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
        # What a kill leaves unwritten is lost up to the checkpoint, and no resumed run would log it again.
        self._writer.flush()

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandB:
    name = "W&B"

    def __init__(self, wandb: Any, run: Any) -> None:
        self._wandb, self._run = wandb, run

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_run(
    folder: Path, project: str, settings: dict[str, Any], first_step: int, warn: Callable[[str], None]
) -> _WandB | None:
    """The run at W&B, continued where first_step is above 0; None when W&B is switched off (WANDB_MODE=disabled)."""
    try:
        wandb = importlib.import_module("wandb")
        setup = wandb.setup
    # A folder called wandb in the current one, such as W&B's own, imports as an empty package.
    except (ImportError, AttributeError) as error:
        raise ValueError("logging to Weights & Biases needs a package: pip install wandb") from error
    own = setup().settings
    if own.mode == "disabled":
        return None
    online = own.mode not in ("offline", "dryrun")
    id_file = folder / "wandb_run.txt"
    resumed = first_step > 0 and id_file.is_file()
    run_id = id_file.read_text().strip() if resumed else None

    def init(mode: str | None) -> Any:
        return wandb.init(
            project=project,
            dir=str(folder),
            id=run_id,
            name=folder.resolve().name,
            config=settings,
            mode=mode,
            # A resumed run may have other settings; whether it may is not W&B's to say.
            allow_val_change=True,
            # Without network, W&B ignores this, and `wandb sync` appends by the id.
            resume="allow" if resumed and mode is None and online else None,
            # Never the run that a caller has open, and not the global one.
            reinit="create_new",
            settings=wandb.Settings(finish_timeout=own.finish_timeout or _FINISH_SECONDS),
        )

    try:
        # wandb.init would ask for the key, and a job has nobody to answer.
        if online and not wandb.login(prompt=False, verify=False):
            raise ValueError(
                "Weights & Biases is not logged in here; run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE=offline and upload later by `wandb sync`"
            )
        run = init(mode=None)
    except wandb.errors.CommError as error:
        reason = " ".join(str(error).split())
        if not resumed or isinstance(error, wandb.errors.AuthenticationError):
            raise ValueError(
                f"Weights & Biases does not answer as it should ({reason}); set WANDB_MODE=offline to go on without it"
            ) from error
        warn(f"W&B does not answer as it should ({reason}); logging offline, upload later by `wandb sync`")
        wandb.teardown()  # or the id would count as in use
        run = init(mode="offline")
    except wandb.errors.Error as error:
        raise ValueError(f"Weights & Biases: {' '.join(str(error).split())}") from error
    with atomic_file(id_file) as file:
        file.write_text(run.id + "\n")
    return _WandB(wandb, run)
