"""A run: the data, model and outputs that the training loop needs, made from an experiment."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ddt_fast.checks import require
from ddt_fast.config import Experiment
from ddt_fast.data.cached_images import CachedImages
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.loader import LatentLoader
from ddt_fast.data.source import open_source
from ddt_fast.data.verification import verify_together
from ddt_fast.device import DTYPES
from ddt_fast.evaluation.digits_score import DigitsScore
from ddt_fast.files import atomic_file
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.attention import resolve_backend
from ddt_fast.model.base import DDTBase
from ddt_fast.model.card import write_model_card
from ddt_fast.model.weights import save_model
from ddt_fast.sampling.schedule import timesteps
from ddt_fast.training import run_folder
from ddt_fast.training.checkpoint import Checkpoints, load_state
from ddt_fast.training.ema import EMA
from ddt_fast.training.log import TrainingLog
from ddt_fast.training.model import TrainingModel
from ddt_fast.training.objective import Objective
from ddt_fast.training.parallel import MixedPrecisionReplica, StopSignal, patient_group, process_group, wait_for_all
from ddt_fast.training.plots import plot_runs
from ddt_fast.training.repa import Projector
from ddt_fast.training.samples import Preview
from ddt_fast.training.state import TrainingState, read_start
from ddt_fast.training.throughput import Throughput, training_flops
from ddt_fast.wording import CompilationNotice, tell


class Run:
    """One process's part of a run: data, model and outputs. All processes construct one and call its methods together;
    the first process writes. Arguments are those of `loop.train`; `stack` closes what the run opens.

    Attributes:
        loader: this process's share of the batches.
        objective: the loss, and its gradients.
        state: the float32 weights, their average and the optimiser.
        replica: computes the gradients of these weights.
        throughput: counts images and time.
        stop: whether any process was told to stop.
    """

    def __init__(
        self, experiment: Experiment, folder: Path, device: torch.device, resume: str | None, stack: ExitStack
    ) -> None:
        self._given, self.folder, self.device = experiment, folder, device
        self._first, self._group = dist.get_rank() == 0, patient_group()
        self._open_data(stack)
        self._build_model(resume)
        self._open_outputs(stack)
        wait_for_all(self._group)

    def _open_data(self, stack: ExitStack) -> None:
        self.loader = stack.enter_context(closing(open_loader(self._given, self.device, self._group)))
        self.experiment = self._described()
        self.objective = Objective(self.experiment, self.device, self.loader.dataset.feature_shape)
        self._preview = Preview(self.experiment, self.device) if self._first else None
        # A continued run must find these models unchanged.
        self._frozen: dict[str, str | None] = {}
        if self._preview is not None:
            self._frozen["data.autoencoder"] = self._preview.autoencoder_sha256()
            self._frozen["training.repa_encoder"] = self.objective.encoder_sha256()

    def _described(self) -> Experiment:
        """The settings with what the data say of themselves. recipe.yaml and checkpoints keep them as they were given:
        data are compared by content."""
        data, training = self.loader.dataset.described(self._given.data), self._given.training
        if data.autoencoder is None and data.in_latents(self._given.model.in_channels) and training.sample_every:
            if self._first:
                tell("no grids of samples: they would be latents, and data.autoencoder is null")
            training = replace(training, sample_every=0)
        return replace(self._given, data=data, training=training)

    def _build_model(self, resume: str | None) -> None:
        """Take the weights of a checkpoint or of another model, or initialise them."""
        settings, self._dtype = self.experiment.training, DTYPES[self.experiment.training.dtype]
        checkpoint, numbers = run_folder.open_checkpoint(self.folder, resume, self._given, self._frozen, self._group)
        torch.default_generator.manual_seed(settings.seed)  # the CPU's, where weights are initialised
        masters = build_model(self.experiment, self.device, self.objective.feature_size)
        average = read_start(settings.init, masters) if checkpoint is None and settings.init is not None else None
        wait_for_all(self._group)  # files from the Hub reach some processes sooner than others
        self._choose_attention()
        self.replica = MixedPrecisionReplica(masters, self._dtype, settings.parallel, settings.compile)
        optimizer = torch.optim.AdamW(
            masters.parameters(),
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.state = TrainingState(masters, EMA(masters.denoiser, settings.ema_decay), optimizer)
        run_folder.prepare(self.folder, self._given, self._group, keep=checkpoint is not None)
        if checkpoint is not None:
            load_state(checkpoint, self.state)
            self.state.step, self.state.ema.num_updates = numbers["step"], numbers["ema_updates"]
            self.loader.load_state_dict(numbers["data"])
            self.replica.copy_master_weights()
        elif average is not None:
            self.state.ema.start_from(average)
        self._continued, self._seconds_before = checkpoint, numbers.get("seconds", 0.0)

    def _choose_attention(self) -> None:
        """On a GPU by time, which compiled functions cannot."""
        config, size, settings = self.experiment.model, self.experiment.data.sample_size, self.experiment.training
        if settings.engine != "reference":
            batch = settings.batch_size // dist.get_world_size() // settings.accumulation_steps
            tokens = config.num_tokens(size, size)
            resolve_backend("auto", self.device, self._dtype, config.head_dim, tokens, True, batch, config.num_heads)

    def _open_outputs(self, stack: ExitStack) -> None:
        settings, size = self.experiment.training, self.experiment.data.sample_size
        self.stop = stack.enter_context(StopSignal().listening())
        self._checkpoints = stack.enter_context(
            closing(Checkpoints(self.folder, settings.keep_checkpoints, self._continued))
        )
        self._log: TrainingLog | None = None
        step = self.state.step
        if self._first:
            given = run_folder.settings_of(self._given)
            self._log = stack.enter_context(
                TrainingLog(self.folder, settings.tensorboard, settings.wandb, settings=given, first_step=step)
            )
        bar = tqdm(total=settings.max_steps, initial=step, unit="step", dynamic_ncols=True, disable=not self._first)
        self._progress = stack.enter_context(bar)
        flops = training_flops(self.experiment.model, size, size, self.state.masters.projector is not None)
        self.throughput = Throughput(flops, self.device, self._dtype, dist.get_world_size())
        self._started = time.perf_counter() - self._seconds_before
        self._compilation = CompilationNotice(settings.compile and self._first)

    def advance(self) -> None:
        """Count a finished step."""
        self.throughput.add(self.experiment.training.batch_size)
        self._progress.update()
        self._compilation.step_done()

    def report(self, metrics: dict[str, float]) -> None:
        """Log the metrics of this step."""
        self._progress.set_postfix_str(f"loss {metrics['loss']:.4f}, {metrics['images_per_second']:.0f} img/s")
        if self._log is not None:
            self._log.write(self.state.step, metrics)

    def save(self, wait: bool = False) -> None:
        """Save a checkpoint of this step; with `wait`, return once it is on the disk."""
        with self.throughput.paused():
            numbers = {
                "step": self.state.step,
                "ema_updates": self.state.ema.num_updates,
                "seconds": time.perf_counter() - self._started,
                "data": self.loader.state_dict(),
                "settings": run_folder.settings_of(self._given),
                "frozen_sha256": self._frozen,
            }
            model, projector = self.state.averaged_model(), self.state.projector()
            self._checkpoints.save(self.state, numbers, partial(self._save_model, model, projector), wait)
            if wait:
                wait_for_all(self._group)

    def draw(self) -> None:
        """Log a grid of samples from the averaged model."""
        with self.throughput.paused():
            model = self.state.averaged_model()
            if self._log is not None and self._preview is not None and model is not None:
                self._log.image(self.state.step, "samples", self._preview.grid(model))
            wait_for_all(self._group)

    def finish(self) -> tuple[DDT | None, dict[str, DigitsScore]]:
        """Write the results; return the averaged model and its scores, in the first process."""
        seconds = time.perf_counter() - self._started
        model, projector = self.state.averaged_model(), self.state.projector()
        scores: dict[str, DigitsScore] = {}
        settings = self.experiment.training
        if self._preview is not None and model is not None:
            self._save_model(model, projector, self.folder / "model")
            plot_runs({self.folder.resolve().name: self.folder / "log.jsonl"}, self.folder / "curves.png")
            if settings.sample_every:
                with atomic_file(self.folder / "samples.png") as file:
                    self._preview.grid(model).save(file)
            if settings.score_samples:
                scores = self._preview.score(model, settings.score_samples)
            run_folder.write_provenance(self.folder, self.state.step, seconds, self.device, scores)
            write_model_card(self.folder / "model")  # again, now with the scores
        wait_for_all(self._group)
        return model, scores

    def _save_model(self, model: DDT | None, projector: dict[str, Tensor] | None, folder: Path) -> None:
        assert model is not None
        data = self.experiment.data.without_places()
        save_model(model, folder, data, self.experiment.sampling, projector=projector)
        write_model_card(folder)


@contextmanager
def open_run(experiment: Experiment, folder: Path, device: torch.device, resume: str | None) -> Iterator[Run]:
    """Start or continue a run, and close what it opens; see `loop.train`."""
    timesteps(experiment.sampling.num_steps, experiment.sampling.last_step, experiment.sampling.timeshift)
    with ExitStack() as stack:
        # Training does not change the caller's random numbers.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(process_group(device))
        yield Run(experiment, folder, device, resume, stack)


def open_loader(experiment: Experiment, device: torch.device, group: dist.ProcessGroup) -> LatentLoader:
    """This process's share of the experiment's batches. All processes of the group call it together. ValueError if the
    data are missing, unusable or do not fit the model, a shard has another checksum, or the processes cannot share a
    batch."""
    data, training = experiment.data, experiment.training
    shares = dist.get_world_size() * training.accumulation_steps
    allowed = f"multiples of {shares}, processes times accumulation_steps"
    require(training.batch_size % shares == 0, "batch_size", training.batch_size, allowed)
    dataset, images = open_source(experiment), None
    if isinstance(dataset, LatentDataset):
        if data.verify:
            verify_together(dataset, group)
        if training.repa_weight and data.images is not None:
            images = CachedImages(Path(data.images), dataset)
    return LatentLoader(
        dataset,
        training.batch_size,
        seed=training.seed,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        images=images,
        pin_memory=device.type == "cuda",
    )


def build_model(experiment: Experiment, device: torch.device, feature_size: int | None) -> TrainingModel:
    """The model to train, in float32, freshly initialised, with a projector if there are features."""
    settings, config = experiment.training, experiment.model
    reference = DDT(config)
    denoiser: DDTBase = reference if settings.engine == "reference" else FusedDDT.from_reference(reference)
    denoiser.gradient_checkpointing = settings.gradient_checkpointing
    projector = None if feature_size is None else Projector(config.hidden_size, feature_size)
    return TrainingModel(denoiser, projector, settings.repa_block).to(device)
