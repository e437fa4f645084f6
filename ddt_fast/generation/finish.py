"""The end of a job: from shards to samples.npz, pictures and generation.json.

The last process to finish its shards does this; if it is killed, the next start of the job does. All outputs are
written before any gets its name, generation.json gets its name last, and then the shards are removed.
"""

import fcntl
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddt_fast.data.image_file import Images
from ddt_fast.evaluation.sources import RECORD, SAMPLES
from ddt_fast.files import atomic_file, atomic_folder, json_text, read_json, writing
from ddt_fast.generation.images import grid_columns, labelled_grid
from ddt_fast.generation.npz import open_images, write_npz
from ddt_fast.generation.seeds import GRID_IMAGES, Assignment
from ddt_fast.generation.shards import DamagedShardError, ShardFolder, fingerprint

IMAGE_NAMES = r"\d+_class_\d+_seed_\d+\.png"
_TEMPORARY = r"\.samples\.\d+\.npz|\.grid\.\d+\.png|\.generation\.\d+\.json|\.images\.[a-z0-9_]{8}(\.old)?"


def finished_record(output_dir: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """generation.json of a finished job with these settings, if its samples are there; else None."""
    if not (output_dir / RECORD).is_file():
        return None
    record = read_json(output_dir / RECORD)
    samples = output_dir / SAMPLES
    whole = samples.is_file() and samples.stat().st_size == record.get("bytes")
    return record if whole and record.get("fingerprint") == fingerprint(settings) else None


def finish(
    output_dir: Path, shards: ShardFolder, assignment: Assignment, about: dict[str, Any], num_png: int
) -> dict[str, Any] | None:
    """Write all outputs and return the record; None if shards are missing or another process is writing the outputs.

    Raises:
        DamagedShardError: a shard does not hold what was written; it is removed.
        OSError: no space is left, or the file system fails otherwise.
    """
    if not shards.path.exists() or shards.missing():
        return finished_record(output_dir, shards.settings)
    record = None
    with _only_process(shards.path) as alone:
        if not alone or (record := finished_record(output_dir, shards.settings)) is not None:
            return record
        for entry in list(output_dir.iterdir()):  # left by processes that were killed while merging
            if re.fullmatch(_TEMPORARY, entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        began = time.perf_counter()
        makers: list[dict[str, Any]] = []
        first = shards.read(0)[0]
        shape, latents = (len(assignment), *first.shape[1:]), first.dtype == np.float32
        with (
            writing(output_dir / SAMPLES),
            atomic_file(output_dir / RECORD) as record_file,
            nullcontext() if latents else _pictures(output_dir) as pictures,
            atomic_file(output_dir / SAMPLES) as samples,
        ):
            arrays = {"labels": assignment.labels, "seeds": assignment.seeds}
            write_npz(samples, shape, _stream(shards, makers), latents=latents, **arrays)
            if pictures is None:  # an earlier job's would be taken for these samples'
                shutil.rmtree(output_dir / "images", ignore_errors=True)
                (output_dir / "grid.png").unlink(missing_ok=True)
            else:
                _draw(open_images(samples), assignment, *pictures, num_png)
            record = {
                "fingerprint": fingerprint(shards.settings),
                "num_images": len(assignment),
                "num_png": num_png,
                "bytes": samples.stat().st_size,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "process_seconds": sum(maker["seconds"] for maker in makers),
                "merge_seconds": time.perf_counter() - began,
                "made_with": makers,
                **about,
                "settings": shards.settings,
            }
            record_file.write_text(json_text(record))
        return record


def renew_pictures(output_dir: Path, assignment: Assignment, record: dict[str, Any], num_png: int) -> dict[str, Any]:
    """Write grid.png and another number of PNGs from samples.npz, and return the new record."""
    with (
        writing(output_dir / "images"),
        atomic_file(output_dir / RECORD) as record_file,
        _pictures(output_dir) as (folder, grid),
    ):
        _draw(open_images(output_dir / SAMPLES), assignment, folder, grid, num_png)
        record = {**record, "num_png": num_png}
        record_file.write_text(json_text(record))
    return record


@contextmanager
def _pictures(output_dir: Path) -> Iterator[tuple[Path, Path]]:
    with atomic_folder(output_dir / "images", IMAGE_NAMES) as folder, atomic_file(output_dir / "grid.png") as grid:
        yield folder, grid


def _draw(images: Images, assignment: Assignment, folder: Path, grid: Path, num_png: int) -> None:
    labels = assignment.labels.tolist()

    def save(position: int) -> None:
        name = f"{position:05d}_class_{labels[position]}_seed_{assignment.seeds[position]}.png"
        Image.fromarray(images[position]).save(folder / name)

    with ThreadPoolExecutor() as pool:  # Pillow compresses outside the interpreter's lock
        list(pool.map(save, assignment.first_draws(num_png).tolist()))
    shown = assignment.first_draws(GRID_IMAGES).tolist()
    captions = [assignment.names.get(labels[p], str(labels[p])) for p in shown]
    labelled_grid(images[shown], captions, grid_columns(len({*labels}))).save(grid)


def _stream(shards: ShardFolder, makers: list[dict[str, Any]]) -> Iterator[Images]:
    """All images, shard by shard; `makers` gets what they were made with, their number, the time, and their speed over
    all processes."""
    for shard in range(shards.num_shards):
        try:
            images, made_with = shards.read(shard)
        except DamagedShardError:
            shards.discard(shard)
            raise
        seconds = made_with.pop("seconds", 0.0)
        maker = next((maker for maker in makers if maker.items() >= made_with.items()), None)
        if maker is None:
            maker = {**made_with, "images": 0, "seconds": 0.0}
            makers.append(maker)
        maker["images"] += len(images)
        maker["seconds"] += seconds
        speed = maker["images"] / maker["seconds"] * maker.get("processes", 1) if maker["seconds"] else None
        maker["img_per_second"] = speed
        yield images


@contextmanager
def _only_process(folder: Path) -> Iterator[bool]:
    """Whether this process holds the folder's lock, which the operating system releases when a process dies."""
    try:
        file = (folder / "merge.lock").open("w")
    except FileNotFoundError:  # the other process has finished, and removed the shards
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            # No locks on this file system: two processes that finish at once write the same files, each in one move.
            pass
        yield True
