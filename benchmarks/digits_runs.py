"""Runs of the digits model that comes with the package, measured: what benchmarks of sampling settings share."""

from __future__ import annotations

from torch import Tensor

from ddt_fast import SamplingConfig, load_model
from ddt_fast.evaluation.digits_score import DigitsScore, score_digits
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import Sampler, SamplingPlan
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.sampling_options import EMBEDDED_CHECKPOINT

SIZE = 8
"""Side of the digits, in pixels."""


class DigitsRuns:
    """Draws the same samples, seeds 0 and on, by whatever settings.

    Args:
        model: of `digits_model`.
        num_samples: of every run; scores take 65 or more.
    """

    def __init__(self, model: DDT | FusedDDT, num_samples: int) -> None:
        self.model, self.num_samples = model, num_samples
        self.labels = assign_labels(num_samples, model.config.num_classes)
        self.noise, _ = seeded_noise(range(num_samples), (model.config.in_channels, SIZE, SIZE))

    def __call__(self, config: SamplingConfig) -> Tensor:
        """The samples, (num_samples, 1, 8, 8) float32."""
        return Sampler(self.model, config, self.num_samples, SIZE, SIZE)(self.noise, self.labels)

    def score(self, samples: Tensor) -> DigitsScore:
        """Of samples that a run drew."""
        return score_digits(samples, self.labels)

    def flops(self, plan: SamplingPlan) -> int:
        """Per image, of the digits model itself."""
        return plan.flops(self.model.config, SIZE, SIZE)


def digits_model() -> DDT:
    """The trained model in the package, in float32 on the CPU."""
    return load_model(EMBEDDED_CHECKPOINT)


def xl2_flops(plan: SamplingPlan) -> int:
    """Per image, what the same plan takes at XL/2, 256 px."""
    preset = PRESETS["xl2_256"]
    return plan.flops(preset.model, preset.data.sample_size, preset.data.sample_size)
