"""Reading latents: memory-mapped shards of ddt-fast's cache, or of LightningDiT's."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.data.latent_cache import MANIFEST, SETTINGS, VERSION, CacheSettings, storage_dtype
from ddt_fast.files import read_json

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "I32": torch.int32}
_PAGE = mmap.ALLOCATIONGRANULARITY


class Shard:
    """A safetensors file, mapped into memory: its tensors read from disk what is looked at, when it is.

    Attributes:
        path: the file.
        tensors: by name; they are not to be written to.

    Raises:
        ValueError: no safetensors file, or one that is truncated or of unknown types.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            size = path.stat().st_size
            start, header = _read_header(path, stream.read(8), size)
            try:
                entries = json.loads(stream.read(header))
                entries.pop("__metadata__", None)
                described = {
                    name: (_DTYPES[entry["dtype"]], entry["shape"], *entry["data_offsets"])
                    for name, entry in entries.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is damaged or holds unknown types: {error!r}") from error
            needed = start + max((end for *_, end in described.values()), default=0)
            if size != needed:
                state = "truncated" if size < needed else "damaged"
                raise ValueError(f"{path} is {state}: it is {size} bytes, its header says {needed}")
            # Private rather than read-only, since torch warns of read-only memory; nothing is written.
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)  # rows are visited at random: reading on would fetch what is not wanted
        self.tensors: dict[str, Tensor] = {}
        self._rows: dict[str, tuple[int, int]] = {}  # where the rows of a tensor start, and the bytes of one
        for name, (dtype, shape, begin, end) in described.items():
            if math.prod(shape) * dtype.itemsize != end - begin:
                raise ValueError(f"{path} is damaged: {name} of shape {shape} is {end - begin} bytes")
            flat = torch.empty(0, dtype=dtype)
            if end > begin:
                flat = torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=start + begin)
            self.tensors[name] = flat.view(shape)
            self._rows[name] = (start + begin, (end - begin) // max(1, shape[0] if shape else 1))

    def prefetch(self, name: str, row: int) -> None:
        """Have the operating system read a row of a tensor now, without waiting for it."""
        first, length = self._rows[name]
        begin = first + row * length
        aligned = begin - begin % _PAGE
        self._map.madvise(mmap.MADV_WILLNEED, aligned, begin + length - aligned)


def _read_header(path: Path, prefix: bytes, size: int) -> tuple[int, int]:
    """Where the tensors start, and how long the header is."""
    header = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= header <= size - 8:
        raise ValueError(f"{path} is truncated or no safetensors file: it is {size} bytes")
    return 8 + header, header


@dataclass(frozen=True)
class _Names:
    """Tensor names of one view of the images: the posterior's mean and logvar, or drawn latents and None; and of its
    features, where they are wanted."""

    mean: str
    logvar: str | None
    features: str | None


class LatentDataset:
    """Cached latents of a folder: a cache of `python -m ddt_fast.cache_latents`, or LightningDiT's shards.

    The latter (`latents`, `latents_flip`, `labels` in each *.safetensors, files in order of their names, no manifest)
    hold one draw from each posterior, before any normalisation, and do not say how to scale it.

    Args:
        folder: the cache.
        shape: the (C, h, w) that latents must have; None takes what is there.
        scaling_factor: what latents are multiplied with. None is the cache's own; LightningDiT's shards need it.
        channel_stats: for LightningDiT's shards, its `latents_stats.pt` ({"mean", "std"}, C values each): latents
            become (latents - mean) / std * scaling_factor. None leaves this out, right for Stable Diffusion's VAE.
        features: also read the DINOv2 features that `ddt_fast.cache_latents --repa-encoder` put there.

    Attributes:
        folder: as given.
        checksums: sha256 of each shard by its file name, as the manifest says; not compared here, as sizes are. Empty
            for LightningDiT's shards.
        labels: (N,) int64.
        shape: (C, h, w).
        scaling_factor: as applied.
        num_classes: classes of the image folder; of LightningDiT's shards, the highest label + 1.
        has_flips: whether mirrored images are there.
        has_posterior: whether latents can be drawn afresh.
        settings: what the cache was made from and how; None for LightningDiT's shards.
        feature_shape: (N', F) of an image's features; None unless they are read.

    Raises:
        ValueError: no cache, an unfinished one, one without the features that are asked for, shards that are missing,
            truncated, damaged or of another size of latents or features; the message names the file.
        OSError: files that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shape: Sequence[int] | None = None,
        scaling_factor: float | None = None,
        channel_stats: Path | None = None,
        features: bool = False,
    ) -> None:
        if not folder.is_dir():
            raise ValueError(f"latent cache {folder} {'is no folder' if folder.exists() else 'does not exist'}")
        self.folder = folder
        self.checksums: dict[str, str] = {}
        self.settings: CacheSettings | None = None
        if (folder / MANIFEST).exists():
            if channel_stats is not None:
                raise ValueError(f"{folder} has a manifest, which scales its latents; leave channel_stats out")
            self.settings = self._open_cache(folder)
            if scaling_factor not in (None, self.settings.scaling_factor):
                own = self.settings.scaling_factor
                raise ValueError(f"scaling factor is {scaling_factor}; {folder} was made for {own}")
            scaling_factor = self.settings.scaling_factor
        elif (folder / SETTINGS).exists():
            raise ValueError(f"{folder} is an unfinished cache; run ddt_fast.cache_latents again to finish it")
        else:
            self._open_shards(folder)
            if scaling_factor is None:
                raise ValueError(f"the shards of {folder} do not say how they are scaled; give a scaling factor")
        self.scaling_factor = scaling_factor
        self.feature_shape = self.settings.feature_shape if self.settings and features else None
        if features and self.feature_shape is None:
            how = "python -m ddt_fast.cache_latents --repa-encoder facebook/dinov2-base makes a cache with them"
            raise ValueError(f"{folder} holds no features; {how}, in another folder")
        self._feature_dtype = storage_dtype(self.settings.dtype) if self.settings else None
        self._check_shards(shape)
        self._set_scale(channel_stats)
        counts = [len(shard.tensors["labels"]) for shard in self._shards]
        self._ends: NDArray[np.int64] = np.cumsum(counts, dtype=np.int64)
        self.labels = torch.cat([shard.tensors["labels"].long() for shard in self._shards])
        if len(self.labels) == 0:
            raise ValueError(f"latent cache {folder} holds no latents")
        self.num_classes = len(self.settings.class_names) if self.settings else int(self.labels.max()) + 1
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes:
            raise ValueError(f"{folder} holds labels outside 0 to {self.num_classes - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Checksum that tells these latents from others: of what they were made from and how, or of one of them where
        the shards do not say; of labels and scale. The same cache in another folder, or made again, has the same."""
        made: list[Any] = [self.shape, self.has_flips, self._scale.tolist()]
        made.append(None if self._shift is None else self._shift.tolist())
        if self.settings is None:
            latent = self._shards[0].tensors[self._views[0].mean][0].float().contiguous()
            made.append(hashlib.sha256(latent.numpy().tobytes()).hexdigest())
        else:
            made += [self.settings.images_sha256, self.settings.autoencoder_sha256, self.settings.dtype]
        digest = hashlib.sha256(json.dumps(made).encode())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def _open_cache(self, folder: Path) -> CacheSettings:
        path = folder / MANIFEST
        manifest = read_json(path)
        if manifest.get("version") != VERSION:
            raise ValueError(f"{path} is of version {manifest.get('version')}; this ddt-fast reads {VERSION}")
        try:
            sizes = {folder / record["file"]: record["bytes"] for record in manifest["shards"]}
            self.checksums = {record["file"]: record["sha256"] for record in manifest["shards"]}
            settings = CacheSettings.from_json(manifest["settings"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error
        self._shards = []
        for file, size in sizes.items():
            if not file.exists():
                raise ValueError(f"{file} is missing, {path} lists it; run ddt_fast.cache_latents again to make it")
            if file.stat().st_size != size:
                raise ValueError(f"{file} is {file.stat().st_size} bytes; {path} says {size}")
            self._shards.append(Shard(file))
        return settings

    def _open_shards(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no latents: neither {MANIFEST} nor *.safetensors")
        self._shards = [Shard(file) for file in files]

    def _check_shards(self, shape: Sequence[int] | None) -> None:
        first = self._shards[0].tensors
        self.has_posterior = "mean" in first
        pair = ("mean", "mean_flip") if self.has_posterior else ("latents", "latents_flip")
        self.has_flips = pair[1] in first
        names = pair if self.has_flips else pair[:1]
        self._views = [
            _Names(
                name,
                name.replace("mean", "logvar") if self.has_posterior else None,
                name.replace("mean", "features") if self.feature_shape else None,
            )
            for name in names
        ]
        self.shape = tuple(first[pair[0]].shape[1:]) if pair[0] in first else ()
        latent = self.shape if shape is None else tuple(shape)
        rows: dict[str, tuple[int, ...]] = {}
        for view in self._views:
            rows |= {name: latent for name in (view.mean, view.logvar) if name}
            if view.features and self.feature_shape:
                rows[view.features] = self.feature_shape
        rows["labels"] = ()
        for shard in self._shards:
            for name, row in rows.items():
                if name not in shard.tensors:
                    raise ValueError(f"{shard.path} holds no {name}, only {', '.join(shard.tensors) or 'nothing'}")
                tensor, count = shard.tensors[name], len(shard.tensors["labels"]) if "labels" in shard.tensors else -1
                if tuple(tensor.shape) != (count, *row):
                    shapes = f"{tuple(tensor.shape)}; wanted {(count, *row)}"
                    raise ValueError(f"{shard.path} holds {name} of shape {shapes}")
                known = tensor.is_floating_point() != (name == "labels")
                if not known or (name.startswith("features") and tensor.dtype != self._feature_dtype):
                    raise ValueError(f"{shard.path} holds {name} as {tensor.dtype}")

    def _set_scale(self, channel_stats: Path | None) -> None:
        """latents = drawn * self._scale + self._shift, per channel, or by one number where shift is None."""
        self._scale: Tensor = torch.tensor(float(self.scaling_factor))
        self._shift: Tensor | None = None
        if channel_stats is None:
            return
        try:
            stats = torch.load(channel_stats, map_location="cpu", weights_only=True)
            mean, std = (stats[name].float().reshape(self.shape[0], 1, 1) for name in ("mean", "std"))
        except Exception as error:  # the unpickler may raise anything on damaged bytes
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"channel statistics {channel_stats} cannot be used: {reason}") from error
        self._scale = self._scale / std
        self._shift = -mean * self._scale

    def image_places(self) -> NDArray[np.int64]:
        """(N,) places of the latents' images in the sorted list of the image folder; ValueError where the shards do not
        say them."""
        places = []
        for shard, count in zip(self._shards, np.diff(self._ends, prepend=0).tolist(), strict=True):
            index = shard.tensors.get("index")
            if index is None or index.dtype != torch.int64 or tuple(index.shape) != (count,):
                raise ValueError(f"{shard.path} does not say which images its latents are of")
            places.append(index.numpy())
        found = np.concatenate(places)
        limit = self.settings.num_images if self.settings else 0
        if found.min() < 0 or found.max() >= limit:
            raise ValueError(f"{self._shards[0].path.parent} holds latents of images outside the {limit} on record")
        return found

    def _places(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> list[tuple[Shard, int, _Names]]:
        """Shard, row and tensor names of each."""
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        rows = (indices - starts[shards]).tolist()
        return [
            (self._shards[shard], row, self._views[flip])
            for shard, row, flip in zip(shards.tolist(), rows, flips.astype(int).tolist(), strict=True)
        ]

    def features(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> Tensor:
        """Cached features of the same images as `draw` takes latents of: (n, N', F) as stored, float16 or bfloat16.

        Raises:
            ValueError: the dataset was opened without features.
        """
        if self.feature_shape is None:
            raise ValueError("the dataset was opened without features")
        places = self._places(indices, flips)
        features = torch.empty(len(places), *self.feature_shape, dtype=self._feature_dtype)
        if hasattr(mmap, "MADV_WILLNEED"):
            for shard, row, view in places:
                shard.prefetch(str(view.features), row)
        # Copied by numpy, as integers since it has no bfloat16: torch would start threads for rows of this size.
        for target, (shard, row, view) in zip(features.view(torch.int16).numpy(), places, strict=True):
            target[:] = shard.tensors[str(view.features)][row].view(torch.int16).numpy()
        return features

    def draw(self, indices: NDArray[np.int64], flips: NDArray[np.bool_], seeds: NDArray[np.uint64]) -> Tensor:
        """Latents as a model sees them, drawn from their posteriors: (mean + exp(logvar / 2) * noise) * scaling_factor.

        Args:
            indices: (n,) which.
            flips: (n,) whether the mirrored image is wanted; has_flips must be true where it is.
            seeds: (n,) of each latent's noise, which depends on nothing else. torch uses the lower 32 bits.

        Returns:
            (n, C, h, w) float32.
        """
        places = self._places(indices, flips)
        if hasattr(mmap, "MADV_WILLNEED"):  # all at once: a disk answers many requests as fast as one
            for shard, row, view in places:
                shard.prefetch(view.mean, row)
                if view.logvar is not None:
                    shard.prefetch(view.logvar, row)
        latents = torch.empty(len(places), *self.shape)
        # Few rows at a time: what they are computed from stays in the cache, and torch starts no threads for so little,
        # which would wait for those of other batches.
        step = max(1, 32767 // math.prod(self.shape))
        mean, deviation = torch.empty(2, step, *self.shape)
        means, deviations = mean.unbind(), deviation.unbind()
        generator = torch.Generator()
        numbers = seeds.tolist()
        for start in range(0, len(places), step):
            part = latents[start : start + step]
            noises, size = part.unbind(), len(part)
            for i, (shard, row, view) in enumerate(places[start : start + size]):
                means[i].copy_(shard.tensors[view.mean].select(0, row))
                if view.logvar is not None:
                    deviations[i].copy_(shard.tensors[view.logvar].select(0, row))
                    noises[i].normal_(generator=generator.manual_seed(numbers[start + i]))
            if self.has_posterior:
                # exp(logvar / 2) as a power of 2: exp goes to MKL, which starts threads even for this little.
                deviation[:size].clamp_(-30, 20).mul_(0.5 / math.log(2)).exp2_()
                torch.addcmul(mean[:size], deviation[:size], part, out=part)
            else:
                part.copy_(mean[:size])
            part.mul_(self._scale)
            if self._shift is not None:
                part.add_(self._shift)
        return latents
