"""A run: everything the training loop needs, made from an experiment, and what it writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ddt_fast.config import Experiment
from ddt_fast.data.latent_loader import LatentLoader
from ddt_fast.evaluation.digits_score import DigitsScore
from ddt_fast.files import atomic_file
from ddt_fast.model.base import DDTBase
from ddt_fast.model.card import write_model_card
from ddt_fast.model.fused import FusedDDT
from ddt_fast.model.reference import DDT
from ddt_fast.model.weights import save_model
from ddt_fast.sampling.schedule import timesteps
from ddt_fast.training import run_folder
from ddt_fast.training.checkpoint import Checkpoints, load_state
from ddt_fast.training.curves import plot_curves
from ddt_fast.training.data import open_loader
from ddt_fast.training.ema import EMA
from ddt_fast.training.log import NullLog, TrainingLog
from ddt_fast.training.model import TrainingModel
from ddt_fast.training.objective import Objective
from ddt_fast.training.parallel import MixedPrecisionReplica, StopSignal, patient_group, process_group, wait_for_all
from ddt_fast.training.repa import Projector
from ddt_fast.training.samples import Preview
from ddt_fast.training.start import read_start
from ddt_fast.training.state import TrainingState
from ddt_fast.training.throughput import Throughput, training_flops


@dataclass
class Run:
    """One process's part of a run. Those of all processes call its methods together; the first one writes."""

    experiment: Experiment
    folder: Path
    device: torch.device
    loader: LatentLoader
    objective: Objective
    replica: MixedPrecisionReplica
    state: TrainingState
    stop: StopSignal
    throughput: Throughput
    _frozen: dict[str, str | None]
    _checkpoints: Checkpoints
    _log: NullLog
    _preview: Preview | None
    _group: dist.ProcessGroup
    _progress: Any
    _seconds_before: float
    _started: float

    def advance(self) -> None:
        """Count a step that is done."""
        self.throughput.add(self.experiment.training.batch_size)
        self._progress.update()

    def report(self, metrics: dict[str, float]) -> None:
        """Log the metrics of this step."""
        self._progress.set_postfix_str(f"loss {metrics['loss']:.4f}, {metrics['images_per_second']:.0f} img/s")
        self._log.write(self.state.step, metrics)

    def save(self, wait: bool = False) -> None:
        """Save a checkpoint of this step; with `wait`, see it on the disk."""
        with self.throughput.paused():
            numbers = {
                "step": self.state.step,
                "ema_updates": self.state.ema.num_updates,
                "seconds": self._seconds,
                "data": self.loader.state_dict(),
                "settings": run_folder.settings_of(self.experiment),
                "frozen_sha256": self._frozen,
            }
            save_model = partial(self._save_model, self.state.averaged_model(), self.state.projector())
            self._checkpoints.save(self.state, numbers, save_model, wait)
            if wait:
                wait_for_all(self._group)

    def draw(self) -> None:
        """Log a grid of samples of the averaged model."""
        with self.throughput.paused():
            model = self.state.averaged_model()
            if self._preview is not None and model is not None:
                self._log.image(self.state.step, "samples", self._preview.grid(model))
            wait_for_all(self._group)

    def finish(self) -> tuple[DDT | None, dict[str, DigitsScore]]:
        """Write what a finished run leaves; the averaged model and its scores, in the first process."""
        seconds = self._seconds
        model, projector = self.state.averaged_model(), self.state.projector()
        scores: dict[str, DigitsScore] = {}
        settings = self.experiment.training
        if self._preview is not None and model is not None:
            self._save_model(model, projector, self.folder / "model")
            plot_curves(self.folder / "log.jsonl", self.folder / "curves.png")
            if settings.sample_every:
                with atomic_file(self.folder / "samples.png") as file:
                    self._preview.grid(model).save(file)
            if settings.score_samples:
                scores = self._preview.score(model, settings.score_samples)
            run_folder.write_provenance(self.folder, self.state.step, seconds, self.device, scores)
            write_model_card(self.folder / "model")  # with the scores
        wait_for_all(self._group)
        return model, scores

    def _save_model(self, model: DDT | None, projector: dict[str, Tensor] | None, folder: Path) -> None:
        assert model is not None
        data = self.experiment.data.without_places()
        save_model(model, folder, data, self.experiment.sampling, projector=projector)
        write_model_card(folder)

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started


@contextmanager
def open_run(experiment: Experiment, folder: Path, device: torch.device, resume: str | None) -> Iterator[Run]:
    """Start or continue a run, and end it properly; see `loop.train`."""
    settings = experiment.training
    timesteps(experiment.sampling.num_steps, experiment.sampling.last_step, experiment.sampling.timeshift)
    with ExitStack() as stack:
        # The caller's random numbers go on as if there had been no training.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(process_group(device))
        first = dist.get_rank() == 0
        group = patient_group()
        loader = stack.enter_context(closing(open_loader(experiment, device, group)))
        preview = Preview(experiment, device) if first else None
        objective = Objective(experiment, device, loader.feature_shape)
        frozen = {}
        if preview is not None:
            frozen = {
                "data.autoencoder": preview.autoencoder_sha256(),
                "training.repa_encoder": objective.encoder_sha256(),
            }
        checkpoint, numbers = run_folder.open_checkpoint(folder, resume, experiment, frozen, group)
        torch.default_generator.manual_seed(settings.seed)  # of the CPU, where weights are initialised
        masters = build_model(experiment, device, objective.feature_size)
        average = None if settings.init is None or checkpoint else read_start(settings.init, masters)
        wait_for_all(group)  # what was fetched from the Hub came to some sooner than to others
        replica = MixedPrecisionReplica(masters, getattr(torch, settings.dtype), settings.parallel, settings.compile)
        optimizer = torch.optim.AdamW(
            masters.parameters(),
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        state = TrainingState(masters, EMA(masters.denoiser, settings.ema_decay), optimizer)
        if average is not None:
            state.ema.start_from(average)
        run_folder.prepare(folder, experiment, group, keep=checkpoint is not None)
        if checkpoint is not None:
            load_state(checkpoint, state)
            state.step, state.ema.num_updates = numbers["step"], numbers["ema_updates"]
            loader.load_state_dict(numbers["data"])
            replica.copy_master_weights()
        size = experiment.data.sample_size
        flops = training_flops(experiment.model, size, size, masters.projector is not None)
        run = Run(
            experiment,
            folder,
            device,
            loader,
            objective,
            replica,
            state,
            stop=stack.enter_context(StopSignal().listening()),
            throughput=Throughput(flops, device, getattr(torch, settings.dtype), dist.get_world_size()),
            _frozen=frozen,
            _checkpoints=stack.enter_context(closing(Checkpoints(folder, settings.keep_checkpoints, checkpoint))),
            _log=stack.enter_context(open_log(experiment, folder, state.step) if first else NullLog()),
            _preview=preview,
            _group=group,
            _progress=stack.enter_context(
                tqdm(total=settings.max_steps, initial=state.step, unit="step", dynamic_ncols=True, disable=not first)
            ),
            _seconds_before=numbers.get("seconds", 0.0),
            _started=time.perf_counter(),
        )
        wait_for_all(group)
        yield run


def open_log(experiment: Experiment, folder: Path, first_step: int) -> TrainingLog:
    """The log of a run that starts after first_step."""
    settings = experiment.training
    return TrainingLog(
        folder,
        tensorboard=settings.tensorboard,
        wandb=settings.wandb,
        settings=run_folder.settings_of(experiment),
        first_step=first_step,
    )


def build_model(experiment: Experiment, device: torch.device, feature_size: int | None) -> TrainingModel:
    """The model to train, float32, freshly initialised; with a projector where there are features."""
    settings, config = experiment.training, experiment.model
    reference = DDT(config)
    denoiser: DDTBase = reference if settings.engine == "reference" else FusedDDT.from_reference(reference)
    denoiser.gradient_checkpointing = settings.gradient_checkpointing
    projector = None if feature_size is None else Projector(config.hidden_size, feature_size)
    return TrainingModel(denoiser, projector, settings.repa_block).to(device)
