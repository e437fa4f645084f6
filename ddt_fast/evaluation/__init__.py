"""Evaluation of samples: FID, sFID, Inception Score, precision and recall, KID."""

from ddt_fast.evaluation.features import FeatureAccumulator, FeatureSet, InceptionExtractor, PixelExtractor
from ddt_fast.evaluation.manifold import precision_recall
from ddt_fast.evaluation.metrics import frechet_distance, inception_score, kernel_inception_distance
from ddt_fast.evaluation.scoring import METRICS, evaluate

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
