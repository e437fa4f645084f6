"""Reading latents: memory-mapped shards of ddt-fast's cache, or of LightningDiT's."""

import ctypes
import hashlib
import json
import math
import mmap
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddt_fast.config import ChannelStats, DataConfig
from ddt_fast.data.latent_cache import MANIFEST, SETTINGS, VERSION, CacheSettings, storage_dtype
from ddt_fast.files import read_json
from ddt_fast.weight_files import read_pickle, refusal
from ddt_fast.wording import one_line

_PAGE = mmap.ALLOCATIONGRANULARITY
_LIBC = ctypes.CDLL(None)


class Shard:
    """A safetensors file mapped into memory: parts of its tensors are read from disk when they are used.

    Attributes:
        path: the file.
        tensors: its tensors by name; do not write to them.

    Raises:
        ValueError: the file is not safetensors, or is truncated.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise refusal("shard", path, error, "a whole .safetensors file") from error
        for tensor in self.tensors.values():
            # Rows are visited in random order: reading ahead would fetch what is not needed.
            _advise(mmap.MADV_RANDOM, tensor.data_ptr(), tensor.nbytes)

    def prefetch(self, name: str, row: int) -> None:
        """Ask the operating system to read a row of a tensor, without waiting for it."""
        tensor = self.tensors[name]
        length = tensor.stride(0) * tensor.itemsize
        _advise(mmap.MADV_WILLNEED, tensor.data_ptr() + row * length, length)


def _advise(advice: int, address: int, length: int) -> None:
    """Tell the operating system how mapped memory will be read."""
    before = address % _PAGE
    _LIBC.madvise(ctypes.c_void_p(address - before), ctypes.c_size_t(length + before), advice)


def read_channel_stats(path: Path, channels: int) -> ChannelStats:
    """The numbers of LightningDiT's latents_stats.pt; ValueError if it does not hold them for so many channels."""
    expected = f"mean and std, {channels} numbers each, as in LightningDiT's latents_stats.pt"
    stats = read_pickle("channel statistics", path, expected)
    try:
        mean, std = (tuple(stats[name].float().reshape(channels).tolist()) for name in ("mean", "std"))
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"channel statistics {path} cannot be used: {one_line(error)}; expected {expected}") from error
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"channel statistics {path} cannot be used: numbers that are not finite, or no std above 0")
    return mean, std


class LatentDataset:
    """The cached latents of a folder: a cache of `python -m ddt_fast.cache_latents`, or LightningDiT's shards.

    LightningDiT's shards (`latents`, `latents_flip`, `labels` in each *.safetensors, in the order of their names,
    without a manifest) hold one draw from each posterior, not normalised, and do not record its scale.

    Args:
        folder: the cache.
        scaling_factor: factor on the latents. None takes the cache's own; LightningDiT's shards need it.
        channel_stats: LightningDiT's `latents_stats.pt` ({"mean", "std"}, C values each), or its numbers: latents
            become (latents - mean) / std * scaling_factor. None, for Stable Diffusion's VAE, does not normalise.
        features: also read the DINOv2 features that `ddt_fast.cache_latents --repa-encoder` cached.

    Attributes:
        folder: the cache.
        checksums: SHA-256 of each shard by its file name, from the manifest; only sizes are compared here. Empty for
            LightningDiT's shards.
        labels: (N,) int64.
        shape: (C, h, w).
        scaling_factor: the factor applied.
        channel_stats: the means and standard deviations applied, if any.
        num_classes: classes of the image folder; for LightningDiT's shards, the highest label + 1.
        has_flips: whether there are mirrored images.
        has_posterior: whether latents can be drawn again.
        settings: what the cache was made from and how; None for LightningDiT's shards.
        feature_shape: (N', F) of an image's features; None unless they are read.

    Raises:
        ValueError: the folder is not a cache, is unfinished or lacks the features, or shards are missing, truncated,
            damaged or have other shapes; the message names the file.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        scaling_factor: float | None = None,
        channel_stats: str | Path | ChannelStats | None = None,
        features: bool = False,
    ) -> None:
        if not folder.is_dir():
            raise ValueError(f"latent cache {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
        self.folder = folder
        self.checksums: dict[str, str] = {}
        self.settings: CacheSettings | None = None
        if (folder / MANIFEST).exists():
            if channel_stats is not None:
                raise ValueError(f"{folder} has a manifest, which records the scale; leave channel_stats out")
            self.settings = self._open_cache(folder)
            if scaling_factor not in (None, self.settings.scaling_factor):
                own = self.settings.scaling_factor
                raise ValueError(f"scaling factor is {scaling_factor}; {folder} was made for {own}")
            scaling_factor = self.settings.scaling_factor
        elif (folder / SETTINGS).exists():
            raise ValueError(f"{folder} is an unfinished cache; run ddt_fast.cache_latents again to finish it")
        else:
            self._shards = [Shard(file) for file in sorted(folder.glob("*.safetensors"))]
            if not self._shards:
                raise ValueError(f"{folder} holds no latents: neither {MANIFEST} nor *.safetensors")
            if scaling_factor is None:
                raise ValueError(f"the shards of {folder} do not record their scale; give a scaling factor")
        self.scaling_factor = scaling_factor
        self.feature_shape = self.settings.feature_shape if self.settings and features else None
        if features and self.feature_shape is None:
            how = "python -m ddt_fast.cache_latents --repa-encoder facebook/dinov2-base makes a cache with them"
            raise ValueError(f"{folder} holds no features; {how}, in another folder")
        self._feature_dtype = storage_dtype(self.settings.dtype) if self.settings else None
        self._check_shards()
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
        """Checksum of what the latents were made from and how (or of one latent, if the shards do not record it), of
        labels and scale. A copy of a cache, or the same cache made again, has the same."""
        made: list[Any] = [self.shape, self.has_flips, self._scale.tolist()]
        made.append(None if self._shift is None else self._shift.tolist())
        if self.settings is None:
            latent = self._shards[0].tensors[self._latents][0].float().contiguous()
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
            raise ValueError(f"{path} has version {manifest.get('version')}; this ddt-fast reads version {VERSION}")
        try:
            sizes = {folder / record["file"]: record["bytes"] for record in manifest["shards"]}
            self.checksums = {record["file"]: record["sha256"] for record in manifest["shards"]}
            settings = CacheSettings.from_json(manifest["settings"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error
        self._shards = []
        for file, size in sizes.items():
            if not file.exists():
                raise ValueError(f"{file} is missing, but {path} lists it; run ddt_fast.cache_latents again")
            if file.stat().st_size != size:
                raise ValueError(f"{file} has {file.stat().st_size} bytes; {path} says {size}")
            self._shards.append(Shard(file))
        return settings

    def _check_shards(self) -> None:
        """Find out what the shards hold, and check that all hold it in the same shape and dtype."""
        first = self._shards[0].tensors
        self.has_posterior = "mean" in first
        self._latents = name = "mean" if self.has_posterior else "latents"
        self.has_flips = f"{name}_flip" in first
        self.shape = tuple(first[name].shape[1:]) if name in first else ()
        rows: dict[str, tuple[int, ...]] = {}
        for view in ("", "_flip") if self.has_flips else ("",):
            rows[name + view] = self.shape
            if self.has_posterior:
                rows["logvar" + view] = self.shape
            if self.feature_shape:
                rows["features" + view] = self.feature_shape
        rows["labels"] = ()
        for shard in self._shards:
            count = len(shard.tensors["labels"]) if "labels" in shard.tensors else -1
            for entry, row in rows.items():
                if entry not in shard.tensors:
                    raise ValueError(f"{shard.path} holds no {entry}, only {', '.join(shard.tensors) or 'nothing'}")
                tensor = shard.tensors[entry]
                if tuple(tensor.shape) != (count, *row):
                    shapes = f"{tuple(tensor.shape)}; expected {(count, *row)}"
                    raise ValueError(f"{shard.path} holds {entry} of shape {shapes}")
                right = tensor.is_floating_point() != (entry == "labels")
                if not right or (entry.startswith("features") and tensor.dtype != self._feature_dtype):
                    raise ValueError(f"{shard.path} holds {entry} as {tensor.dtype}")
        if len(self.shape) != 3:
            raise ValueError(f"{self._shards[0].path} holds {name} of shape {self.shape}; expected (C, h, w) for each")

    def described(self, data: DataConfig) -> DataConfig:
        """The settings, completed by what a model of these latents must know of them.

        Raises:
            ValueError: the latents have another size than the settings say.
        """
        _, height, width = self.shape
        if height != width:
            raise ValueError(f"{self.folder} holds latents of {height}x{width}; allowed: squares")
        made = self.settings and self.settings.image_size
        if made not in (None, data.image_size) and (data.autoencoder is not None or data.image_size != height):
            where = f"the size that {self.folder} was made at (`data.image_size` {made})"
            raise ValueError(f"image_size is {data.image_size}; allowed: {made}, {where}")
        if data.image_size % height:
            raise ValueError(
                f"image_size is {data.image_size}; allowed: a multiple of {height}, the side of the latents in "
                f"{self.folder}"
            )
        factor = data.image_size // height
        return replace(
            data,
            pixels_per_latent=factor,
            scaling_factor=self.scaling_factor,
            channel_stats=self.channel_stats,
            class_names=self.settings.class_names if self.settings else data.class_names,
        )

    def _set_scale(self, channel_stats: str | Path | ChannelStats | None) -> None:
        """Set latents = drawn * self._scale + self._shift: one number per channel, or a single scale and no shift."""
        self._scale: Tensor = torch.tensor(float(self.scaling_factor))
        self._shift: Tensor | None = None
        if isinstance(channel_stats, (str, Path)):
            channel_stats = read_channel_stats(Path(channel_stats), self.shape[0])
        self.channel_stats = channel_stats
        if channel_stats is not None:
            mean, std = torch.tensor(channel_stats)[..., None, None]
            self._scale = self._scale / std
            self._shift = -mean * self._scale

    def image_places(self) -> NDArray[np.int64]:
        """(N,) places of the latents' images in the sorted list of the image folder; ValueError if the shards do not
        record them."""
        places = []
        for shard, count in zip(self._shards, np.diff(self._ends, prepend=0).tolist(), strict=True):
            index = shard.tensors.get("index")
            if index is None or index.dtype != torch.int64 or tuple(index.shape) != (count,):
                raise ValueError(f"{shard.path} does not record the images of its latents")
            places.append(index.numpy())
        found = np.concatenate(places)
        limit = self.settings.num_images if self.settings else 0
        if found.min() < 0 or found.max() >= limit:
            raise ValueError(f"{self.folder} holds latents of images outside the {limit} of the cache")
        return found

    def _places(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> list[tuple[Shard, int, str]]:
        """The shard and row of each latent, and what its tensors' names end in."""
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        rows = (indices - starts[shards]).tolist()
        return [
            (self._shards[shard], row, "_flip" if flip else "")
            for shard, row, flip in zip(shards.tolist(), rows, flips.tolist(), strict=True)
        ]

    def features(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> Tensor:
        """The cached features of the same images, (n, N', F) float16 or bfloat16 as stored; ValueError if the dataset
        was opened without features."""
        if self.feature_shape is None:
            raise ValueError("the dataset was opened without features")
        places = self._places(indices, flips)
        features = torch.empty(len(places), *self.feature_shape, dtype=self._feature_dtype)
        for shard, row, view in places:
            shard.prefetch("features" + view, row)
        # Copied by NumPy, as integers because it has no bfloat16: torch would start threads for rows of this size.
        for target, (shard, row, view) in zip(features.view(torch.int16).numpy(), places, strict=True):
            target[:] = shard.tensors["features" + view][row].view(torch.int16).numpy()
        return features

    def draw(self, indices: NDArray[np.int64], flips: NDArray[np.bool_], seeds: NDArray[np.uint64]) -> Tensor:
        """Draw latents (n, C, h, w) float32 from their posteriors, scaled for the model:
        (mean + exp(logvar / 2) * noise) * scaling_factor.

        Args:
            indices: (n,) which latents.
            flips: (n,) whether to take the mirrored image; needs has_flips.
            seeds: (n,) seeds of the noise, which depends on nothing else; torch uses their lower 32 bits.
        """
        places = self._places(indices, flips)
        for shard, row, view in places:  # all at once: a disk serves many requests as fast as one
            shard.prefetch(self._latents + view, row)
            if self.has_posterior:
                shard.prefetch("logvar" + view, row)
        latents = torch.empty(len(places), *self.shape)
        # A few rows at a time: their inputs stay in the CPU's cache, and torch starts no threads, which would wait for
        # those of other batches.
        step = max(1, 32767 // math.prod(self.shape))
        mean, deviation = torch.empty(2, step, *self.shape)
        means, deviations = mean.unbind(), deviation.unbind()
        generator = torch.Generator()
        numbers = seeds.tolist()
        for start in range(0, len(places), step):
            part = latents[start : start + step]
            noises, size = part.unbind(), len(part)
            for i, (shard, row, view) in enumerate(places[start : start + size]):
                means[i].copy_(shard.tensors[self._latents + view].select(0, row))
                if self.has_posterior:
                    deviations[i].copy_(shard.tensors["logvar" + view].select(0, row))
                    noises[i].normal_(generator=generator.manual_seed(numbers[start + i]))
            if self.has_posterior:
                # exp(logvar / 2) as a power of 2: exp uses MKL, which starts threads even for so little.
                deviation[:size].clamp_(-30, 20).mul_(0.5 / math.log(2)).exp2_()
                torch.addcmul(mean[:size], deviation[:size], part, out=part)
            else:
                part.copy_(mean[:size])
            part.mul_(self._scale)
            if self._shift is not None:
                part.add_(self._shift)
        return latents
