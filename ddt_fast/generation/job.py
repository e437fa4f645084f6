"""Where samples are drawn, 16 or 50,000: a job is opened, run and finished.

The images are the same for any number of processes, however often they are killed: a sample depends only on its seed
and label, a shard only on its number, and finished samples are never drawn again.
"""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from ddt_fast.autoencoder import open_decoder, undo_normalisation
from ddt_fast.checks import require_kind
from ddt_fast.class_names import class_names_of
from ddt_fast.config import SamplingConfig
from ddt_fast.device import deterministic_convolutions
from ddt_fast.files import output_folder
from ddt_fast.generation.background import Background, OnImages, PixelConverter, ShardWriter, Timings
from ddt_fast.generation.engine import LoadedEngine, load_engine, open_device
from ddt_fast.generation.folder import JobFolder, check_output
from ddt_fast.generation.scorer import Scorer
from ddt_fast.generation.seeds import Assignment, assign
from ddt_fast.generation.settings import SHARD_IMAGES, Draws, Engine, Outputs, Scoring
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT, experiment_of, resolve_checkpoint
from ddt_fast.provenance import environment
from ddt_fast.ranks import process_ranks
from ddt_fast.sampling import Sampler
from ddt_fast.sampling.buffers import format_bytes
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling.progress import FinishedSteps
from ddt_fast.wording import CompilationNotice, differences, plural

_WAITING_BATCHES = 2
"""Batches that may wait for the background thread: enough to even out fluctuations on either side."""

_ROUNDING = ("engine", "model", "device", "threads", "batch_size", "torch", "kernels")
"""What may change the last bits of an image."""


@deterministic_convolutions()
def generate(
    checkpoint: str | Path = EMBEDDED_CHECKPOINT,
    output_dir: str | Path = "samples",
    *,
    preset: str | None = None,
    sampling: SamplingConfig | None = None,
    draws: Draws | None = None,
    engine: Engine | None = None,
    outputs: Outputs | None = None,
    scoring: Scoring | None = None,
    on_images: OnImages | None = None,
) -> Path:
    """Draw samples and write them, as `python -m ddt_fast.sample`; a job that was stopped is continued.

        generate("out/model", "samples", draws=Draws(num_images=50_000), engine=Engine(batch_size=250))

    Under torchrun the processes share the work. Written to output_dir: samples.npz (`arr_0` (N, H, W, 3) uint8,
    `labels`, `seeds`), images/ (PNGs), grid.png, generation.json (settings, counts, hardware, commit), and with
    `scoring` metrics.json. Latents of a model without an autoencoder are `latents` (N, C, h, w) float32 in samples.npz,
    as its data were before training normalised them, without pictures. A report is printed.

    Args:
        checkpoint: model or pipeline folder, .safetensors, released .ckpt or hub id; default: the package's digits.
        output_dir: the job's folder.
        preset: settings for a checkpoint without config.json, one of `ddt_fast.presets.PRESETS`.
        sampling: the sampling settings; None takes the checkpoint's.
        draws: number, classes and seeds; None draws 16 images, or 100 digits.
        engine: device, dtype, batch size, memory, implementation; None: the best device, batches of 100.
        outputs: PNGs, shards, and whether to drop an earlier job; None: see `Outputs`.
        scoring: the reference to score the samples against, and how; None scores nothing.
        on_images: called with positions in samples.npz (n,) and images (n, H, W, 3) uint8, or latents, once for each of
            this process's samples: first those of earlier runs, then, in a background thread, each batch when drawn.

    Returns:
        The folder.

    Raises:
        ValueError: a setting is not allowed, settings contradict each other, or the folder holds another job.
        OSError: a file cannot be read or written.
    """
    draws, engine, outputs = draws or Draws(), engine or Engine(), outputs or Outputs()
    job = Job.open(checkpoint, output_dir, preset, sampling, draws, engine, outputs, scoring)
    job.run(on_images)
    job.finish()
    return job.folder.path


@dataclass
class Job:
    """A job: samples from seeds to files. `about` are plain JSON values for generation.json."""

    assignment: Assignment
    engine: LoadedEngine
    folder: JobFolder
    scorer: Scorer | None = None
    about: dict[str, Any] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        output_dir: str | Path,
        preset: str | None,
        sampling: SamplingConfig | None,
        draws: Draws,
        engine: Engine,
        outputs: Outputs,
        scoring: Scoring | None,
    ) -> Self:
        """Check everything, cheap things first; load the model; look at what the folder holds. Arguments and errors are
        those of `generate`."""
        ranks = process_ranks()
        for value, kind in ((draws, Draws), (engine, Engine), (outputs, Outputs)):
            require_kind(kind.__name__.lower(), value, kind)
        device = open_device(engine.device)
        source = resolve_checkpoint(checkpoint)
        experiment = experiment_of(source, preset)
        sampling = experiment.sampling if sampling is None else sampling
        require_kind("sampling", sampling, SamplingConfig)
        latents = experiment.data.in_latents(experiment.model.in_channels)
        assignment = assign(draws, class_names_of(experiment), 16 if latents else 100)
        path = output_folder(output_dir)
        check_output(path, outputs.overwrite)
        # The model's own autoencoder is opened after the model; one that is named may change the images' size.
        decode = None if engine.autoencoder is None else open_decoder(experiment, device, engine.autoencoder)
        if decode is not None:
            experiment = replace(experiment, data=decode.data)
        elif latents and experiment.data.autoencoder is None:
            if scoring is not None:
                raise ValueError(f"scoring needs images, but {source} draws latents; name an `autoencoder`")
            if outputs.num_png:
                raise ValueError("`num_png` needs pictures; name an `autoencoder`")
            outputs = replace(outputs, num_png=0)
        data = experiment.data
        data.input_size(draws.height, draws.width, experiment.model.patch_size)  # before anything is loaded
        scorer = None
        if scoring is not None:
            require_kind("scoring", scoring, Scoring)
            size = draws.height or data.image_size, draws.width or data.image_size
            scorer = Scorer(scoring, path, len(assignment), size, device, ranks)
        loaded = load_engine(source, experiment, sampling, engine, device, decode, draws, len(assignment), ranks)
        shard_size = loaded.batch_size * max(1, SHARD_IMAGES // loaded.batch_size)
        folder = JobFolder(path, {**assignment.words, **loaded.settings}, len(assignment), shard_size, outputs, ranks)
        plan = loaded.plan
        tera = plan.flops(experiment.model, *loaded.size) / 1e12
        about = {
            "checkpoint": str(source),
            "autoencoder": data.autoencoder,
            "network_evaluations": plan.network_evaluations,
            "encoder_evaluations": plan.encoder_evaluations,
            "tflop_per_image": tera,
            **environment(device),
        }
        job = cls(assignment, loaded, folder, scorer, about)
        job._announce()
        return job

    def run(self, on_images: OnImages | None = None) -> None:
        """Draw, decode and write this process's missing shards, and pass all of its images to `on_images`.

        Raises:
            ValueError: samples are not finite.
            OSError: no space is left, or the file system fails otherwise; finished shards are kept.
        """
        if on_images is not None:
            self.folder.feed_found(on_images)
        hooks = [] if on_images is None else [on_images]
        if self.scorer is not None:
            self.scorer.begin(self.folder)
            hooks.append(self.scorer.take)
        if self.folder.todo:
            compilation = CompilationNotice(self.engine.asked.compile and self.folder.ranks.rank == 0)
            sampler = self.engine.sampler()
            self._announce_sampler(sampler)
            self._draw(sampler, hooks, compilation)
            self._report()
        if self.scorer is not None:
            self.scorer.save()

    def finish(self) -> None:
        """Write samples.npz, pictures, record and scores once the shards of all processes are there.

        Raises:
            OSError: a shard of another process is damaged, or outputs cannot be written; finished shards are kept.
            ValueError: the reference of the scores is damaged; the samples are kept.
        """
        ranks, earlier = self.folder.ranks, self.folder.record
        record = self.folder.finish(self.assignment, self.about)
        path = self.folder.path
        if record is None:
            print(f"{ranks.who}finished its shards; the last process to finish writes {path / 'samples.npz'}")
        elif record is not earlier:
            latents = self.engine.draws_latents
            what = "latents, not pictures (no autoencoder is named): " if latents else "images/, grid.png, "
            print(f"{ranks.who}wrote {what}samples.npz and generation.json to {path}")
        if self.scorer is not None:
            self.scorer.finish(self.folder)

    def _draw(self, sampler: Sampler, hooks: list[OnImages], compilation: CompilationNotice) -> None:
        """Draw the batches, while a background thread decodes, converts and writes the images."""
        folder, ranks, engine = self.folder, self.folder.ranks, self.engine
        folder.shards.begin()
        began = time.perf_counter()
        shape, num_steps = (sampler.model.config.in_channels, *sampler.image_size), len(sampler.plan.steps)
        batch_size = sampler.batch_size
        converter = PixelConverter(
            sampler.device,
            engine.decode or partial(undo_normalisation, data=engine.data),
            batch_size if engine.decode is None else engine.decode.batch_size,
            quantize=not engine.draws_latents,
        )
        made_with = engine.made_with(sampler, ranks)
        writer = ShardWriter(folder.shards, converter, made_with, hooks, self.timings)
        bar = tqdm(
            total=folder.num_images + 1e-6,  # the steps' shares add up to a little more than their images
            desc=f"{ranks.who}{sampler.engine}, {engine.description}",
            unit="img",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} img [{elapsed}<{remaining}, {rate_fmt}]",
            smoothing=0,
            disable=ranks.rank > 0,
            dynamic_ncols=True,
        )

        def advance(images: float) -> None:
            bar.update(images)
            compilation.step_done()

        with bar, Background(_WAITING_BATCHES) as background, FinishedSteps(sampler.device, advance) as steps:
            for shard in folder.todo:
                positions = folder.shards.positions(shard)
                for start in range(positions.start, positions.stop, batch_size):
                    part = slice(start, min(start + batch_size, positions.stop))
                    seeds, labels = self.assignment.seeds[part], torch.from_numpy(self.assignment.labels[part])
                    noise, generators = seeded_noise(seeds.tolist(), shape)
                    # Each step advances the bar by its share of the batch's images.
                    share = len(seeds) / num_steps
                    samples = sampler(
                        noise, labels, generators=generators, progress=lambda *_, share=share: steps.launched(share)
                    )
                    background.submit(writer.take, shard, part, samples, seeds, converter.mark())
        self.timings.sampling += time.perf_counter() - began

    def _announce(self) -> None:
        about, sampling, folder = self.about, self.engine.sampling, self.folder
        interval = "({:g}, {:g})".format(*sampling.guidance_interval)
        folder.ranks.say(
            f"{about['checkpoint']}: {sampling.solver}, guidance {sampling.guidance_scale:g} in {interval}\n"
            f"{plural(len(self.assignment), 'image')}, {plural(sampling.num_steps, 'step')}, per image: "
            f"{plural(about['network_evaluations'], 'network evaluation')}, "
            f"{plural(about['encoder_evaluations'], 'encoder run')}, {about['tflop_per_image'] * 1e3:.3g} GFLOP"
        )
        if folder.found:
            print(f"{folder.ranks.who}{folder.found}")

    def _announce_sampler(self, sampler: Sampler) -> None:
        ranks, found = self.folder.ranks, self.folder.found_made_with()
        captured = f", captured in {sampler.capture_seconds:.1f} s" if sampler.capture_seconds else ""
        ranks.say(
            f"{self.engine.description}, {sampler.engine}{captured}; batches of {sampler.batch_size} keep "
            f"{format_bytes(sampler.buffers.kept_bytes)} between steps"
        )
        now = self.engine.made_with(sampler, ranks)
        if kernels := now.get("kernels"):
            ranks.say(f"kernels: {', '.join(f'{op} {how}' for op, how in kernels.items())}")
        names = [name for name in _ROUNDING if name in found and name in now]
        if changed := differences({name: found[name] for name in names}, {name: now[name] for name in names}):
            print(f"{ranks.who}the shards found were made with {'; '.join(changed)}: images may differ by rounding")

    def _report(self) -> None:
        who, seconds, engine = self.folder.ranks.who, self.timings, self.engine
        parts = {"decoding": seconds.decoding, "writing": seconds.writing, "features": seconds.hook}
        spent = ", ".join(f"{name} {value:.1f} s" for name, value in parts.items() if value or name != "features")
        print(
            f"{who}{self.folder.num_images / seconds.sampling:.1f} img/s on {engine.device}, {engine.description}\n"
            f"{who}{seconds.sampling:.1f} s; in the background, {spent}"
        )
