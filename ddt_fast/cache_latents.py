"""Encode an image folder into cached latents: `python -m ddt_fast.cache_latents --images DIR --output DIR`.

Under torchrun the processes share the work; without a GPU each encodes on one core. A run that was stopped or killed
continues when it is started again.

With --repa-encoder facebook/dinov2-base the DINOv2 features that REPA aligns with are cached too. They are large: at
256 px, 256 x 768 numbers of 2 bytes or 393 KB per image (its latent takes 16 KB), 0.5 TB for ImageNet; twice that with
--flips.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ddt_fast.checks import require_choice, require_path
from ddt_fast.command import CommandParser, run_command
from ddt_fast.ranks import process_ranks
from ddt_fast.wording import plural


def build_parser() -> CommandParser:
    """The options of the command: the parameters of `encode_image_folder`."""
    parser = CommandParser(prog="python -m ddt_fast.cache_latents", description=__doc__)
    parser.add_options(encode_image_folder)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, encode, report."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    with parser.naming_options():
        manifest = encode_image_folder(**vars(options))
    if manifest is None:
        file = Path(options.output) / "manifest.json"
        print(f"{process_ranks().who}finished its shards; the last process to finish writes {file}")
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
        images: folder with one sub-folder of images per class, or with images of one class; .npy arrays and WebDataset
            tars are read too, there or in its place.
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
        ValueError: there are no images, or none that can be read, an encoder cannot be loaded, or the cache was begun
            with other settings.
        OSError: a file cannot be read or written; finished shards are kept.
    """
    source = require_path("images", images)
    if require_path("output", output).resolve().is_relative_to(source.resolve()):
        raise ValueError(f"output folder {output} lies inside the image folder; name another")
    require_choice("compute_dtype", compute_dtype, Literal["float32", "bfloat16"])
    require_path("autoencoder", autoencoder)
    if repa_encoder is not None:
        require_path("repa_encoder", repa_encoder)
    from ddt_fast.work.cache_latents import encode

    stored = dtype, compute_dtype, flips, shard_size
    return encode(
        source, output, image_size, autoencoder, repa_encoder, *stored, batch_size, num_workers, device, verify
    )


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
