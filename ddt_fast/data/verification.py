"""Comparing the checksums of a cache's shards, once: what was compared is on record beside them, in verified.json."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from ddt_fast.data.latent_cache import MANIFEST, VERIFIED, file_sha256
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.files import read_json, write_json
from ddt_fast.ranks import process_ranks


def verify_together(dataset: LatentDataset, group: dist.ProcessGroup) -> None:
    """Compare the checksums of all shards that were not compared before, as they are. All processes of the group
    call it together and share the work; those that see another copy of the cache, on another machine, verify that one.

    A shard counts as compared while its size and its time of modification are those on record. Shards without checksums
    (LightningDiT's) are passed over. Progress goes to stderr.

    Raises:
        ValueError: a shard of another checksum, or one that cannot be read; the same in all processes.
    """
    if not dataset.checksums:
        return
    own, first = dist.get_rank(group), dist.get_rank(group) == 0
    manifest = (dataset.folder / MANIFEST).stat()
    copies = _gather((manifest.st_ino, manifest.st_mtime_ns, _unverified(dataset)), group)
    sharing = [rank for rank, copy in enumerate(copies) if copy[:2] == copies[own][:2]]
    # One of them decides, since a shared file system may show others an older record.
    todo: list[str] = copies[sharing[0]][2]
    if not any(copy[2] for copy in copies):
        return
    started = time.perf_counter()
    # As they are before they are read: a change in between is one that nobody compared.
    seen = {name: _as_it_is(dataset.folder / name) for name in todo}
    wrong = wrong_shards(dataset, todo[sharing.index(own) :: len(sharing)], quiet=not first)
    messages = [message for found in _gather(wrong, group) for message in found]
    if messages:
        raise ValueError(messages[0] + (f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""))
    size = sum(seen[name]["bytes"] for name in todo)
    if first:
        rate = size / 1e9 / (time.perf_counter() - started)
        tqdm.write(f"verified {size / 1e9:.2f} GB of {dataset.folder} at {rate:.2f} GB/s", file=sys.stderr)
    if own == sharing[0]:
        _remember(dataset, seen)


def wrong_shards(dataset: LatentDataset, names: Iterable[str], quiet: bool = False) -> list[str]:
    """Read these shards, and say in a line each which cannot be read, or do not have the checksum on record."""
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
                what = f"does not have the checksum that {dataset.folder / MANIFEST} says"
                wrong.append(f"{files[name]} {what}: {dataset.checksums[name]}")
    return wrong


def _checksum(file: Path) -> str | OSError:
    try:
        return file_sha256(file)
    except OSError as error:
        return error


def _unverified(dataset: LatentDataset) -> list[str]:
    known = _record(dataset.folder / VERIFIED)
    return [
        name
        for name, sha256 in dataset.checksums.items()
        if known.get(name) != {**_as_it_is(dataset.folder / name), "sha256": sha256}
    ]


def _record(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{error}; remove it, and all checksums are compared again") from error


def _as_it_is(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _remember(dataset: LatentDataset, seen: dict[str, dict[str, Any]]) -> None:
    path = dataset.folder / VERIFIED
    known = _record(path)
    known |= {name: {**status, "sha256": dataset.checksums[name]} for name, status in seen.items()}
    try:
        write_json(path, known)
    except OSError as error:
        reason = error.strerror or error
        tqdm.write(
            f"warning: {path} could not be written ({reason}), so the next run compares these checksums again; "
            "--data.verify false leaves it out",
            file=sys.stderr,
        )


def _gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
