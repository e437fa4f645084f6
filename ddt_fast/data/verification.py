"""Checksums of a cache's shards: compared once, and recorded beside the shards in verified.json."""

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from ddt_fast.data.latent_cache import MANIFEST, VERIFIED
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.files import file_sha256, read_json, write_json
from ddt_fast.ranks import process_ranks
from ddt_fast.wording import tell, warn


def verify_together(dataset: LatentDataset, group: dist.ProcessGroup) -> None:
    """Compare the checksums of all shards that have changed since they were last compared. All processes of the group
    call it together and share the work; those that see another copy of the cache, on another machine, verify that copy.

    A shard has changed if its size or modification time differs from the record. Shards without checksums
    (LightningDiT's) are skipped. Progress goes to stderr. ValueError, in all processes alike, if a shard has another
    checksum or cannot be read.
    """
    if not dataset.checksums:
        return
    own, first = dist.get_rank(group), dist.get_rank(group) == 0
    known, now = _record(dataset.folder / VERIFIED), {name: _status(dataset, name) for name in dataset.checksums}
    manifest = (dataset.folder / MANIFEST).stat()
    changed = [name for name, status in now.items() if known.get(name) != status]
    copies = _gather((manifest.st_ino, manifest.st_mtime_ns, changed), group)
    if not any(copy[2] for copy in copies):
        return
    sharing = [rank for rank, copy in enumerate(copies) if copy[:2] == copies[own][:2]]
    # One of them decides, because a shared file system may show the others an older record.
    todo: list[str] = copies[sharing[0]][2]
    started, size = time.perf_counter(), sum(now[name]["bytes"] for name in todo)
    wrong = wrong_shards(dataset, todo[sharing.index(own) :: len(sharing)], quiet=not first)
    messages = [message for found in _gather(wrong, group) for message in found]
    if messages:
        raise ValueError(messages[0] + (f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""))
    if first:
        rate = size / 1e9 / (time.perf_counter() - started)
        tell(f"verified {size / 1e9:.2f} GB of {dataset.folder} at {rate:.2f} GB/s")
    if own == sharing[0]:
        # The status from before reading: later changes have not been compared.
        _remember(dataset.folder / VERIFIED, {name: now[name] for name in todo})


def wrong_shards(dataset: LatentDataset, names: Iterable[str], quiet: bool = False) -> list[str]:
    """Read these shards; return a line for each one that cannot be read or does not have the recorded checksum."""
    files = {name: dataset.folder / name for name in names}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    threads = max(1, min(8, len(os.sched_getaffinity(0)) // process_ranks().local_size))
    wrong = []
    bar = tqdm(total=sum(sizes.values()), desc="verifying", unit="B", unit_scale=True, leave=False, disable=quiet)
    with ThreadPoolExecutor(threads) as pool, bar:
        for name, found in zip(files, pool.map(_checksum, files.values()), strict=True):
            bar.update(sizes[name])
            if isinstance(found, OSError):
                wrong.append(f"{files[name]} cannot be read: {found.strerror or found}")
            elif found != dataset.checksums[name]:
                what = f"does not have the checksum in {dataset.folder / MANIFEST}"
                wrong.append(f"{files[name]} {what}: {dataset.checksums[name]}")
    return wrong


def _checksum(file: Path) -> str | OSError:
    try:
        return file_sha256(file)
    except OSError as error:
        return error


def _status(dataset: LatentDataset, name: str) -> dict[str, Any]:
    status = (dataset.folder / name).stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns, "sha256": dataset.checksums[name]}


def _record(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{error}; remove it to compare all checksums again") from error


def _remember(path: Path, compared: dict[str, dict[str, Any]]) -> None:
    try:
        write_json(path, _record(path) | compared)
    except OSError as error:
        hint = "so the next run compares these checksums again; data.verify false skips that"
        warn(f"{path} could not be written ({error.strerror or error}), {hint}")


def _gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
