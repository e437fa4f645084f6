"""The output folder of a job: what it holds already, and what is left for this process to do."""

from pathlib import Path
from typing import Any

import numpy as np

from ddt_fast.data.image_file import Images
from ddt_fast.files import check_no_folder, check_replaceable, plain, read_json
from ddt_fast.generation.background import OnImages
from ddt_fast.generation.finish import IMAGE_NAMES, RECORD, SAMPLES, finish, finished_record, renew_pictures
from ddt_fast.generation.npz import open_images
from ddt_fast.generation.seeds import Assignment
from ddt_fast.generation.settings import Outputs
from ddt_fast.generation.shards import (
    DamagedShardError,
    ShardFolder,
    describe_other,
    fingerprint,
    job_folders,
    other_jobs,
    remove_job,
)
from ddt_fast.ranks import Ranks
from ddt_fast.wording import differences, plural, warn


class JobFolder:
    """The output folder of a job, new or continued. ValueError if the folder holds shards with other settings, finished
    samples with other settings, or something of the user's where outputs go.

    Args:
        path: the folder, which exists and can be written.
        settings: everything the images depend on; shards with other settings are never mixed in.
        num_images: images of the job.
        default_shard_size: images per shard of a new job, unless `outputs` gives a number.

    Attributes:
        record: generation.json of the finished job, else None.
        todo: the shards this process has yet to make.
        was_finished: whether the job was finished before it was opened here.
        wrote: whether this process wrote samples.npz.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        num_images: int,
        default_shard_size: int,
        outputs: Outputs,
        ranks: Ranks,
    ) -> None:
        check_output(path, outputs.overwrite)
        settings, overwrite = plain(settings), outputs.overwrite
        self.path, self.settings, self.outputs, self.ranks = path, settings, outputs, ranks
        if overwrite:
            (path / RECORD).unlink(missing_ok=True)
            if ranks.world_size == 1:
                remove_job(path / f"shards-{fingerprint(settings)}")
        self.shards = ShardFolder(path, settings, num_images, outputs.shard_size, default_shard_size)
        self.wrote = False
        self.record = None if overwrite else finished_record(path, settings)
        self.was_finished = self.record is not None
        self._found = own = list(range(ranks.rank, self.shards.num_shards, ranks.world_size))
        self.todo: list[int] = []
        if self.was_finished:
            return
        self._make_way(overwrite)
        if overwrite:
            for shard in own:
                self.shards.discard(shard)
        found = [shard for shard in own if self._is_whole(shard)]
        # Meanwhile, another process may have finished the job and removed its shards.
        self.record = None if overwrite else finished_record(path, settings)
        if self.record is None:
            self._found, self.todo = found, sorted({*own} - {*found})

    def _make_way(self, overwrite: bool) -> None:
        """Remove other jobs' folders, or refuse to replace what they hold."""
        for other in other_jobs(self.path, self.shards):
            if not overwrite:
                raise ValueError(
                    f"{describe_other(other, self.settings)}; continue with those settings, choose another output "
                    "folder, or set `overwrite` to drop them"
                )
            remove_job(other)
        earlier = self.path / RECORD
        finished = earlier.exists() and (self.path / SAMPLES).exists()
        if not overwrite and finished and finished_record(self.path, self.settings) is None:
            changed = differences(read_json(earlier).get("settings", {}), self.settings) or ["its samples changed"]
            raise ValueError(
                f"{self.path} holds finished samples with other settings ({'; '.join(changed)}); choose another output "
                "folder, or set `overwrite` to replace them"
            )

    def _is_whole(self, shard: int) -> bool:
        if not self.shards.file(shard).exists():
            return False
        try:
            self.shards.read(shard)
        except DamagedShardError as error:
            warn(f"{error}; making it again")
            self.shards.discard(shard)
            return False
        return True

    @property
    def num_images(self) -> int:
        """Images this process has yet to make."""
        return sum(len(self.shards.positions(shard)) for shard in self.todo)

    @property
    def found(self) -> str:
        """What the folder held, in words; empty for a new job."""
        if self.record is not None:
            when = self.record["date"]
            return f"{self.path} holds these samples already, finished {when}; overwrite draws them again"
        if not self._found:
            return ""
        total = plural(len(self._found) + len(self.todo), "shard")
        size = plural(self.shards.shard_size, "image")
        return f"found {len(self._found)} of {total} of {size}; continuing with the others"

    def found_made_with(self) -> dict[str, Any]:
        """What the first found shard was made with; empty if no shard was found."""
        return {} if self.record is not None or not self._found else self.shards.read(self._found[0])[1]

    def feed_found(self, on_images: OnImages) -> None:
        """Call on_images(positions (n,), images (n, H, W, 3)) with this process's images that were found."""
        for shard in self._found:
            on_images(np.array(self.shards.positions(shard)), self._found_images(shard))

    def _found_images(self, shard: int) -> Images:
        if self.record is None:
            try:
                return self.shards.read(shard)[0]
            except FileNotFoundError:
                # Another process may have finished the job and removed the shards.
                self.record = finished_record(self.path, self.settings)
                if self.record is None:
                    raise
        positions = self.shards.positions(shard)
        # Opened again each time: the pages of an open memory map count as this process's memory.
        return open_images(self.path / SAMPLES)[positions.start : positions.stop]

    def finish(self, assignment: Assignment, about: dict[str, Any]) -> dict[str, Any] | None:
        """Write samples.npz, grid.png, images/ and generation.json once the shards of all processes are there, and
        return the record, which holds `about`; None while other processes are still working.

        Raises:
            DamagedShardError: a shard of another process does not hold what was written; it is removed.
            OSError: no space is left, or the file system fails otherwise; the shards are kept.
        """
        num_png = self.outputs.png_count(len(assignment))
        if self.record is None:
            about = {**about, "written_by_rank": self.ranks.rank}
            self.record = finish(self.path, self.shards, assignment, about, num_png)
            self.wrote = self.record is not None and self.record["written_by_rank"] == self.ranks.rank
        elif self.ranks.rank == 0 and self.record["num_png"] != num_png:
            self.record = renew_pictures(self.path, assignment, self.record, num_png)
        if self.record is not None and not self.outputs.keep_shards:
            remove_job(self.shards.path)
        return self.record


def check_output(path: Path, overwrite: bool) -> None:
    """ValueError, before any work, if outputs would replace something that ddt-fast did not write. With `overwrite`,
    samples.npz and grid.png may be anyone's."""
    check_replaceable(path / "images", IMAGE_NAMES)
    check_no_folder(*(path / name for name in ("grid.png", SAMPLES, RECORD)))
    # In this order: a job that another process is finishing has its record before its shards are removed.
    found = [path / name for name in (SAMPLES, "grid.png") if (path / name).exists()]
    if found and not overwrite and not job_folders(path) and not (path / RECORD).exists():
        raise ValueError(
            f"{found[0]} would be replaced, but there is no {RECORD} that says that ddt-fast wrote it; choose another "
            "output folder, or set `overwrite` to replace it"
        )
