"""The latent cache: an image folder, encoded once, as shards of posterior means and log-variances.

A cache is a folder of
    settings.json                               what it is made from and how; written first, and later runs must agree
    latents-K-of-N.safetensors                  mean, logvar (M, C, h, w), with flips also mean_flip and logvar_flip;
                                                labels, index (M,) int64: class and place in the sorted image list;
                                                with a REPA encoder features (and features_flip) (M, N', F)
    latents-K-of-N.json                         count, size and checksum of that shard, and its unreadable images
    manifest.json                               settings, counts, shards with checksums, unreadable images; written last
    verified.json                               shards whose checksums a training run has compared (`verification`)

Shard K covers the shard_size images from K * shard_size, in batches that do not cross its ends: its bytes depend on the
images and the settings, not on the number of processes or how often they were stopped. A shard is finished once its
file has its final name; its .json is written just before.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import save
from torch import Tensor

from ddt_fast.checks import require_choice
from ddt_fast.device import DTYPES
from ddt_fast.files import atomic_file, file_sha256, plain, read_json, write_json, writing
from ddt_fast.wording import differences, warn

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
        autoencoder_sha256: checksum of its weights.
        scaling_factor: factor on a drawn latent.
        latent_shape: (C, h, w) of one latent.
        dtype: dtype of the stored latents, "float16" or "bfloat16".
        compute_dtype: dtype of the autoencoder.
        flips: whether the mirrored images are encoded too.
        shard_size: images per shard.
        batch_size: images per call of the autoencoder.
        num_images: images in the folder, readable or not.
        images_sha256: checksum of their names.
        class_names: label i is class_names[i].
        repa_encoder: hub id or local folder of the DINOv2 whose features are cached too; None without features.
        repa_encoder_sha256: checksum of its weights.
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
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The settings in a manifest; KeyError, TypeError or ValueError if any are missing or wrong."""
        known = {entry.name for entry in fields(cls) if entry.init}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items() if name in known
        }
        return cls(**{**values, "scaling_factor": float(values["scaling_factor"])})

    @property
    def num_shards(self) -> int:
        """Number of shards; the last may be shorter."""
        return -(-self.num_images // self.shard_size)

    def shard_range(self, shard: int) -> range:
        """The images that a shard covers, as places in the sorted image list."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def shard_name(self, shard: int) -> str:
        """File name of a shard, without its suffix."""
        return f"latents-{shard:05d}-of-{self.num_shards:05d}"


@dataclass(frozen=True)
class Unreadable:
    """An image that is not in the cache: its place in the sorted list, its path below the image folder, the reason."""

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
        path: the folder; created if missing.
        settings: the settings of this run.

    Raises:
        ValueError: the folder holds something else, or a cache with other settings (the message names them).
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, settings: CacheSettings) -> None:
        self.path, self.settings = path, settings
        path.mkdir(parents=True, exist_ok=True)
        check_owned(path)
        target, ours = path / SETTINGS, plain(asdict(settings))
        if not target.exists():
            with writing(target):
                write_json(target, ours)
        if changed := "; ".join(differences(read_json(target), ours)):
            raise ValueError(f"{path} was begun with other settings: {changed}; use another output folder")

    def finished_shards(self, shards: Iterable[int], *, verify: bool = False) -> set[int]:
        """The shards that exist with the recorded size and, with verify, the recorded checksum. Damaged shards are
        reported and count as unfinished."""
        finished = set()
        for shard in shards:
            name = self.settings.shard_name(shard)
            file = self.path / f"{name}.safetensors"
            if not file.exists():
                continue
            record = read_json(self.path / f"{name}.json") if (self.path / f"{name}.json").exists() else {}
            damage = None
            if file.stat().st_size != record.get("bytes"):
                damage = f"has {file.stat().st_size} bytes; expected {record.get('bytes', 'a record of its size')}"
            elif verify and file_sha256(file) != record["sha256"]:
                damage = "does not have the recorded checksum"
            if damage:
                warn(f"{file} {damage}; making it again")
            else:
                finished.add(shard)
        return finished

    def write_shard(self, shard: int, tensors: dict[str, Tensor], unreadable: list[Unreadable]) -> None:
        """Write a shard; it is finished when this returns. OSError if no space is left, or the file system fails
        otherwise; finished shards are unchanged.

        Args:
            shard: its number.
            tensors: its content, by name.
            unreadable: the images of the shard that could not be read.
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
        """Remove the half-written files of stopped runs, for one shard or all."""
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
            "settings": plain(asdict(self.settings)),
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
    """ValueError if a folder holds anything but a cache."""
    names = sorted(entry.name for entry in path.iterdir())
    foreign = [name for name in names if not re.fullmatch(_OWNED, name)]
    if not foreign and SETTINGS not in names:
        foreign = [name for name in names if not name.startswith(".")]
    if foreign:
        raise ValueError(f"output folder {path} holds {foreign[0]}, which is not part of a cache; name another folder")


def storage_dtype(name: str) -> torch.dtype:
    """The dtype of stored latents by name; ValueError for others."""
    require_choice("dtype", name, Literal["float16", "bfloat16"])
    return DTYPES[name]
