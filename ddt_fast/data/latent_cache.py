"""The latent cache: an image folder, encoded once, as shards of posterior means and log-variances.

A cache is a folder of
    settings.json                               what it is made from and how; written first, a later run must agree
    latents-K-of-N.safetensors                  mean, logvar (M, C, h, w), with flips also mean_flip and logvar_flip;
                                                labels, index (M,) int64: class and place in the sorted image list;
                                                with a REPA encoder features (and features_flip) (M, N', F)
    latents-K-of-N.json                         count, size and checksum of that shard, and the images it lacks
    manifest.json                               settings, counts, shards with checksums, unreadable images; written last
    verified.json                               shards whose checksums a training run has compared (`verification`)

Shard K covers shard_size images from K * shard_size on, in batches that do not cross its ends: its bytes depend on the
images and the settings, not on how many processes there were or how often they were stopped. A shard is finished once
its file has its final name; its .json is written just before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ddt_fast.files import atomic_file, read_json, write_json, writing

VERSION = 1
SETTINGS, MANIFEST, VERIFIED = "settings.json", "manifest.json", "verified.json"
_OWNED = (
    r"(settings|manifest|verified)\.json|latents-\d+-of-\d+\.(safetensors|json)"
    r"|\.(settings|manifest|verified|latents-).*"
)
_TEMPORARY = r"\.(settings|manifest|verified)\.\d+\.json|\.latents-\d+-of-\d+\.\d+\.(safetensors|json)"


@dataclass(frozen=True)
class CacheSettings:
    """Everything the bytes of a cache depend on.

    Args:
        image_size: side of the square crop in pixels.
        autoencoder: hub id or local folder of the AutoencoderKL.
        autoencoder_sha256: of its weights.
        scaling_factor: what a drawn latent is multiplied by.
        latent_shape: (C, h, w) of one latent.
        dtype: of the stored latents, "float16" or "bfloat16".
        compute_dtype: of the autoencoder.
        flips: whether the mirrored images are encoded too.
        shard_size: images per shard.
        batch_size: images per call of the autoencoder.
        num_images: of the image folder, readable or not.
        images_sha256: of their names.
        class_names: label i is class_names[i].
        repa_encoder: hub id or local folder of the DINOv2 whose features are cached too; None without features.
        repa_encoder_sha256: of its weights.
        feature_shape: (N', F) of one image's features, a square grid row by row.
    """

    image_size: int
    autoencoder: str
    autoencoder_sha256: str
    scaling_factor: float
    latent_shape: tuple[int, int, int]
    dtype: str
    compute_dtype: str
    flips: bool
    shard_size: int
    batch_size: int
    num_images: int
    images_sha256: str
    class_names: tuple[str, ...]
    repa_encoder: str | None = None
    repa_encoder_sha256: str | None = None
    feature_shape: tuple[int, int] | None = None
    version: int = field(default=VERSION, init=False)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CacheSettings:
        """The settings in a manifest; KeyError, TypeError or ValueError if some are missing or wrong."""
        known = {entry.name for entry in fields(cls) if entry.init}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items() if name in known
        }
        return cls(**{**values, "scaling_factor": float(values["scaling_factor"])})

    @property
    def num_shards(self) -> int:
        """Shards, the last one possibly shorter."""
        return -(-self.num_images // self.shard_size)

    def shard_range(self, shard: int) -> range:
        """The images that a shard covers, as places in the sorted image list."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def shard_name(self, shard: int) -> str:
        """File name of a shard, without its suffix."""
        return f"latents-{shard:05d}-of-{self.num_shards:05d}"


@dataclass(frozen=True)
class Unreadable:
    """An image that is not in the cache: its place in the sorted list, its path below the image folder, and why."""

    index: int
    file: str
    reason: str


def names_sha256(files: Iterable[str]) -> str:
    """Checksum of a list of file names."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file) + b"\0")
    return digest.hexdigest()


class CacheFolder:
    """A cache being written, by this process and possibly by others that own other shards.

    Args:
        path: the folder; created if it is missing.
        settings: of this run.

    Raises:
        ValueError: the folder holds something else, or a cache with other settings (the message names them).
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, settings: CacheSettings) -> None:
        self.path, self.settings = path, settings
        path.mkdir(parents=True, exist_ok=True)
        check_owned(path)
        self._agree_on_settings()

    def _agree_on_settings(self) -> None:
        target = self.path / SETTINGS
        ours = _plain(self.settings)
        if not target.exists():
            with writing(target):
                write_json(target, ours)
        theirs = read_json(target)
        changed = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        if changed:
            shown = "; ".join(f"{name} {_short(theirs.get(name))}, now {_short(ours.get(name))}" for name in changed)
            raise ValueError(f"{self.path} was begun with other settings: {shown}; use another output folder")

    def finished_shards(self, shards: Iterable[int], *, verify: bool = False) -> set[int]:
        """Those of `shards` that exist with the size on record; with verify, also with the checksum on record. Damaged
        ones are reported and count as unfinished."""
        finished = set()
        for shard in shards:
            name = self.settings.shard_name(shard)
            file = self.path / f"{name}.safetensors"
            if not file.exists():
                continue
            record = read_json(self.path / f"{name}.json") if (self.path / f"{name}.json").exists() else {}
            damage = None
            if file.stat().st_size != record.get("bytes"):
                damage = f"is {file.stat().st_size} bytes, {record.get('bytes', 'not')} on record"
            elif verify and file_sha256(file) != record["sha256"]:
                damage = "does not have the checksum on record"
            if damage:
                tqdm.write(f"warning: {file} {damage}; it is made again", file=sys.stderr)
            else:
                finished.add(shard)
        return finished

    def write_shard(self, shard: int, tensors: dict[str, Tensor], unreadable: list[Unreadable]) -> None:
        """Write shard number `shard`; it is finished once this returns, and not before.

        Args:
            shard: its number.
            tensors: what it holds, by name.
            unreadable: its images that are not among them.

        Raises:
            OSError: no space left, or another failure of the file system; finished shards are unchanged.
        """
        self.remove_temporaries(shard)
        name = self.settings.shard_name(shard)
        content = save(tensors, metadata={"format": "pt"})
        record = {
            "file": f"{name}.safetensors",
            "count": len(tensors["labels"]),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "labels": {str(label): count for label, count in sorted(Counter(tensors["labels"].tolist()).items())},
            "unreadable": [asdict(image) for image in unreadable],
        }
        target = self.path / f"{name}.safetensors"
        with writing(target), atomic_file(target) as file:
            file.write_bytes(content)
            write_json(self.path / f"{name}.json", record)

    def remove_temporaries(self, shard: int | None = None) -> None:
        """Remove what stopped runs left half-written, of one shard or of all."""
        prefix = "" if shard is None else f".{self.settings.shard_name(shard)}."
        for entry in list(self.path.iterdir()):
            if re.fullmatch(_TEMPORARY, entry.name) and entry.name.startswith(prefix):
                entry.unlink(missing_ok=True)

    def write_manifest(self) -> dict[str, Any]:
        """Write manifest.json from the records of all shards, which must be finished, and return it."""
        records = [
            read_json(self.path / f"{self.settings.shard_name(shard)}.json")
            for shard in range(self.settings.num_shards)
        ]
        counts: Counter[str] = Counter()
        for record in records:
            counts.update(record["labels"])
        manifest = {
            "version": VERSION,
            "settings": _plain(self.settings),
            "count": sum(record["count"] for record in records),
            "class_counts": [counts[str(label)] for label in range(len(self.settings.class_names))],
            "shards": [{key: record[key] for key in ("file", "count", "bytes", "sha256")} for record in records],
            "unreadable": [image for record in records for image in record["unreadable"]],
        }
        with writing(self.path / MANIFEST):
            write_json(self.path / MANIFEST, manifest)
        self.remove_temporaries()
        return manifest


def check_owned(path: Path) -> None:
    """ValueError if a folder holds something that a cache does not."""
    names = sorted(entry.name for entry in path.iterdir())
    foreign = [name for name in names if not re.fullmatch(_OWNED, name)]
    if not foreign and SETTINGS not in names:
        foreign = [name for name in names if not name.startswith(".")]
    if foreign:
        raise ValueError(f"output folder {path} holds {foreign[0]}, which is not of a cache begun there; name another")


def file_sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def storage_dtype(name: str) -> torch.dtype:
    """The dtype of stored latents by name; ValueError for others."""
    if name not in ("float16", "bfloat16"):
        raise ValueError(f"dtype is {name!r}; allowed: float16, bfloat16")
    return torch.float16 if name == "float16" else torch.bfloat16


def _plain(settings: CacheSettings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} names"
    return str(value) if len(str(value)) <= 80 else str(value)[:77] + "..."
