"""Metrics of generative models, on features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def gaussian_statistics(features: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64; ValueError for fewer than two rows."""
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"features have shape {features.shape}; wanted (N, D) with N of 2 or more")
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet distance of two Gaussians: |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    (FID, arXiv 1706.08500, equation 6.) The trace of the root is the sum of the roots of the eigenvalues of the
    symmetric sigma1^(1/2) sigma2 sigma1^(1/2): exact, real and stable for singular covariances too.

    Args:
        mu1, mu2: (D,) means.
        sigma1, sigma2: (D, D) covariances, symmetric.

    Raises:
        ValueError: shapes that do not agree.
    """
    dims = mu1.shape[0] if mu1.ndim == 1 else -1
    if mu2.shape != (dims,) or sigma1.shape != (dims, dims) or sigma2.shape != (dims, dims):
        shapes = f"{mu1.shape}, {sigma1.shape}, {mu2.shape}, {sigma2.shape}"
        raise ValueError(f"statistics have shapes {shapes}; wanted (D,), (D, D), (D,), (D, D)")
    values, vectors = np.linalg.eigh(sigma1.astype(np.float64))
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ sigma2.astype(np.float64) @ root)
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(eigenvalues.clip(min=0)).sum()
    return float(np.square(mu1.astype(np.float64) - mu2).sum() + trace)
