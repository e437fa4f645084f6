"""From an image folder to a latent cache: images are decoded in worker processes and encoded shard by shard."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ddt_fast.autoencoder import Encoder
from ddt_fast.checks import require, require_int
from ddt_fast.data.image_file import UnreadableImageError
from ddt_fast.data.image_folder import ImageFolder
from ddt_fast.data.latent_cache import CacheFolder, CacheSettings, Unreadable, names_sha256, storage_dtype
from ddt_fast.device import dtype_name
from ddt_fast.dinov2 import DinoV2
from ddt_fast.ranks import Ranks, process_ranks
from ddt_fast.wording import plural, tell, warn


class _Batch(NamedTuple):
    """Consecutive images of one shard: the readable ones, (n, 3, size, size) uint8, with their places in the sorted
    list, (n,) int64; and the others."""

    places: Tensor
    images: Tensor
    unreadable: list[Unreadable]


class _DecodedImages(Dataset[tuple[int, Tensor | str]]):
    def __init__(self, folder: ImageFolder, size: int) -> None:
        self.folder, self.size = folder, size

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.folder.read(index, self.size)
        except UnreadableImageError as error:
            return index, str(error)

    def collate(self, items: list[tuple[int, Tensor | str]]) -> _Batch:
        read = {index: image for index, image in items if isinstance(image, Tensor)}
        failed = [Unreadable(index, self.folder.files[index], why) for index, why in items if isinstance(why, str)]
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        images = torch.stack(list(read.values())) if read else empty
        return _Batch(torch.tensor(list(read), dtype=torch.int64), images, failed)


def cache_settings(
    folder: ImageFolder,
    encoder: Encoder,
    repa_encoder: DinoV2 | None,
    image_size: int,
    dtype: str,
    flips: bool,
    shard_size: int | None,
    batch_size: int,
) -> CacheSettings:
    """The settings of a cache of these images, made by these encoders; ValueError for values that are not allowed."""
    storage_dtype(dtype)
    factor = encoder.pixels_per_latent
    allowed = f"multiples of {factor}, the autoencoder's factor"
    require(image_size > 0 and image_size % factor == 0, "image_size", image_size, allowed)
    if shard_size is None:
        shard_size = 8192 if repa_encoder is None else 2048
    require_int("shard_size", shard_size, 1)
    require_int("batch_size", batch_size, 1)
    return CacheSettings(
        image_size=image_size,
        autoencoder=encoder.name,
        autoencoder_sha256=encoder.sha256(),
        scaling_factor=encoder.scaling_factor,
        latent_shape=(encoder.latent_channels, image_size // factor, image_size // factor),
        dtype=dtype,
        compute_dtype=dtype_name(encoder.vae.dtype),
        flips=flips,
        shard_size=shard_size,
        batch_size=batch_size,
        num_images=len(folder.files),
        images_sha256=names_sha256(folder.files),
        class_names=folder.class_names,
        repa_encoder=repa_encoder.name if repa_encoder else None,
        repa_encoder_sha256=repa_encoder.sha256() if repa_encoder else None,
        feature_shape=(repa_encoder.grid(image_size) ** 2, repa_encoder.feature_size) if repa_encoder else None,
    )


def encode_images(
    folder: ImageFolder,
    output: Path,
    encoder: Encoder,
    settings: CacheSettings,
    repa_encoder: DinoV2 | None = None,
    *,
    ranks: Ranks | None = None,
    num_workers: int | None = None,
    verify: bool = False,
) -> dict[str, Any] | None:
    """Write the missing shards K with K % world_size == rank; the last process to finish writes the manifest and
    returns it, the others return None. Images that cannot be read are left out; they, and the progress, are reported on
    stderr.

    Args:
        folder: the images.
        output: the cache.
        encoder: the encoder, on the device to use.
        settings: the result of `cache_settings`.
        repa_encoder: the DINOv2 of the settings, to write its features too.
        ranks: this process's rank among those that share the work, which do not communicate; default: torchrun's.
        num_workers: processes that decode images; 0 decodes in this one. Default: this process's share of the CPUs.
        verify: compare the checksums of finished shards, not only their sizes.

    Raises:
        ValueError: the cache was begun with other settings, the folder holds something else, or latents or features
            are not finite.
        OSError: no space is left, or the file system fails otherwise; finished shards are kept.
    """
    ranks = ranks or process_ranks()
    if num_workers is None:
        num_workers = max(1, len(os.sched_getaffinity(0)) // ranks.local_size)
    require_int("num_workers", num_workers, 0)
    cache = CacheFolder(output, settings)
    own = range(ranks.rank, settings.num_shards, ranks.world_size)
    finished = cache.finished_shards(own, verify=verify)
    todo = [shard for shard in own if shard not in finished]
    if finished:
        tell(f"{ranks.who}{len(finished)} of {plural(len(own), 'shard')} are already finished")
    if todo:
        _encode_shards(folder, cache, encoder, repa_encoder, todo, num_workers, ranks.who)
    if len(cache.finished_shards(range(settings.num_shards))) < settings.num_shards:
        return None
    return cache.write_manifest()


def _encode_shards(
    folder: ImageFolder,
    cache: CacheFolder,
    encoder: Encoder,
    repa_encoder: DinoV2 | None,
    todo: list[int],
    num_workers: int,
    who: str,
) -> None:
    settings = cache.settings
    shards, batches = [], []  # the images of each batch, and their shard
    for shard in todo:
        images = settings.shard_range(shard)
        for start in range(0, len(images), settings.batch_size):
            shards.append(shard)
            batches.append(list(images[start : start + settings.batch_size]))
    dataset = _DecodedImages(folder, settings.image_size)
    decoded = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collate,
        num_workers=num_workers,
        pin_memory=encoder.vae.device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
    )
    parts: list[dict[str, Tensor]] = []
    unreadable: list[Unreadable] = []
    labels = torch.tensor(folder.labels, dtype=torch.int64)
    total = sum(map(len, batches))
    with tqdm(total=total, desc=f"{who}encoding", unit="img", dynamic_ncols=True) as progress:
        for shard, following, batch in zip(shards, [*shards[1:], None], decoded, strict=True):
            encoded = _encode(batch.images, encoder, repa_encoder, settings)
            parts.append({**encoded, "labels": labels[batch.places], "index": batch.places})
            for image in batch.unreadable:
                warn(f"{image.file} is left out: {image.reason}")
            unreadable += batch.unreadable
            progress.update(len(batch.places) + len(batch.unreadable))
            if shard != following:
                # Popped, because a shard's features take gigabytes: they should not be in memory twice.
                tensors = {name: torch.cat([part.pop(name) for part in parts]) for name in tuple(parts[0])}
                cache.write_shard(shard, tensors, unreadable)
                parts, unreadable = [], []


def _encode(
    images: Tensor, encoder: Encoder, repa_encoder: DinoV2 | None, settings: CacheSettings
) -> dict[str, Tensor]:
    encoded: dict[str, Tensor] = {}
    for suffix in ("", "_flip") if settings.flips else ("",):
        view = images.flip(-1) if suffix else images
        if len(images):
            mean, logvar = encoder(view)
        else:
            mean = logvar = torch.empty(0, *settings.latent_shape)
        encoded[f"mean{suffix}"] = _stored(mean, "latents", settings)
        encoded[f"logvar{suffix}"] = _stored(logvar, "log-variances", settings)
        if repa_encoder and settings.feature_shape:
            features = repa_encoder(view) if len(images) else torch.empty(0, *settings.feature_shape)
            encoded[f"features{suffix}"] = _stored(features, "features", settings)
    return encoded


def _stored(values: Tensor, what: str, settings: CacheSettings) -> Tensor:
    """Values as a shard holds them; ValueError if they are not finite or too large for its dtype."""
    stored = values.to("cpu", storage_dtype(settings.dtype)).contiguous()
    if not stored.isfinite().all():
        largest = values.abs().max().item()
        if not math.isfinite(largest):
            raise ValueError(f"the {what} are not finite; encode in float32, or check the encoder's weights")
        raise ValueError(f"{what} up to {largest:.3g} do not fit {settings.dtype}; use bfloat16")
    return stored
