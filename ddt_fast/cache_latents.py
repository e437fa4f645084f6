"""Encode an image folder into cached latents: `python -m ddt_fast.cache_latents --images DIR --output DIR`.

Under torchrun the processes share the work; without a GPU each encodes on one core. A run that was stopped or killed
continues when it is started again.

With --repa-encoder facebook/dinov2-base the DINOv2 features that REPA aligns with are cached too. They are large: at
256 px, 256 x 768 numbers of 2 bytes or 393 KB per image (its latent takes 16 KB), 0.5 TB for ImageNet; twice that with
--flips.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ddt_fast.autoencoder import Encoder, deterministic_convolutions
from ddt_fast.checks import require_choice, require_path
from ddt_fast.command import CommandParser, run_command
from ddt_fast.data.encode import cache_settings, encode_images
from ddt_fast.data.image_folder import ImageFolder, list_images
from ddt_fast.data.latent_cache import MANIFEST, SETTINGS, check_owned
from ddt_fast.device import DTYPES, choose_device
from ddt_fast.dinov2 import DinoV2
from ddt_fast.files import output_folder, read_json
from ddt_fast.ranks import process_ranks
from ddt_fast.wording import plural, warn


def build_parser() -> CommandParser:
    """The options of the command: the parameters of `encode_image_folder`."""
    parser = CommandParser(prog="python -m ddt_fast.cache_latents", description=__doc__)
    parser.add_options(encode_image_folder)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, encode, report."""
    options = build_parser().parse_args(arguments)
    manifest = encode_image_folder(**vars(options))
    if manifest is None:
        who, file = process_ranks().who, Path(options.output) / MANIFEST
        print(f"{who}finished its shards; the last process to finish writes {file}")
    else:
        _report(manifest, Path(options.output))


def encode_image_folder(
    images: str | Path,
    output: str | Path,
    *,
    image_size: int = 256,
    autoencoder: str | Path = "stabilityai/sd-vae-ft-ema",
    repa_encoder: str | Path | None = None,
    dtype: str = "float16",
    compute_dtype: str = "float32",
    flips: bool = False,
    shard_size: int | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    device: str = "auto",
    verify: bool = False,
) -> dict[str, Any] | None:
    """Encode an image folder into a cache of latents for training, as `python -m ddt_fast.cache_latents`; a call that
    was stopped is continued. Under torchrun the processes share the work.

    Args:
        images: folder with one sub-folder of images per class.
        output: folder of the cache.
        image_size: side of the centre crop in pixels.
        autoencoder: diffusers AutoencoderKL, hub id or local folder.
        repa_encoder: DINOv2, hub id (facebook/dinov2-base) or local folder, to cache its features too; default: none.
            At 256 px, 393 KB per image, 0.5 TB for ImageNet, twice that with `flips`.
        dtype: dtype to store: float16 or bfloat16.
        compute_dtype: dtype of the encoders: float32 or bfloat16.
        flips: also encode the mirrored images.
        shard_size: images per shard, held in memory about three times; default: 8192, or 2048 with `repa_encoder`.
        batch_size: images per call of an encoder.
        num_workers: processes that decode images, 0 for none; default: a share of the CPUs.
        device: auto, cpu, cuda or cuda:N; on a CPU, one thread encodes.
        verify: compare the checksums of finished shards.

    Returns:
        The cache's manifest; None while other processes are still working.

    Raises:
        ValueError: there are no images, an encoder cannot be loaded, or the cache was begun with other settings.
        OSError: a file cannot be read or written; finished shards are kept.
    """
    folder, cache = _open_folders(images, output)
    place = choose_device(device)
    with _deterministic(place):
        encoder, features = _load_encoders(autoencoder, repa_encoder, place, compute_dtype)
        settings = cache_settings(folder, encoder, features, image_size, dtype, flips, shard_size, batch_size)
        return encode_images(folder, cache, encoder, settings, features, num_workers=num_workers, verify=verify)


def _open_folders(images: str | Path, output: str | Path) -> tuple[ImageFolder, Path]:
    """The images, and the folder of their cache, which is created if missing."""
    source = require_path("images", images)
    if require_path("output", output).resolve().is_relative_to(source.resolve()):
        raise ValueError(f"output folder {output} lies inside the image folder; name another")
    cache = output_folder(output)
    check_owned(cache)
    begun = read_json(cache / SETTINGS).get("class_names", []) if (cache / SETTINGS).exists() else []
    folder = list_images(source, begun)
    if folder.ignored and process_ranks().rank == 0:
        warn(f"ignored {plural(len(folder.ignored), 'file')} not named like images, such as {folder.ignored[0]}")
    return folder, cache


def _load_encoders(
    autoencoder: str | Path, repa_encoder: str | Path | None, device: torch.device, compute_dtype: str
) -> tuple[Encoder, DinoV2 | None]:
    require_choice("compute_dtype", compute_dtype, Literal["float32", "bfloat16"])
    require_path("autoencoder", autoencoder)
    if repa_encoder is not None:
        require_path("repa_encoder", repa_encoder)
    encoder = Encoder(str(autoencoder), device, DTYPES[compute_dtype])
    return encoder, None if repa_encoder is None else DinoV2(str(repa_encoder), device, DTYPES[compute_dtype])


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


def _report(manifest: dict[str, Any], output: Path) -> None:
    if unreadable := manifest["unreadable"]:
        print(f"left out because unreadable: {plural(len(unreadable), 'image')}")
        for image in unreadable:
            print(f"  {image['file']}: {image['reason']}")
    latents, shards = plural(manifest["count"], "latent"), plural(len(manifest["shards"]), "shard")
    classes = plural(len(manifest["class_counts"]), "class")
    empty = sum(count == 0 for count in manifest["class_counts"])
    note = f" ({empty} of them without a readable image)" if empty else ""
    print(f"{latents} of {classes}{note} in {shards}: {output}")


if __name__ == "__main__":
    run_command(main)
