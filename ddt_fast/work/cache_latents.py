"""The work of `ddt_fast.cache_latents`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddt_fast.autoencoder import Encoder
from ddt_fast.data.encode import cache_settings, encode_images
from ddt_fast.data.image_folder import ImageFolder, list_images
from ddt_fast.data.latent_cache import SETTINGS, check_owned
from ddt_fast.device import DTYPES, choose_device, deterministic_convolutions
from ddt_fast.dinov2 import DinoV2
from ddt_fast.files import output_folder, read_json
from ddt_fast.ranks import process_ranks
from ddt_fast.wording import plural, warn


def encode(
    images: Path,
    output: str | Path,
    image_size: int,
    autoencoder: str | Path,
    repa_encoder: str | Path | None,
    dtype: str,
    compute_dtype: str,
    flips: bool,
    shard_size: int | None,
    batch_size: int,
    num_workers: int | None,
    device: str,
    verify: bool,
) -> dict[str, Any] | None:
    """Encode images; arguments and errors are those of `ddt_fast.cache_latents.encode_image_folder`."""
    folder, cache = _open_folders(images, output)
    place = choose_device(device)
    with _deterministic(place):
        encoder = Encoder(str(autoencoder), place, DTYPES[compute_dtype])
        features = None if repa_encoder is None else DinoV2(str(repa_encoder), place, DTYPES[compute_dtype])
        settings = cache_settings(folder, encoder, features, image_size, dtype, flips, shard_size, batch_size)
        manifest = encode_images(folder, cache, encoder, settings, features, num_workers=num_workers, verify=verify)
    if manifest is not None and manifest["count"] == 0:
        first = manifest["unreadable"][0]
        unread = plural(len(folder.files), "image")
        raise ValueError(
            f"{images} holds {unread}, none of which can be read; the first, {first['file']}: {first['reason']}"
        )
    return manifest


def _open_folders(images: Path, output: str | Path) -> tuple[ImageFolder, Path]:
    """The images, and the folder of their cache, which is created if missing."""
    cache = output_folder(output)
    check_owned(cache)
    begun = read_json(cache / SETTINGS).get("class_names", []) if (cache / SETTINGS).exists() else []
    folder = list_images(images, begun)
    if folder.passed_over and process_ranks().rank == 0:
        warn(folder.passed_over)
    return folder, cache


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Encode so that a run that is stopped and continued writes the same bits as an uninterrupted one."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # sums depend on the number of threads, which torchrun changes
    try:
        with deterministic_convolutions():
            yield
    finally:
        torch.set_num_threads(threads)
