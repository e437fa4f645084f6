"""The training loop."""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddt_fast.config import Experiment, SamplingConfig
from ddt_fast.data.digits import digits
from ddt_fast.evaluation.digits_score import DigitsScore, score_digits
from ddt_fast.files import atomic_file, check_replaceable
from ddt_fast.generation.images import labelled_grid, to_uint8
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model.reference import DDT
from ddt_fast.model.weights import OWNED_NAMES, save_model
from ddt_fast.sampling import sample
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.schedule import timesteps
from ddt_fast.training.ema import EMA
from ddt_fast.training.objective import flow_matching_loss


@dataclass(frozen=True)
class TrainingResult:
    """What a run ended with: the averaged model, where it was saved, and its scores by kind of sampling, if scored."""

    model: DDT
    folder: Path
    scores: dict[str, DigitsScore]


def train(experiment: Experiment, output_dir: Path, device: torch.device) -> TrainingResult:
    """Train a DDT by flow matching; write everything under output_dir.

    Written: recipe.yaml (every setting; `--config` takes it), log.jsonl (a line every log_every steps), checkpoints/
    step_N (EMA weights every checkpoint_every steps), and at the end model/ (EMA weights), samples.png and
    training.json (provenance and scores). An earlier run there is removed first. Progress goes to stderr.

    Raises:
        ValueError: a data set that cannot be trained on, sampling settings that cannot be executed, files of the same
            names in output_dir that are not a run's, or a loss that is not finite.
    """
    settings = experiment.training
    timesteps(experiment.sampling.num_steps, experiment.sampling.last_step, experiment.sampling.timeshift)
    images, labels = _load_data(experiment, device)
    _remove_earlier_run(output_dir)
    torch.manual_seed(settings.seed)
    model = DDT(experiment.model).to(device)
    ema = EMA(model, settings.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    generator = torch.Generator(device).manual_seed(settings.seed)
    batches = shuffled_batches(len(images), settings.batch_size, settings.seed)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")

    output_dir.mkdir(parents=True, exist_ok=True)
    recipe = {"model": experiment.model, "data": experiment.data, "training": settings, "sampling": experiment.sampling}
    with atomic_file(output_dir / "recipe.yaml") as file:
        file.write_text(yaml.safe_dump({name: _plain(part) for name, part in recipe.items()}, sort_keys=False))

    def save(folder: Path) -> None:
        save_model(ema.model, folder, experiment.data, experiment.sampling)

    started = time.perf_counter()
    with (
        (output_dir / "log.jsonl").open("w") as log,
        tqdm(total=settings.max_steps, unit="step", dynamic_ncols=True) as progress,
    ):
        window_loss, window_start, window_steps = torch.zeros((), device=device), started, 0
        for step in range(1, settings.max_steps + 1):
            batch = next(batches).to(device)
            with autocast:
                loss = flow_matching_loss(
                    model,
                    images[batch],
                    labels[batch],
                    num_classes=experiment.model.num_classes,
                    label_dropout=settings.label_dropout,
                    generator=generator,
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)

            window_loss += loss.detach()
            window_steps += 1
            progress.update()
            if step % settings.log_every == 0 or step == settings.max_steps:
                mean_loss = window_loss.item() / window_steps
                if not math.isfinite(mean_loss):
                    raise ValueError(f"the loss is {mean_loss} by step {step}; take a lower learning_rate")
                now = time.perf_counter()
                rate = window_steps * settings.batch_size / (now - window_start)
                log.write(json.dumps({"step": step, "loss": mean_loss, "images_per_second": rate}) + "\n")
                log.flush()
                progress.set_postfix_str(f"loss {mean_loss:.4f}, {rate:.0f} img/s")
                window_loss.zero_()
                window_start, window_steps = now, 0
            if step % settings.checkpoint_every == 0 and step < settings.max_steps:
                save(output_dir / "checkpoints" / f"step_{step:07d}")
    seconds = time.perf_counter() - started
    save(output_dir / "model")

    scores = {}
    if settings.score_samples:
        tqdm.write(f"scoring {settings.score_samples} samples", file=sys.stderr)
        scores = score_model(ema.model, experiment, settings.score_samples)
    with atomic_file(output_dir / "samples.png") as file:
        sample_grid(ema.model, experiment).save(file)
    with atomic_file(output_dir / "training.json") as file:
        file.write_text(json.dumps(_provenance(settings.max_steps, seconds, device, scores), indent=2) + "\n")
    return TrainingResult(ema.model, output_dir / "model", scores)


def _remove_earlier_run(output_dir: Path) -> None:
    checkpoints = output_dir / "checkpoints"
    check_replaceable(output_dir / "model", OWNED_NAMES)
    check_replaceable(checkpoints, r"step_\d+")
    for folder in (output_dir / "model", checkpoints):
        if folder.exists():
            shutil.rmtree(folder)
    for name in ("recipe.yaml", "log.jsonl", "samples.png", "training.json"):
        (output_dir / name).unlink(missing_ok=True)


def shuffled_batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless (batch_size,) int64 indices below count, epoch after epoch, each in its own random order."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(0, dtype=torch.int64)
    while True:
        while len(pool) < batch_size:
            pool = torch.cat([pool, torch.randperm(count, generator=generator)])
        batch, pool = pool[:batch_size], pool[batch_size:]
        yield batch


def score_model(model: DDT, experiment: Experiment, num_samples: int) -> dict[str, DigitsScore]:
    """Scores of class-balanced digits drawn without guidance, and as the sampling settings say."""
    labels = assign_labels(num_samples, experiment.model.num_classes)
    configs = {"unguided": replace(experiment.sampling, guidance_scale=1.0), "guided": experiment.sampling}
    return {kind: score_digits(_draw(model, experiment, labels, config), labels) for kind, config in configs.items()}


def sample_grid(model: DDT, experiment: Experiment, num_images: int = 100) -> Image.Image:
    """A labelled grid of class-balanced samples, drawn as the experiment's sampling settings say."""
    labels = assign_labels(num_images, experiment.model.num_classes)
    images = _draw(model, experiment, labels, experiment.sampling)
    return labelled_grid(to_uint8(images), [str(label) for label in labels.tolist()])


def _draw(model: DDT, experiment: Experiment, labels: Tensor, config: SamplingConfig) -> Tensor:
    size = experiment.data.sample_size
    noise, generators = seeded_noise(range(len(labels)), (experiment.model.in_channels, size, size))
    return sample(model, noise, labels, config, generators=generators)


def _load_data(experiment: Experiment, device: torch.device) -> tuple[Tensor, Tensor]:
    if experiment.data.dataset != "digits":
        raise ValueError(f"dataset {experiment.data.dataset!r} cannot be trained on yet; allowed: digits")
    images, labels = digits()
    return images.to(device), labels.to(device)


def _plain(part: Any) -> dict[str, Any]:
    """A settings dataclass as YAML can hold it: tuples become lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(part).items()}


def _provenance(steps: int, seconds: float, device: torch.device, scores: dict[str, DigitsScore]) -> dict[str, Any]:
    """What a reader needs to trust or repeat a run."""
    return {
        "steps": steps,
        "training_seconds": round(seconds, 1),
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "scores": {kind: asdict(score) for kind, score in scores.items()},
    }


def _commit() -> str | None:
    """The commit of this source tree; None when the package is installed rather than checked out."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
