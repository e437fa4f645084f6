"""From an image folder to a latent cache: decoding in worker processes, encoding, shard after shard."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ddt_fast.autoencoder import Encoder
from ddt_fast.data.image_folder import ImageFolder, UnreadableImageError, read_image
from ddt_fast.data.latent_cache import CacheFolder, CacheSettings, Unreadable, names_sha256, storage_dtype
from ddt_fast.training.repa import DinoV2
from ddt_fast.wording import plural


@dataclass(frozen=True)
class DecodedBatch:
    """Some consecutive images of one shard: those that could be read, and the others.

    Attributes:
        index: (n,) int64 places in the sorted image list.
        images: (n, 3, size, size) uint8.
        unreadable: the images that are not among them.
    """

    index: Tensor
    images: Tensor
    unreadable: list[Unreadable]

    def pin_memory(self) -> DecodedBatch:
        """The same with images in page-locked memory; DataLoader calls it."""
        return DecodedBatch(self.index, self.images.pin_memory(), self.unreadable)


class _DecodedImages(Dataset[tuple[int, Tensor | str]]):
    def __init__(self, folder: ImageFolder, size: int) -> None:
        self.folder, self.size = folder, size

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, read_image(self.folder.root / self.folder.files[index], self.size)
        except UnreadableImageError as error:
            return index, str(error)

    def collate(self, items: list[tuple[int, Tensor | str]]) -> DecodedBatch:
        read = [(index, image) for index, image in items if isinstance(image, Tensor)]
        failed = [
            Unreadable(index, self.folder.files[index], reason) for index, reason in items if isinstance(reason, str)
        ]
        images = [image for _, image in read]
        return DecodedBatch(
            torch.tensor([index for index, _ in read], dtype=torch.int64),
            torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8),
            failed,
        )


def cache_settings(
    folder: ImageFolder,
    encoder: Encoder,
    autoencoder: str,
    *,
    image_size: int,
    dtype: str,
    flips: bool,
    shard_size: int,
    batch_size: int,
    repa_encoder: DinoV2 | None = None,
) -> CacheSettings:
    """The settings of a cache of these images by these encoders; ValueError for values that are not allowed."""
    storage_dtype(dtype)
    factor = encoder.pixels_per_latent
    if image_size < 1 or image_size % factor:
        raise ValueError(f"image size is {image_size}; allowed: multiples of {factor}, the autoencoder's factor")
    for name, value in (("shard size", shard_size), ("batch size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more")
    return CacheSettings(
        image_size=image_size,
        autoencoder=autoencoder,
        autoencoder_sha256=encoder.sha256(),
        scaling_factor=encoder.scaling_factor,
        latent_shape=(encoder.latent_channels, image_size // factor, image_size // factor),
        dtype=dtype,
        compute_dtype=str(encoder.vae.dtype).removeprefix("torch."),
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
    *,
    repa_encoder: DinoV2 | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 2,
    verify: bool = False,
) -> dict[str, Any] | None:
    """Write the shards K with K % world_size == rank that are not there yet; the last process to finish writes the
    manifest.

    Images that cannot be read are reported to stderr as they come and are left out; so is progress.

    Args:
        folder: the images.
        output: the cache.
        encoder: on the device to use.
        settings: of `cache_settings`.
        repa_encoder: whose features to write as well; the one that the settings are of.
        rank, world_size: this process among those that share the work; they need not know of each other.
        num_workers: processes that decode images; 0 decodes in this one.
        verify: read finished shards and compare their checksums, rather than their sizes alone.

    Returns:
        The manifest, or None while other processes are still at work.

    Raises:
        ValueError: settings that differ from those the cache was begun with, a folder that holds something else,
            latents or features that are not finite.
        OSError: no space left, or another failure of the file system; finished shards are kept.
    """
    cache = CacheFolder(output, settings)
    own = range(rank, settings.num_shards, world_size)
    finished = cache.finished_shards(own, verify=verify)
    todo = [shard for shard in own if shard not in finished]
    who = f"rank {rank} of {world_size}: " if world_size > 1 else ""
    if finished:
        tqdm.write(f"{who}{len(finished)} of {plural(len(own), 'shard')} finished already", file=sys.stderr)
    if todo:
        _encode_shards(folder, cache, encoder, repa_encoder, todo, num_workers, who)
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
    batches = [(shard, batch) for shard in todo for batch in _split(settings.shard_range(shard), settings.batch_size)]
    dataset = _DecodedImages(folder, settings.image_size)
    decoded = DataLoader(
        dataset,
        batch_sampler=[batch for _, batch in batches],
        collate_fn=dataset.collate,
        num_workers=num_workers,
        pin_memory=encoder.vae.device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
    )
    parts: list[dict[str, Tensor]] = []
    unreadable: list[Unreadable] = []
    labels = torch.tensor(folder.labels, dtype=torch.int64)
    total = sum(len(batch) for _, batch in batches)
    with tqdm(total=total, desc=f"{who}encoding", unit="img", dynamic_ncols=True) as progress:
        for position, ((shard, images), batch) in enumerate(zip(batches, decoded, strict=True)):
            encoded = _encode(batch.images, encoder, repa_encoder, settings)
            parts.append({**encoded, "labels": labels[batch.index], "index": batch.index})
            for image in batch.unreadable:
                tqdm.write(f"warning: {image.file} is left out: {image.reason}", file=sys.stderr)
            unreadable += batch.unreadable
            progress.update(len(images))
            if position + 1 == len(batches) or batches[position + 1][0] != shard:
                # Popped: a shard's features are gigabytes, which need not be there twice.
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
    """Values as a shard holds them; ValueError when they are not finite, or too large for that."""
    stored = values.to("cpu", storage_dtype(settings.dtype)).contiguous()
    if not stored.isfinite().all():
        largest = values.abs().max().item()
        if not math.isfinite(largest):
            raise ValueError(f"the {what} are not finite; encode in float32, or check the encoder's weights")
        raise ValueError(f"{what} up to {largest:.3g} do not fit {settings.dtype}; take bfloat16")
    return stored


def _split(indices: range, size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])
