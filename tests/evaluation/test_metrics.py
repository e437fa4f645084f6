import numpy as np
import pytest
import scipy.linalg
import torch

from ddt_fast.data.digits import digits
from ddt_fast.evaluation import frechet_distance
from ddt_fast.evaluation.digits_score import score_digits
from ddt_fast.evaluation.metrics import gaussian_statistics


def random_gaussian(rng, dims):
    root = rng.standard_normal((dims, dims))
    return rng.standard_normal(dims), root @ root.T / dims


def test_closed_forms():
    zero, one = np.zeros(3), np.eye(3)
    assert frechet_distance(zero, one, zero, one) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(zero, one, np.array([1.0, 2.0, 2.0]), one) == pytest.approx(9)
    # Commuting covariances: the sum of squared differences of the standard deviations.
    a, b = np.diag([4.0, 9.0, 1.0]), np.diag([1.0, 1.0, 16.0])
    assert frechet_distance(zero, a, zero, b) == pytest.approx(1 + 4 + 9)


def test_agrees_with_the_matrix_square_root():
    rng = np.random.default_rng(0)
    (mu1, sigma1), (mu2, sigma2) = random_gaussian(rng, 20), random_gaussian(rng, 20)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_are_fine():
    features = np.random.default_rng(0).standard_normal((5, 12))
    statistics = gaussian_statistics(features)
    assert frechet_distance(*statistics, *statistics) == pytest.approx(0, abs=1e-6)


def test_statistics_are_the_unbiased_ones_in_float64():
    features = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    mean, covariance = gaussian_statistics(features)
    assert mean.dtype == covariance.dtype == np.float64
    centred = features - features.mean(0)
    np.testing.assert_allclose(covariance, centred.T @ centred / 49, rtol=1e-5)
    with pytest.raises(ValueError, match="N of 2 or more"):
        gaussian_statistics(features[:1])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="statistics have shapes"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


def test_digits_score_tells_real_noisy_wrong_and_copied_apart():
    images, labels = digits()
    half = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:898]
    real, real_labels = images[half], labels[half]
    copied = score_digits(real, real_labels)
    assert copied.num_samples == 898
    assert copied.accuracy > 0.99
    # About half of the copies lie in the reference half itself.
    assert 0.4 * copied.frechet_real < copied.frechet < 0.7 * copied.frechet_real
    assert copied.nearest < 0.1 * copied.nearest_real
    noisy = score_digits(real + 0.5 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0)), real_labels)
    assert noisy.frechet > 3 * copied.frechet
    assert noisy.nearest > copied.nearest_real
    assert score_digits(real, (real_labels + 1) % 10).accuracy < 0.05
    assert score_digits(real, real_labels) == copied
    assert "class accuracy" in str(copied)


def test_digits_score_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="64 samples; allowed: 65 or more"):
        score_digits(torch.zeros(64, 1, 8, 8), torch.zeros(64).long())
    with pytest.raises(ValueError, match="wanted"):
        score_digits(torch.zeros(70, 3, 8, 8), torch.zeros(70).long())
