"""The generation job: seeds and labels in, PNGs, a grid and samples.npz out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddt_fast.files import atomic_file, atomic_folder, check_replaceable
from ddt_fast.generation.images import labelled_grid, to_uint8
from ddt_fast.sampling.engine import Progress, Sampler
from ddt_fast.sampling.noise import seeded_noise

IMAGE_NAMES = r"\d+_class_\d+_seed_\d+\.png"


@dataclass(frozen=True)
class Job:
    """What to generate.

    Attributes:
        labels: (N,) int64 classes.
        seeds: N seeds; sample i is the image of seeds[i] and labels[i].
    """

    labels: Tensor
    seeds: Sequence[int]


def generate(
    sampler: Sampler, job: Job, decode: Callable[[Tensor], Tensor] | None = None, progress: Progress | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Yield the job's images batch by batch, (up to sampler.batch_size, H, W, 3) uint8, in order.

    Args:
        sampler: what draws them, and how.
        job: what to generate.
        decode: latents → pixels in [-1, 1]; None for a pixel-space model.
        progress: called after every solver step.

    Raises:
        ValueError: samples that are not finite.
    """
    shape = (sampler.model.config.in_channels, *sampler.image_size)
    for start in range(0, len(job.seeds), sampler.batch_size):
        part = slice(start, start + sampler.batch_size)
        noise, generators = seeded_noise(job.seeds[part], shape)
        samples = sampler(noise, job.labels[part], generators=generators, progress=progress)
        images = samples if decode is None else decode(samples)
        broken = [seed for seed, image in zip(job.seeds[part], images, strict=True) if not image.isfinite().all()]
        if broken:
            raise ValueError(f"the sample of seed {broken[0]} is not finite; check the weights and the settings")
        yield to_uint8(images)


def save_images(images: NDArray[np.uint8], job: Job, output_dir: Path) -> None:
    """Write images (N, H, W, 3) as images/INDEX_class_C_seed_S.png, grid.png (the first 100) and samples.npz (arr_0,
    labels, seeds).

    All are written before any takes its place; those of an earlier job in the same folder are replaced.
    """
    labels = job.labels.tolist()
    with (
        atomic_folder(output_dir / "images", IMAGE_NAMES) as folder,
        atomic_file(output_dir / "grid.png") as grid,
        atomic_file(output_dir / "samples.npz") as archive,
    ):
        for i, (image, label, seed) in enumerate(zip(images, labels, job.seeds, strict=True)):
            Image.fromarray(image).save(folder / f"{i:05d}_class_{label}_seed_{seed}.png")
        labelled_grid(images[:100], [str(label) for label in labels[:100]]).save(grid)
        with archive.open("wb") as stream:
            np.savez(stream, arr_0=images, labels=np.asarray(labels), seeds=np.asarray(job.seeds, dtype=np.int64))


def check_output(output_dir: Path) -> None:
    """ValueError now, before any work, when `save_images` would have to replace something that is not its own."""
    check_replaceable(output_dir / "images", IMAGE_NAMES)
    for name in ("grid.png", "samples.npz"):
        if (output_dir / name).is_dir():
            raise ValueError(f"{output_dir / name} is a folder; a file of that name is to be written")
