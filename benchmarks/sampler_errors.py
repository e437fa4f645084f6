"""Runs of the digits model that comes with the package: how far their samples are from the true ones, what settings
cost, and which are worth having."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ddt_fast
import ddt_kernels
from benchmarks.harness import relative_error
from ddt_fast import SamplingConfig, load_model
from ddt_fast.evaluation.digits_score import score_digits
from ddt_fast.files import atomic_file, output_folder
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model import FusedDDT
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.noise import seeded_noise

SIZE, BATCH = 8, 256  # side of the digits in pixels; samples drawn at a time
PUBLISHED = PRESETS["xl2_256"].sampling
# Even steps: the published last one is ten times as long as the others, a bad choice for the solver's error alone.
BASE = replace(PUBLISHED, last_step=None)


class DigitsRuns:
    """Draws the same samples, seeds 0 and on, by any settings, with the trained model in float32 on the CPU.

    Args:
        num_samples: of every run; scores need 65 or more.
        keep: folder in which samples are kept, to be read instead of drawn again.
    """

    def __init__(self, num_samples: int, keep: str | None = None) -> None:
        # Not compiled: settings differ in the shapes of what they keep, and each would be compiled anew.
        self.model, self.num_samples, self._keep = digits_model(), num_samples, kept_samples(keep)
        self.labels = assign_labels(num_samples, self.model.config.num_classes)
        self.noise, _ = seeded_noise(range(num_samples), (self.model.config.in_channels, SIZE, SIZE))

    def __call__(self, config: SamplingConfig) -> Tensor:
        """The samples, (num_samples, 1, 8, 8) float32."""
        starts = range(0, self.num_samples, BATCH)
        return torch.cat([self._batch(config, start, min(start + BATCH, self.num_samples)) for start in starts])

    def _batch(self, config: SamplingConfig, start: int, end: int) -> Tensor:
        settings = hashlib.sha256(f"{config}".encode()).hexdigest()[:16]
        file = self._keep and self._keep / f"{settings}_{start}_{end}.safetensors"
        if file is not None and file.is_file():
            return load_file(file)["samples"]
        sampler = Sampler(self.model, config, end - start, SIZE, SIZE)
        samples = sampler(self.noise[start:end], self.labels[start:end])
        if file is not None:
            with atomic_file(file) as temporary:
                save_file({"samples": samples}, temporary)
        return samples

    def scores(self, samples: Tensor, *names: str) -> dict[str, float]:
        """Fréchet distance and class accuracy of samples that a run drew, and other fields of their DigitsScore."""
        score = score_digits(samples, self.labels)
        return {name: getattr(score, name) for name in ("frechet", "accuracy", *names)}


def kept_samples(folder: str | None) -> Path | None:
    """The part of the folder of --keep that holds what this code draws; None without one. Samples depend on the two
    packages' files, the weights among them, and on PyTorch: another version of any is another part."""
    if folder is None:
        return None
    digest = hashlib.sha256(torch.__version__.encode())
    for package in (ddt_fast, ddt_kernels):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*")):
            if file.suffix in (".py", ".safetensors", ".json"):
                digest.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return output_folder(Path(folder) / digest.hexdigest()[:16])


@cache
def digits_model() -> FusedDDT:
    """The trained model in the package, in float32 on the CPU."""
    return FusedDDT.from_reference(load_model(EMBEDDED_CHECKPOINT))


def sample_errors(samples: Tensor, truth: Tensor) -> dict[str, float]:
    """Relative L2 distances of samples (N, C, H, W) from the true ones.

    error: of all samples as one vector. One that lies near a fork and goes another way outweighs hundreds.
    error_median, error_p90: of each sample by itself, the median and the 90% quantile.
    """
    off = (samples - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    median, p90 = off.quantile(torch.tensor([0.5, 0.9])).tolist()
    return {"error": relative_error(samples, truth), "error_median": median, "error_p90": p90}


def xl2_tflop(config: SamplingConfig) -> float:
    """TFLOP per image that these settings take at XL/2, 256 px."""
    preset = PRESETS["xl2_256"]
    return SamplingPlan.from_config(config).flops(preset.model, preset.data.sample_size, preset.data.sample_size) / 1e12


def digits_mflop(plan: SamplingPlan) -> float:
    """MFLOP per image that a plan takes with the digits model."""
    return plan.flops(digits_model().config, SIZE, SIZE) / 1e6


# Of many (cost, loss) points, lower being better in both, those worth having; equal points count once, as the first.


def front(costs: Sequence[float], losses: Sequence[float], factor: float = 1.0) -> list[int]:
    """The Pareto front, by number and ascending cost: the points that no other beats. With a factor above 1 also those
    near it, which lose less than `factor` times the least of those that cost at most as much."""
    chosen, least = [], float("inf")
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i], i)):
        if losses[i] < factor * least:
            chosen.append(i)
        least = min(least, losses[i])
    return chosen


def dominating(costs: Sequence[float], losses: Sequence[float], point: int) -> set[int]:
    """The points that cost at most as much as `point` and lose less, or cost less and lose at most as much."""
    other = (costs[point], losses[point])
    pairs = list(zip(costs, losses, strict=True))
    return {i for i, pair in enumerate(pairs) if pair != other and pair[0] <= other[0] and pair[1] <= other[1]}


def recommend(costs: Sequence[float], losses: Sequence[float], budget: float, tolerance: float) -> int | None:
    """The cheapest point whose loss is at most `tolerance` times the least that the budget affords; None where it
    affords nothing. A tolerance of 1 buys the last percent at any price."""
    affordable = [i for i in range(len(costs)) if costs[i] <= budget]
    least = min((losses[i] for i in affordable), default=0.0)
    enough = (i for i in affordable if losses[i] <= tolerance * least)
    return min(enough, key=lambda i: (costs[i], losses[i], i), default=None)
