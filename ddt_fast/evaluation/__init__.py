"""Evaluation of samples: FID, sFID, Inception Score, precision and recall, KID."""

from typing import TYPE_CHECKING

from ddt_fast.lazy import lazy_names

if TYPE_CHECKING:
    from ddt_fast.evaluation.features import FeatureAccumulator, FeatureSet, InceptionExtractor, PixelExtractor
    from ddt_fast.evaluation.manifold import precision_recall
    from ddt_fast.evaluation.metrics import frechet_distance, inception_score, kernel_inception_distance
    from ddt_fast.evaluation.names import METRICS
    from ddt_fast.evaluation.scoring import evaluate

__all__ = [
    "METRICS",
    "FeatureAccumulator",
    "FeatureSet",
    "InceptionExtractor",
    "PixelExtractor",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_inception_distance",
    "precision_recall",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ddt_fast.evaluation.features": ["FeatureAccumulator", "FeatureSet", "InceptionExtractor", "PixelExtractor"],
        "ddt_fast.evaluation.manifold": ["precision_recall"],
        "ddt_fast.evaluation.metrics": ["frechet_distance", "inception_score", "kernel_inception_distance"],
        "ddt_fast.evaluation.names": ["METRICS"],
        "ddt_fast.evaluation.scoring": ["evaluate"],
    },
)
