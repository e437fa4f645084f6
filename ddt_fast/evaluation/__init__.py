"""Evaluation of samples."""

from ddt_fast.evaluation.metrics import frechet_distance

__all__ = ["frechet_distance"]
