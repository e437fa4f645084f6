"""Scores of a job's samples without a second pass: features are computed while the next images are drawn.

If several processes share a job, each saves the features of its images as OUTPUT/features-FINGERPRINT-rank-R-of-W.pt.
The process that writes samples.npz merges these files, computes missing features from samples.npz, writes metrics.json
and removes the files. Rank 0 scores a job that was finished before from samples.npz.
"""

import re
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ddt_fast.data.image_file import Images
from ddt_fast.evaluation.features import FeatureAccumulator, FeatureSet, extractor_maker, kind_of_features
from ddt_fast.evaluation.names import METRICS
from ddt_fast.evaluation.report import Progress, report_table
from ddt_fast.evaluation.scoring import computable, evaluate
from ddt_fast.evaluation.sources import open_sources, unreadable_images
from ddt_fast.evaluation.statistics import Gaussian
from ddt_fast.files import check_no_folder, read_json, write_json, writing
from ddt_fast.generation.finish import SAMPLES
from ddt_fast.generation.folder import JobFolder
from ddt_fast.generation.npz import open_images
from ddt_fast.generation.seeds import IntArray
from ddt_fast.generation.settings import Scoring
from ddt_fast.generation.shards import fingerprint
from ddt_fast.ranks import Ranks
from ddt_fast.wording import plural

REPORT = "metrics.json"
_FEATURES = r"features-[0-9a-f]{12}-rank-\d+-of-\d+\.(pt|npz)"
_BATCH = 64


class Scorer:
    """Scores a job's samples against a reference; made before the job begins, so that a mistake costs nothing.
    ValueError if the reference cannot be read, the weights are missing, or no metric can be computed. The job in
    `output_dir` has `count` samples of `size`, height and width in pixels.
    """

    def __init__(
        self,
        scoring: Scoring,
        output_dir: Path,
        count: int,
        size: tuple[int, int],
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        check_no_folder(output_dir / REPORT)
        reference = open_sources([scoring.reference], scoring.center_crop, scoring.skip_unreadable)[0]
        self._output_dir, self._reference, self._metrics = output_dir, reference, list(scoring.metrics or METRICS)
        self._count, self._ranks = count, ranks
        self._extractor = extractor_maker(scoring.features, scoring.inception_weights, device)()
        known = FeatureSet(str(reference.path), pool=reference.pool, spatial=reference.spatial)
        if reference.images is not None:
            own = self._expected(known.source, reference.images.count, reference.images.size)
            known = replace(own, pool=reference.pool or own.pool, spatial=reference.spatial or own.spatial)
        samples = self._expected(str(output_dir / SAMPLES), count, size)
        wanted, _ = computable(samples, known, self._metrics)
        # FID and sFID need only the features' statistics, whose size does not depend on the number of images.
        self._keep = not {*wanted} <= {"fid", "sfid"}
        self._accumulator = self._new_accumulator()
        self._seconds, self._taken = 0.0, 0
        self._stream = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the weights must be there before another stream reads them
            self._stream = torch.cuda.Stream(device)

    def _expected(self, source: str, count: int, size: tuple[int, int]) -> FeatureSet:
        """What will be known of images, with sizes but without values."""
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

    def begin(self, folder: JobFolder) -> None:
        """Take the images that were found; `take` is for those that are drawn. Call before the job runs."""
        kind = kind_of_features(self._extractor.description)
        self._job = {"job": folder.settings, "features": kind, "features_kept": self._keep}
        self._was_finished = folder.was_finished
        if not self._was_finished:
            own = self._file(self._ranks.rank)
            for stale in (own, *self._output_dir.glob(f".{own.stem}.*")):
                stale.unlink(missing_ok=True)
            folder.feed_found(self.take)

    def take(self, positions: IntArray, images: Images) -> None:
        """Compute and keep the features of images (n, H, W, 3) uint8 at positions (n,) of samples.npz."""
        began = time.perf_counter()
        with torch.cuda.stream(self._stream):  # beside the sampling; does nothing without a GPU
            self._accumulator.add(images, positions.tolist())
        if self._stream is not None:
            self._stream.synchronize()
        self._seconds += time.perf_counter() - began
        self._taken += len(images)

    def save(self) -> None:
        """Save the features of this process's images for the process that scores. Call before the job is finished."""
        if self._ranks.world_size > 1 and not self._was_finished:
            target = self._file(self._ranks.rank)
            with writing(target):
                self._accumulator.save(target)

    def finish(self, folder: JobFolder) -> None:
        """Score and report, if it is this process's turn. Call after `JobFolder.finish`.

        Raises:
            ValueError: the reference is damaged.
            OSError: metrics.json cannot be written; the samples are kept.
        """
        record = folder.record
        if record is None:
            return
        job = {"fingerprint": record["fingerprint"], "date": record["date"]}
        report = self._output_dir / REPORT
        if not (self._ranks.rank == 0 if self._was_finished else folder.wrote):
            if report.exists() and read_json(report).get("generation") == job:
                self._file(self._ranks.rank).unlink(missing_ok=True)  # too late: the samples are scored
            return
        try:
            progress = Progress()
            samples = self._all_features(progress)
            found = evaluate(samples, self._reference, self._metrics, lambda: self._extractor, _BATCH, progress)
            found["reference"] |= unreadable_images(self._reference)
            write_json(report, {**found, "generation": job})
            print(report_table(found))
            print(f"wrote {report}")
        finally:
            for entry in list(self._output_dir.iterdir()):
                if re.fullmatch(_FEATURES, entry.name):
                    entry.unlink(missing_ok=True)

    def _all_features(self, progress: Progress) -> FeatureSet:
        """The features of all samples: this process's, those that others saved, and the rest from samples.npz."""
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
                print(f"features of {len(places)} of {plural(self._count, 'image')} are computed from {samples}")
            for start in range(0, len(places), _BATCH):
                part = places[start : start + _BATCH]
                # Opened again each time: the pages of an open memory map count as this process's memory.
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
        # With another shard size the ranks have other images; take none twice.
        if missing[part.indices].all():
            self._accumulator.merge(part)
            missing[part.indices] = False

    def _file(self, rank: int) -> Path:
        name = f"features-{fingerprint(self._job)}-rank-{rank}-of-{self._ranks.world_size}.pt"
        return self._output_dir / name
