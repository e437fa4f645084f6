"""The generation job: seeds and labels in; shards as it goes; samples.npz, pictures and a record at the end.

However many processes share a job, and however often they are killed, the same images come out: a sample depends on its
seed and its label, a shard on nothing but its number, and what is finished is never drawn again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ddt_fast.files import check_replaceable, read_json
from ddt_fast.generation.background import Background, Decode, OnImages, PixelConverter, ShardWriter, Timings
from ddt_fast.generation.finish import IMAGE_NAMES, RECORD, SAMPLES, finish, finished_record, renew_pictures
from ddt_fast.generation.npz import open_images
from ddt_fast.generation.seeds import Job
from ddt_fast.generation.shards import (
    DamagedShardError,
    Images,
    ShardFolder,
    describe_other,
    differences,
    fingerprint,
    other_jobs,
    remove_job,
)
from ddt_fast.ranks import Ranks
from ddt_fast.sampling.engine import Sampler
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.wording import plural

_PRECIOUS_MINUTES = 10
"""Finished samples that took longer are not replaced unasked."""

_WAITING_BATCHES = 2
"""Batches that wait for the background thread: enough that neither waits for the other's fluctuations."""


class Generation:
    """A job in an output folder, begun or gone on with.

    Args:
        output_dir: exists and can be written.
        job: what to generate.
        settings: everything the images depend on, as plain JSON values; shards of other settings are never mixed in.
        ranks: this process among those that share the job.
        shard_size: images per shard; None: as the shards that are there, else `default_shard_size`.
        default_shard_size: for a new job.
        overwrite: begin anew, whatever the folder holds of an earlier job.

    Attributes:
        record: that of the finished job, else None.
        todo: the shards this process has yet to make.
        was_finished: whether the job was so before it was begun here.
        wrote: whether it was this process that wrote samples.npz.

    Raises:
        ValueError: the folder holds shards of other settings, finished samples of other settings that took long, or
            something of the user's where outputs go.
    """

    def __init__(
        self,
        output_dir: Path,
        job: Job,
        settings: dict[str, Any],
        *,
        ranks: Ranks,
        shard_size: int | None,
        default_shard_size: int,
        overwrite: bool,
    ) -> None:
        check_output(output_dir)
        settings = json.loads(json.dumps(settings))  # what a file holds of them: lists, where tuples were
        self.output_dir, self.job, self.settings, self.ranks = output_dir, job, settings, ranks
        if overwrite:
            (output_dir / RECORD).unlink(missing_ok=True)
            if ranks.world_size == 1:
                remove_job(output_dir / f"shards-{fingerprint(settings)}")
        self.shards = ShardFolder(output_dir, settings, len(job), shard_size, default_shard_size)
        self.timings = Timings()
        self.wrote = False
        self.record = None if overwrite else finished_record(output_dir, settings)
        self.was_finished = self.record is not None
        own = range(ranks.rank, self.shards.num_shards, ranks.world_size)
        if self.record is not None:
            self.todo: list[int] = []
            self._found = list(own)
            return
        self._make_way(overwrite)
        if overwrite:
            for shard in own:
                self.shards.discard(shard)
        self._found = [shard for shard in own if self._is_whole(shard)]
        self.todo = sorted(set(own) - set(self._found))
        if not overwrite and (record := finished_record(output_dir, settings)) is not None:
            # Another process has finished the job meanwhile, and removed shards that were looked for.
            self.record, self.todo, self._found = record, [], list(own)

    def _make_way(self, overwrite: bool) -> None:
        for other in other_jobs(self.output_dir, self.shards):
            if not overwrite:
                raise ValueError(
                    f"{describe_other(other, self.settings)}; go on with those settings, take another output folder, "
                    "or give --overwrite to drop them"
                )
            remove_job(other)
        earlier = self.output_dir / RECORD
        if not overwrite and earlier.exists():
            record = read_json(earlier)
            minutes = record.get("process_seconds", 0) / 60
            if minutes >= _PRECIOUS_MINUTES and (self.output_dir / SAMPLES).exists():
                changed = "; ".join(differences(record.get("settings", {}), self.settings)) or "its samples changed"
                raise ValueError(
                    f"{self.output_dir} holds finished samples of other settings ({changed}) that took {minutes:.0f} "
                    "minutes; take another output folder, or give --overwrite to replace them"
                )

    def _is_whole(self, shard: int) -> bool:
        if not self.shards.file(shard).exists():
            return False
        try:
            self.shards.read(shard)
        except DamagedShardError as error:
            tqdm.write(f"warning: {error}; it is made again", file=sys.stderr)
            self.shards.discard(shard)
            return False
        return True

    @property
    def num_images(self) -> int:
        """Images this process has yet to make."""
        return sum(len(self.shards.positions(shard)) for shard in self.todo)

    @property
    def found(self) -> str:
        """What was there before, in words; empty for a new job."""
        if self.record is not None:
            when = self.record["date"]
            return f"{self.output_dir} holds these samples already, finished {when}; --overwrite makes them again"
        if not self._found:
            return ""
        total = plural(len(self._found) + len(self.todo), "shard")
        size = plural(self.shards.shard_size, "image")
        return f"found {len(self._found)} of {total} of {size}; going on with the others"

    def found_made_with(self) -> dict[str, Any]:
        """What the first found shard was made with; empty where there is none."""
        return {} if self.record is not None or not self._found else self.shards.read(self._found[0])[1]

    def feed_found(self, on_images: OnImages) -> None:
        """Call on_images(positions (n,), images (n, H, W, 3)) with what this process has not to make any more, so that
        together with `run` it sees each of this process's images once."""
        for shard in self._found:
            on_images(np.array(self.shards.positions(shard)), self._found_images(shard))

    def _found_images(self, shard: int) -> Images:
        if self.record is None:
            try:
                return self.shards.read(shard)[0]
            except FileNotFoundError:
                # Another process may have finished the job meanwhile, and removed the shards.
                self.record = finished_record(self.output_dir, self.settings)
                if self.record is None:
                    raise
        positions = self.shards.positions(shard)
        # Opened anew, because pages of a map that stays open count as memory of this process.
        return open_images(self.output_dir / SAMPLES)[positions.start : positions.stop]

    def run(
        self,
        sampler: Sampler,
        decode: Decode | None = None,
        *,
        decode_batch_size: int = 8,
        made_with: dict[str, Any] | None = None,
        on_images: OnImages | None = None,
        progress: Callable[[float], object] | None = None,
    ) -> None:
        """Draw, decode and write the shards in `todo`; the last two in a background thread, while the next are drawn.

        Args:
            sampler: what draws them; its batches do not cross shards.
            decode: latents → pixels in [-1, 1]; None for a pixel-space model.
            decode_batch_size: samples decoded at a time.
            made_with: plain JSON values that go on record with the shards.
            on_images: called in the background thread with positions (n,) and images (n, H, W, 3) of every batch.
            progress: called after every solver step with the images done so far; a step is that fraction of its batch.

        Raises:
            ValueError: samples that are not finite.
            OSError: no space left, or another failure of the file system. Finished shards are kept.
        """
        self.shards.begin()
        began = time.perf_counter()
        shape = (sampler.model.config.in_channels, *sampler.image_size)
        num_steps = len(sampler.plan.steps)
        converter = PixelConverter(sampler.device, decode, sampler.batch_size if decode is None else decode_batch_size)
        writer = ShardWriter(self.shards, converter, made_with or {}, on_images, self.timings)
        done = 0
        with Background(_WAITING_BATCHES) as background:
            for shard in self.todo:
                positions = self.shards.positions(shard)
                for start in range(positions.start, positions.stop, sampler.batch_size):
                    part = slice(start, min(start + sampler.batch_size, positions.stop))
                    seeds = self.job.seeds[part]
                    noise, generators = seeded_noise(seeds.tolist(), shape)
                    labels = torch.from_numpy(self.job.labels[part])
                    steps = None if progress is None else _Steps(progress, num_steps, done, len(seeds))
                    samples = sampler(noise, labels, generators=generators, progress=steps)
                    background.submit(writer.take, shard, part, samples, seeds, converter.mark())
                    done += len(seeds)
        self.timings.sampling += time.perf_counter() - began

    def finish(
        self, about: dict[str, Any], *, num_png: int, columns: int, keep_shards: bool = False
    ) -> dict[str, Any] | None:
        """Once all shards of all processes are there: samples.npz, grid.png, images/ and generation.json from them.

        Args:
            about: plain JSON values that go on record.
            num_png: images written as PNGs too, those of the first draws.
            columns: of the grid.
            keep_shards: do not remove the shards.

        Returns:
            The record, or None while other processes are still at work.

        Raises:
            DamagedShardError: a shard of another process does not hold what was written; it is removed.
            OSError: no space left, or another failure of the file system. The shards are kept.
        """
        if self.record is None:
            about = {**about, "written_by_rank": self.ranks.rank}
            self.record = finish(self.output_dir, self.shards, self.job, about, num_png, columns)
            self.wrote = self.record is not None and self.record["written_by_rank"] == self.ranks.rank
        elif self.ranks.rank == 0 and self.record["num_png"] != num_png:
            self.record = renew_pictures(self.output_dir, self.job, self.record, num_png, columns)
        if self.record is not None and not keep_shards:
            remove_job(self.shards.path)
        return self.record


@dataclass(frozen=True)
class _Steps:
    """A sampler's progress in its batch as a number of images."""

    progress: Callable[[float], object]
    num_steps: int
    done: int
    batch: int

    def __call__(self, step: int, _: object) -> None:
        self.progress(self.done + self.batch * step / self.num_steps)


def check_output(output_dir: Path) -> None:
    """ValueError now, before any work, when outputs would have to replace something that is not ddt-fast's own."""
    check_replaceable(output_dir / "images", IMAGE_NAMES)
    for name in ("grid.png", SAMPLES, RECORD):
        if (output_dir / name).is_dir():
            raise ValueError(f"{output_dir / name} is a folder; a file of that name is to be written")
