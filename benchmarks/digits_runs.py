"""Runs of the digits model that comes with the package, measured: what benchmarks of sampling settings share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ddt_fast
import ddt_kernels
from benchmarks.measure import relative_error
from ddt_fast import SamplingConfig, load_model
from ddt_fast.evaluation.digits_score import DigitsScore, score_digits
from ddt_fast.files import atomic_file, output_folder
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling_options import EMBEDDED_CHECKPOINT

SIZE = 8
"""Side of the digits, in pixels."""

BATCH = 256
"""Samples drawn at a time."""

KEEP_HELP = "folder in which samples are kept: a command that was stopped goes on there when started again"


class DigitsRuns:
    """Draws the same samples, seeds 0 and on, by whatever settings.

    Args:
        model: of `digits_model`.
        num_samples: of every run; scores take 65 or more.
        keep: of `kept_samples`: what was drawn is written there, and read where it is there already.
    """

    def __init__(self, model: DDT | FusedDDT, num_samples: int, keep: Path | None = None) -> None:
        self.model, self.num_samples, self._keep = model, num_samples, keep
        self.labels = assign_labels(num_samples, model.config.num_classes)
        self.noise, _ = seeded_noise(range(num_samples), (model.config.in_channels, SIZE, SIZE))

    def __call__(self, config: SamplingConfig) -> Tensor:
        """The samples, (num_samples, 1, 8, 8) float32."""
        starts = range(0, self.num_samples, BATCH)
        return torch.cat([self._batch(config, start, min(start + BATCH, self.num_samples)) for start in starts])

    def _batch(self, config: SamplingConfig, start: int, end: int) -> Tensor:
        file = None
        if self._keep is not None:
            settings = hashlib.sha256(f"{type(self.model).__name__} {config}".encode()).hexdigest()[:16]
            file = self._keep / f"{settings}_{start}_{end}.safetensors"
            if file.is_file():
                return load_file(file)["samples"]
        sampler = Sampler(self.model, config, end - start, SIZE, SIZE)
        samples = sampler(self.noise[start:end], self.labels[start:end])
        if file is not None:
            with atomic_file(file) as temporary:
                save_file({"samples": samples}, temporary)
        return samples

    def score(self, samples: Tensor) -> DigitsScore:
        """Of samples that a run drew."""
        return score_digits(samples, self.labels)

    def flops(self, plan: SamplingPlan) -> int:
        """Per image, of the digits model itself."""
        return plan.flops(self.model.config, SIZE, SIZE)


@dataclass(frozen=True)
class SampleErrors:
    """Relative L2 distances of samples from the true ones.

    Attributes:
        error: of all samples as one vector. One that lies near a fork and goes another way outweighs hundreds.
        error_median: of half of the samples, each by itself, at most.
        error_p90: of nine in ten at most.
    """

    error: float
    error_median: float
    error_p90: float


def sample_errors(samples: Tensor, truth: Tensor) -> SampleErrors:
    """Of samples (N, C, H, W) against the true ones."""
    off = (samples - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    median, p90 = off.quantile(torch.tensor([0.5, 0.9])).tolist()
    return SampleErrors(relative_error(samples, truth), median, p90)


def kept_samples(folder: str | None) -> Path | None:
    """The part of the folder that --keep names which holds what this code draws; None without one.

    Samples depend on the two packages' files, the weights among them, and on PyTorch: another version of any is
    another part.
    """
    if folder is None:
        return None
    digest = hashlib.sha256(torch.__version__.encode())
    for package in (ddt_fast, ddt_kernels):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*")):
            if file.suffix in (".py", ".safetensors", ".json"):
                digest.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return output_folder(Path(folder) / digest.hexdigest()[:16])


def digits_model() -> DDT:
    """The trained model in the package, in float32 on the CPU."""
    return load_model(EMBEDDED_CHECKPOINT)


def xl2_flops(plan: SamplingPlan) -> int:
    """Per image, what the same plan takes at XL/2, 256 px."""
    preset = PRESETS["xl2_256"]
    return plan.flops(preset.model, preset.data.sample_size, preset.data.sample_size)
