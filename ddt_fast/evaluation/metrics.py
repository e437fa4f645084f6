"""Metrics of generative models, on features. Improved precision and recall are in `manifold`."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.checks import require, require_int
from ddt_fast.evaluation.inception import full_float32
from ddt_fast.wording import plural

Array = NDArray[np.floating]

# torch-fidelity's seed, to draw what it draws.
SEED = 2020


def gaussian_statistics(features: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64; ValueError for fewer than two rows."""
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"features have shape {features.shape}; expected (N, D) with N of 2 or more")
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet distance of two Gaussians: |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    FID, arXiv 1706.08500, equation 6, never below 0. The trace of the root is the sum of the singular values of
    sigma1^(1/2) sigma2^(1/2). They are real, and have the rounding error of their size, also for singular covariances:
    those of fewer images than D. The roots of the eigenvalues of sigma1 sigma2 do not: one that should be 0 is
    about 1e-16 of the largest, its root 1e-8, and a thousand of these make the distance of equal statistics negative.

    Args:
        mu1, mu2: (D,) means.
        sigma1, sigma2: (D, D) covariances, symmetric.

    Raises:
        ValueError: shapes do not agree, numbers are not finite, or a sigma is not a covariance.
    """
    dims = mu1.shape[0] if mu1.ndim == 1 else -1
    if mu2.shape != (dims,) or sigma1.shape != (dims, dims) or sigma2.shape != (dims, dims):
        shapes = f"{mu1.shape}, {sigma1.shape}, {mu2.shape}, {sigma2.shape}"
        raise ValueError(f"statistics have shapes {shapes}; expected (D,), (D, D), (D,), (D, D)")
    if not all(np.isfinite(array).all() for array in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics hold numbers that are not finite")
    require_covariance("sigma1", sigma1)
    require_covariance("sigma2", sigma2)
    singular_values = np.linalg.svd(_root(sigma1) @ _root(sigma2), compute_uv=False)
    trace = np.trace(sigma1, dtype=np.float64) + np.trace(sigma2, dtype=np.float64)
    distance = np.square(mu1.astype(np.float64) - mu2).sum() + trace - 2 * singular_values.sum()
    return max(0.0, float(distance))


def require_covariance(name: str, sigma: Array) -> None:
    """Require a finite matrix (D, D) that is symmetric and has no negative eigenvalues, but for rounding to float32, or
    to its own dtype if that is coarser."""
    rounding = max(1e-5, 4 * float(np.finfo(sigma.dtype).eps))
    sigma = sigma.astype(np.float64)
    difference = np.abs(sigma - sigma.T).max()
    if difference > rounding * np.abs(sigma).max():
        differs = f"it differs from its transpose by up to {difference:.3g}"
        raise ValueError(f"{name} is not a covariance: {differs}; expected a symmetric matrix")
    floor = rounding * np.linalg.norm(sigma) + np.finfo(np.float64).tiny
    try:
        # Far quicker than eigenvalues, which only the message needs.
        np.linalg.cholesky(sigma + floor * np.eye(len(sigma)))
    except np.linalg.LinAlgError as error:
        lowest = f"its lowest eigenvalue is {np.linalg.eigvalsh(sigma)[0]:.3g}"
        raise ValueError(f"{name} is not a covariance: {lowest}; expected 0 or more") from error


def _root(sigma: Array) -> NDArray[np.float64]:
    """The root of a symmetric matrix without negative eigenvalues; those that rounding makes of 0 count as 0."""
    values, vectors = np.linalg.eigh(sigma.astype(np.float64))
    values[values < len(values) * np.finfo(np.float64).eps * values.max()] = 0
    return (vectors * np.sqrt(values)) @ vectors.T


def fixed_permutation(count: int) -> NDArray[np.int64]:
    """The permutation of `count` images before they are split, the same on every machine."""
    # NumPy promises never to change the numbers of this generator; it does not promise that for newer ones.
    return np.random.RandomState(SEED).permutation(count)


def inception_score(probabilities: Array, splits: int = 10, permute: bool = True) -> tuple[float, float]:
    """Inception Score (arXiv 1606.03498): exp of the mean KL divergence of an image's classes from those of its split.

    50,000 images in 10 splits are ADM's splits of 5,000. A split must hold all classes, so `fixed_permutation` shuffles
    the images first: a file sorted by class would score far too low.

    Args:
        probabilities: (N, classes), rows that sum to 1.
        splits: contiguous parts of almost equal size.
        permute: False keeps the order, as ADM's evaluator does.

    Returns:
        Mean and standard deviation over the splits.

    Raises:
        ValueError: there are fewer images than splits, or rows are not probabilities.
    """
    if probabilities.ndim != 2 or not np.issubdtype(probabilities.dtype, np.floating):
        raise ValueError(f"probabilities are {probabilities.dtype} {probabilities.shape}; expected floats (N, classes)")
    count = len(probabilities)
    if not 1 <= splits <= count:
        raise ValueError(
            f"{plural(count, 'image')} cannot be split into {plural(splits, 'part')}; allowed: 1 to {count}"
        )
    # Written so that NaN fails it.
    if not (probabilities.min() >= 0 and np.abs(probabilities.sum(1, dtype=np.float64) - 1).max() < 1e-3):
        raise ValueError("rows of probabilities must be finite, not negative, and sum to 1")
    order = fixed_permutation(count) if permute else np.arange(count)
    scores = []
    for i in range(splits):
        part = probabilities[order[i * count // splits : (i + 1) * count // splits]].astype(np.float64)
        entropy = np.sum(part * np.log(part, out=np.zeros_like(part), where=part > 0), axis=1)
        mean = part.mean(0)
        # Mean over images of sum p log(p / mean); classes without probability add nothing.
        scores.append(np.exp(entropy.mean() - np.sum(mean * np.log(mean, out=np.zeros_like(mean), where=mean > 0))))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_inception_distance(
    samples: Array | Tensor, reference: Array | Tensor, num_subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Kernel Inception Distance (arXiv 1801.01401): unbiased MMD^2 under the kernel (x.y / D + 1)^3.

    It is the mean over random subsets, drawn as torch-fidelity draws them, of as many samples as reference images. The
    computation runs on the tensors' device.

    Args:
        samples: (N, D) features.
        reference: (M, D) features.
        num_subsets: pairs of subsets.
        subset_size: rows of each subset.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: there are fewer rows than subset_size, it is below 2, D differs, or numbers are not finite.
    """
    first, second = torch.as_tensor(samples), torch.as_tensor(reference)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features have shapes {tuple(first.shape)}, {tuple(second.shape)}; expected (N, D), (M, D)")
    fewest = min(len(first), len(second))
    require(2 <= subset_size <= fewest, "subset_size", subset_size, f"2 to {fewest}, the smaller set's size")
    require_int("num_subsets", num_subsets, 1)
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("features hold numbers that are not finite")
    second = second.to(first)
    generator = np.random.RandomState(SEED)
    distances = []
    with full_float32():
        for _ in range(num_subsets):
            x = first[torch.from_numpy(generator.choice(len(first), subset_size, replace=False))]
            y = second[torch.from_numpy(generator.choice(len(second), subset_size, replace=False))]
            within = _off_diagonal_mean(_cubic_kernel(x, x)) + _off_diagonal_mean(_cubic_kernel(y, y))
            distances.append((within - 2 * _cubic_kernel(x, y).mean()).item())
    return float(np.mean(distances)), float(np.std(distances))


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    base = (x @ y.T).double() / x.shape[1] + 1
    return base * base * base


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    size = len(kernel)
    return (kernel.sum() - kernel.trace()) / (size * (size - 1))
