"""The generation job: seeds and labels in, PNGs, a grid and samples.npz out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddt_fast.config import SamplingConfig
from ddt_fast.files import atomic_file, atomic_folder
from ddt_fast.generation.images import labelled_grid, to_uint8
from ddt_fast.generation.seeds import seeded_noise
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.sampling.engine import Progress, sample


@dataclass(frozen=True)
class Job:
    """What to generate.

    Attributes:
        labels: (N,) int64 classes.
        seeds: N seeds; sample i is the image of seeds[i] and labels[i].
        sample_size: side of what the model sees.
        batch_size: samples drawn at a time.
        sampling: the sampling settings.
    """

    labels: Tensor
    seeds: Sequence[int]
    sample_size: int
    batch_size: int
    sampling: SamplingConfig


def generate(
    model: DDT | FusedDDT, job: Job, decode: Callable[[Tensor], Tensor] | None = None, progress: Progress | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Yield the job's images batch by batch, (up to batch_size, H, W, 3) uint8, in order.

    Args:
        model: on its device.
        job: what to generate.
        decode: latents → pixels in [-1, 1]; None for a pixel-space model.
        progress: called after every solver step.
    """
    shape = (model.config.in_channels, job.sample_size, job.sample_size)
    for start in range(0, len(job.seeds), job.batch_size):
        part = slice(start, start + job.batch_size)
        noise, generators = seeded_noise(job.seeds[part], shape)
        samples = sample(model, noise, job.labels[part], job.sampling, generators=generators, progress=progress)
        yield to_uint8(samples if decode is None else decode(samples))


def save_images(images: NDArray[np.uint8], job: Job, output_dir: Path) -> None:
    """Write images (N, H, W, 3) as images/INDEX_class_C_seed_S.png, grid.png and samples.npz (arr_0, labels, seeds).

    Each appears whole or not at all; the ones of an earlier job in the same folder are replaced.
    """
    labels = job.labels.tolist()
    with atomic_folder(output_dir / "images") as folder:
        for i, (image, label, seed) in enumerate(zip(images, labels, job.seeds, strict=True)):
            Image.fromarray(image).save(folder / f"{i:05d}_class_{label}_seed_{seed}.png")
    with atomic_file(output_dir / "grid.png") as file:
        labelled_grid(images, [str(label) for label in labels]).save(file)
    with atomic_file(output_dir / "samples.npz") as file, file.open("wb") as stream:
        np.savez(stream, arr_0=images, labels=np.asarray(labels), seeds=np.asarray(job.seeds))
