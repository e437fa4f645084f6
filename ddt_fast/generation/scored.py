"""Scores of a job's samples without a second pass over them: features are taken while the next images are drawn.

Where several processes share a job, each saves the features of its images, when they are done, as
OUTPUT/features-FINGERPRINT-rank-R-of-W.npz. The process that writes samples.npz merges them, takes what is missing from
samples.npz, writes metrics.json and removes the files. A job that was finished before is scored from samples.npz, by
rank 0.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from ddt_fast.command import CommandParser
from ddt_fast.evaluation.features import FeatureAccumulator, FeatureSet, kind_of_features
from ddt_fast.evaluation.inception_weights import WEIGHTS_FILE
from ddt_fast.evaluation.report import Features, Progress, extractor_maker, report_table, write_report
from ddt_fast.evaluation.scoring import METRICS, computable, evaluate
from ddt_fast.evaluation.sources import CROP_HELP, Source, open_sources
from ddt_fast.evaluation.statistics import Gaussian
from ddt_fast.files import read_json, writing
from ddt_fast.generation.finish import SAMPLES
from ddt_fast.generation.job import Generation
from ddt_fast.generation.npz import open_images
from ddt_fast.generation.seeds import IntArray
from ddt_fast.generation.shards import Images, fingerprint
from ddt_fast.ranks import Ranks
from ddt_fast.wording import plural

REPORT = "metrics.json"
_FEATURES = r"features-[0-9a-f]{12}-rank-\d+-of-\d+\.npz"
_BATCH = 64


def add_scoring_options(parser: CommandParser) -> None:
    """--evaluate, and what goes with it."""
    add = parser.add_argument
    add("--evaluate", type=str, metavar="REFERENCE", help="score the samples against an npz or a folder of images")
    add("--center-crop", type=int, metavar="SIZE", help=f"of --evaluate: {CROP_HELP}")
    add("--metrics", choices=METRICS, nargs="+", help="for --evaluate; default: all that can be computed")
    add("--evaluate-features", choices=get_args(Features), help="default: inception; pixels: images of up to 64x64")
    add("--inception-weights", type=str, help=f"{WEIGHTS_FILE}; default: from torch's cache, else downloaded")


def chosen_scoring(
    reference: str | None,
    metrics: Sequence[str] | None,
    features: Features | None,
    weights: str | None,
    crop: int | None,
    *,
    output_dir: Path,
    count: int,
    size: int,
    device: torch.device,
    ranks: Ranks,
) -> Scoring | None:
    """The scoring that was asked for, None without a reference; arguments and ValueError as `open_sources` and
    `Scoring`."""
    if reference is None:
        given = {
            "--metrics": metrics,
            "--evaluate-features": features,
            "--inception-weights": weights,
            "--center-crop": crop,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is for --evaluate, which is not given")
        return None
    return Scoring(
        output_dir,
        open_sources([reference], crop)[0],
        list(metrics or METRICS),
        features or "inception",
        weights,
        count=count,
        size=size,
        device=device,
        ranks=ranks,
    )


class Scoring:
    """The score of a job's samples against a reference. Made before the job begins, so that a mistake costs nothing.

    Args:
        output_dir: of the job.
        reference: what `ddt_fast.evaluation.sources.open_sources` gives.
        metrics: of `METRICS`.
        features: "inception" or "pixels".
        weights: of the Inception network; None: from the usual place.
        count, size: number of samples, and the side of one in pixels.
        device: where features are computed.
        ranks: this process among those that share the job.

    Raises:
        ValueError: no such weights, or no metric can be computed with them.
    """

    def __init__(
        self,
        output_dir: Path,
        reference: Source,
        metrics: list[str],
        features: Features,
        weights: str | None,
        *,
        count: int,
        size: int,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        if (output_dir / REPORT).is_dir():
            raise ValueError(f"{output_dir / REPORT} is a folder; a file of that name is to be written")
        self._output_dir, self._reference, self._metrics = output_dir, reference, metrics
        self._count, self._ranks = count, ranks
        name = str(reference.path)
        self._extractor = extractor_maker(features, weights, device)()
        known = FeatureSet(name, pool=reference.pool, spatial=reference.spatial)
        if reference.images is not None:
            own = self._expected(name, reference.images.count, reference.images.size)
            pool, spatial = reference.pool or own.pool, reference.spatial or own.spatial
            known = FeatureSet(name, own.count, own.size, pool, spatial, own.features)
        wanted, _ = computable(self._expected(str(output_dir / SAMPLES), count, (size, size)), known, metrics)
        # FID and sFID need no features but their statistics, which do not grow with the number of images.
        self._keep = any(name not in ("fid", "sfid") for name in wanted)
        self._accumulator = self._new_accumulator()
        self._seconds, self._taken = 0.0, 0
        self._stream = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the weights are there before another stream reads them
            self._stream = torch.cuda.Stream(device)

    def _expected(self, source: str, count: int, size: tuple[int, int]) -> FeatureSet:
        """What will be known of images, without the numbers."""
        pool, spatial = self._extractor(torch.zeros(1, 3, *size, dtype=torch.uint8))
        probabilities = self._extractor.probabilities(pool)

        def gaussian(rows: torch.Tensor | None) -> Gaussian | None:
            return None if rows is None or count < 2 else Gaussian(np.empty(rows.shape[1]), np.empty((0, 0)))

        return FeatureSet(
            source,
            count,
            size,
            gaussian(pool),
            gaussian(spatial),
            torch.empty(count, pool.shape[1], device="meta"),
            None if probabilities is None else torch.empty(count, probabilities.shape[1], device="meta"),
        )

    def _new_accumulator(self) -> FeatureAccumulator:
        return FeatureAccumulator(self._extractor, _BATCH, self._keep)

    def begin(self, generation: Generation) -> None:
        """Take the images that are found; `take` is for those that are drawn. Call before the job runs."""
        self._job = {
            "job": generation.settings,
            "features": kind_of_features(self._extractor.description),
            "features_kept": self._keep,
        }
        self._was_finished = generation.was_finished
        if not self._was_finished:
            own = self._file(self._ranks.rank)
            for stale in (own, *self._output_dir.glob(f".{own.stem}.*")):
                stale.unlink(missing_ok=True)
            generation.feed_found(self.take)

    def take(self, positions: IntArray, images: Images) -> None:
        """Compute and keep the features of images (n, H, W, 3) uint8 at positions (n,) of samples.npz."""
        began = time.perf_counter()
        with torch.cuda.stream(self._stream):  # beside the sampling; without a GPU this does nothing
            self._accumulator.add(images, positions.tolist())
        if self._stream is not None:
            self._stream.synchronize()
        self._seconds += time.perf_counter() - began
        self._taken += len(images)

    def save(self) -> None:
        """Hand the features of this process's images to whichever process scores. Call before the job is finished."""
        if self._ranks.world_size > 1 and not self._was_finished:
            target = self._file(self._ranks.rank)
            with writing(target):
                self._accumulator.save(target)

    def finish(self, generation: Generation) -> None:
        """After `Generation.finish`: score and report, if that is for this process to do.

        Raises:
            ValueError: the reference is damaged.
            OSError: metrics.json cannot be written. The samples are kept.
        """
        record = generation.record
        if record is None:
            return
        job = {"fingerprint": record["fingerprint"], "date": record["date"]}
        report = self._output_dir / REPORT
        if not (self._ranks.rank == 0 if self._was_finished else generation.wrote):
            if report.exists() and read_json(report).get("generation") == job:
                self._file(self._ranks.rank).unlink(missing_ok=True)  # too late: the scores are there
            return
        try:
            progress = Progress()
            samples = self._all_features(progress)
            found = evaluate(samples, self._reference, self._metrics, lambda: self._extractor, _BATCH, progress)
            print(report_table(found))
            write_report(report, {**found, "generation": job})
            print(f"wrote {report}")
        finally:
            for entry in list(self._output_dir.iterdir()):
                if re.fullmatch(_FEATURES, entry.name):
                    entry.unlink(missing_ok=True)

    def _all_features(self, progress: Progress) -> FeatureSet:
        """Of all samples: this process's, those that others saved, and the rest from samples.npz."""
        missing = np.ones(self._count, dtype=bool)
        missing[self._accumulator.indices] = False
        if not self._was_finished:
            for rank in range(self._ranks.world_size):
                if rank != self._ranks.rank and self._file(rank).exists():
                    self._merge(self._file(rank), missing)
        places = missing.nonzero()[0]
        if len(places):
            samples = self._output_dir / SAMPLES
            if not self._was_finished:
                print(f"features of {len(places)} of {plural(self._count, 'image')} are taken from {samples}")
            for start in range(0, len(places), _BATCH):
                part = places[start : start + _BATCH]
                # Opened anew, because pages of a map that stays open count as memory of this process.
                images = open_images(samples)[part]
                self.take(part, images)
                progress("samples", images, len(places))
        found = self._accumulator.finish(str(self._output_dir / SAMPLES))
        # The time of other processes is not known.
        return replace(found, seconds=self._seconds) if self._taken == self._count else found

    def _merge(self, file: Path, missing: np.ndarray) -> None:
        part = self._new_accumulator()
        try:
            part.load(file)
        except ValueError as error:
            warnings.warn(f"{error}; its images are taken from {SAMPLES}", stacklevel=2)
            return
        # Another shard size shares the images out otherwise: what is here already is not taken twice.
        if missing[part.indices].all():
            self._accumulator.merge(part)
            missing[part.indices] = False

    def _file(self, rank: int) -> Path:
        name = f"features-{fingerprint(self._job)}-rank-{rank}-of-{self._ranks.world_size}.npz"
        return self._output_dir / name
