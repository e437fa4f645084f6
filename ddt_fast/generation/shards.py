"""Samples on their way to samples.npz: shards that are whole or not there.

A job's shards are in OUTPUT/shards-FINGERPRINT, where the fingerprint is that of its settings:
    job.json                        the settings and the shard size; written first
    shard-K-of-M.safetensors        images (n, H, W, 3) uint8, or latents (n, C, h, w) float32 under that name too,
                                    from position K * shard_size on; their SHA-256, and what
                                    they were made with, are in its metadata

A shard is written under another name and renamed when it is finished. Its number decides which process makes it
(K % world_size), so that processes need not communicate.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ddt_fast.data.image_file import Images
from ddt_fast.files import atomic_file, read_json, write_json, writing
from ddt_fast.wording import differences, plural

_JOB = "job.json"
_SHARD = r"shard-\d+-of-\d+\.safetensors"
_OWNED = rf"{_JOB}|merge\.lock|{_SHARD}|\.job\.\d+\.json|\.shard-\d+-of-\d+\.\d+\.safetensors"


class DamagedShardError(OSError):
    """A shard that does not hold what was written; the message begins with its path."""


def fingerprint(settings: dict[str, Any]) -> str:
    """A short name for settings (plain JSON values): equal settings have the same."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class ShardFolder:
    """The shards of one job. ValueError if shards of another size exist.

    Args:
        output_dir: the job's folder.
        settings: everything its images depend on, as plain JSON values.
        num_images: images of the job.
        shard_size: images per shard; None takes the size of shards that exist, else `default`.
    """

    def __init__(
        self, output_dir: Path, settings: dict[str, Any], num_images: int, shard_size: int | None, default: int
    ) -> None:
        self.settings, self.num_images = settings, num_images
        self.path = output_dir / f"shards-{fingerprint(settings)}"
        recorded = read_json(self.path / _JOB).get("shard_size") if (self.path / _JOB).exists() else None
        if recorded is not None and shard_size not in (None, recorded):
            raise ValueError(
                f"{self.path} was started with {recorded} images per shard, now {shard_size}; leave `shard_size` out"
            )
        self.shard_size: int = recorded or shard_size or default
        self._width = max(5, len(str(self.num_shards)))

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def positions(self, shard: int) -> range:
        """The positions of a shard's samples in the file of samples."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def file(self, shard: int) -> Path:
        """The file of a shard, which may not exist yet."""
        return self.path / f"shard-{shard:0{self._width}d}-of-{self.num_shards:0{self._width}d}.safetensors"

    def begin(self) -> None:
        """Write job.json."""
        with writing(self.path / _JOB):
            content = {"settings": self.settings, "num_images": self.num_images, "shard_size": self.shard_size}
            write_json(self.path / _JOB, content)

    def missing(self) -> list[int]:
        """The missing shards, of all processes."""
        return [shard for shard in range(self.num_shards) if not self.file(shard).exists()]

    def write(self, shard: int, images: Images, made_with: dict[str, Any]) -> None:
        """Write a shard; it is finished when this returns. OSError if no space is left, or the file system fails
        otherwise; finished shards are unchanged. Images are (n, H, W, 3) uint8, or latents (n, C, h, w) float32;
        `made_with` are plain JSON values that `read` returns."""
        target = self.file(shard)
        for stale in self.path.glob(f".{target.stem}.*"):
            stale.unlink(missing_ok=True)
        metadata = {"sha256": hashlib.sha256(images.data).hexdigest(), "made_with": json.dumps(made_with)}
        content = save({"images": images}, metadata)
        with writing(target), atomic_file(target) as temporary:
            temporary.write_bytes(content)

    def read(self, shard: int) -> tuple[Images, dict[str, Any]]:
        """Images or latents of a finished shard, as `write` takes them, and what it was made with; DamagedShardError if
        it does not hold what was written."""
        file, count = self.file(shard), len(self.positions(shard))
        try:
            with safe_open(file, framework="np") as opened:
                metadata, images = opened.metadata() or {}, opened.get_tensor("images")
        except SafetensorError as error:
            raise DamagedShardError(f"{file} is damaged: {error}") from error
        if hashlib.sha256(images.data).hexdigest() != metadata.get("sha256"):
            raise DamagedShardError(f"{file} is damaged: its images do not have the recorded checksum")
        if images.dtype not in (np.uint8, np.float32) or images.ndim != 4 or len(images) != count:
            raise DamagedShardError(f"{file} holds {images.shape} {images.dtype}; expected {count} uint8 images")
        return images, json.loads(metadata["made_with"])

    def discard(self, shard: int) -> None:
        """Remove a shard, if it is there."""
        self.file(shard).unlink(missing_ok=True)


def job_folders(output_dir: Path) -> list[Path]:
    """The folders of shards, of any job."""
    paths = sorted(output_dir.glob("shards-*"))
    return [path for path in paths if re.fullmatch("shards-[0-9a-f]{12}", path.name) and path.is_dir()]


def other_jobs(output_dir: Path, shards: ShardFolder) -> list[Path]:
    """The folders with finished shards of jobs with other settings; folders without any are removed."""
    found = []
    for path in job_folders(output_dir):
        if path == shards.path:
            continue
        if _count_shards(path):
            found.append(path)
        else:
            remove_job(path)
    return found


def describe_other(path: Path, settings: dict[str, Any]) -> str:
    """How many shards another job's folder holds, and how its settings differ from these."""
    theirs = read_json(path / _JOB).get("settings", {}) if (path / _JOB).exists() else {}
    changed = "; ".join(differences(theirs, settings)) if theirs else f"its {_JOB} is missing"
    return f"{path} holds {plural(_count_shards(path), 'finished shard')} of a job with other settings ({changed})"


def _count_shards(path: Path) -> int:
    try:
        return sum(re.fullmatch(_SHARD, entry.name) is not None for entry in path.iterdir())
    except FileNotFoundError:  # another process has removed it
        return 0


def remove_job(path: Path) -> None:
    """Remove a folder of shards; what ddt-fast did not write stays."""
    try:
        for entry in path.iterdir():
            if re.fullmatch(_OWNED, entry.name):
                entry.unlink(missing_ok=True)
        path.rmdir()
    except OSError:
        return  # something of the user's is in it, or another process is removing it
