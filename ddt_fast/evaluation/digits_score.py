"""Scores of generated digits, in pixel space: do they show the right class, are they distributed like real digits, and
are they new?"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC
from torch import Tensor

from ddt_fast.data.digits import digits
from ddt_fast.evaluation.metrics import frechet_distance, gaussian_statistics
from ddt_fast.wording import plural

NUM_SPLITS = 10


@dataclass(frozen=True)
class DigitsScore:
    """How generated digits compare with the 1,797 real ones. Pixels are in [-1, 1] here.

    Attributes:
        num_samples: samples scored.
        accuracy: share of the samples that a classifier trained on all real digits assigns to the right class.
        accuracy_real: held-out accuracy of that classifier on real digits (5-fold cross-validation).
        frechet: Fréchet distance between the samples and one half of the real digits, mean over random halves.
        frechet_real: the same between that half and digits of the other half, as many as there are samples.
        nearest: mean distance of a sample to the nearest real digit.
        nearest_real: mean distance of a real digit to the nearest other one.
    """

    num_samples: int
    accuracy: float
    accuracy_real: float
    frechet: float
    frechet_real: float
    nearest: float
    nearest_real: float

    def __str__(self) -> str:
        return (
            f"{plural(self.num_samples, 'sample')}: class accuracy {self.accuracy:.2%} (held-out real digits "
            f"{self.accuracy_real:.2%}); pixel Fréchet distance {self.frechet:.3f} (real halves "
            f"{self.frechet_real:.3f}, ratio {self.frechet / self.frechet_real:.2f}); nearest training image "
            f"{self.nearest:.3f} (real to real {self.nearest_real:.3f}, ratio {self.nearest / self.nearest_real:.2f})"
        )


def score_digits(samples: Tensor, labels: Tensor, seed: int = 0) -> DigitsScore:
    """Score samples (N, 1, 8, 8) in [-1, 1] drawn for labels (N,).

    Fréchet distances depend on the sample counts, so they are the same for samples and real digits: min(N, 898) samples
    against 899 real digits, and min(N, 898) real digits against the same 899; both are means over random halves.
    ValueError if there are fewer than 65 samples (their 64x64 covariance would be singular), or shapes do not agree.
    """
    if samples.shape[1:] != (1, 8, 8) or labels.shape != samples.shape[:1]:
        raise ValueError(f"samples {tuple(samples.shape)}, labels {tuple(labels.shape)}; expected (N, 1, 8, 8), (N,)")
    if len(samples) < 65:
        raise ValueError(f"{plural(len(samples), 'sample')}; allowed: 65 or more")
    real, generated = _real_digits(), _pixels(samples)
    count = min(len(samples), len(real.pixels) // 2)
    frechet, frechet_real = [], []
    rng = np.random.default_rng(seed)
    for _ in range(NUM_SPLITS):
        order = rng.permutation(len(real.pixels))
        reference = gaussian_statistics(real.pixels[order[len(real.pixels) // 2 :]])
        frechet_real.append(frechet_distance(*gaussian_statistics(real.pixels[order[:count]]), *reference))
        chosen = rng.permutation(len(generated))[:count]
        frechet.append(frechet_distance(*gaussian_statistics(generated[chosen]), *reference))
    return DigitsScore(
        num_samples=len(samples),
        accuracy=float((real.classifier.predict(generated) == labels.numpy()).mean()),
        accuracy_real=real.accuracy,
        frechet=float(np.mean(frechet)),
        frechet_real=float(np.mean(frechet_real)),
        nearest=float(real.neighbours.kneighbors(generated, 1)[0].mean()),
        nearest_real=real.nearest,
    )


@dataclass(frozen=True)
class _Real:
    """The part of a score that depends only on the real digits."""

    pixels: NDArray[np.float64]
    classifier: SVC
    accuracy: float
    neighbours: NearestNeighbors
    nearest: float


@cache
def _real_digits() -> _Real:
    images, labels = digits()
    pixels, classes = _pixels(images), labels.numpy()
    classifier = SVC(gamma=0.064)
    folds = KFold(5, shuffle=True, random_state=0)
    accuracy = float(cross_val_score(classifier, pixels, classes, cv=folds).mean())
    neighbours = NearestNeighbors().fit(pixels)
    # A real digit's nearest neighbour is itself: take the second.
    nearest = float(neighbours.kneighbors(pixels, 2)[0][:, 1].mean())
    return _Real(pixels, classifier.fit(pixels, classes), accuracy, neighbours, nearest)


def _pixels(images: Tensor) -> NDArray[np.float64]:
    """Images as (N, 64) float64 rows, clipped to [-1, 1] like a saved image."""
    return images.detach().cpu().double().clamp(-1, 1).flatten(1).numpy()
