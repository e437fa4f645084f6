import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch

from ddt_fast.data.digits import digits
from ddt_fast.evaluation import manifold
from ddt_fast.evaluation.digits_score import score_digits
from ddt_fast.evaluation.manifold import precision_recall
from ddt_fast.evaluation.metrics import (
    frechet_distance,
    gaussian_statistics,
    inception_score,
    kernel_inception_distance,
)


def random_gaussian(rng, dims):
    root = rng.standard_normal((dims, dims))
    return rng.standard_normal(dims), root @ root.T / dims


@pytest.mark.parametrize(("count", "dims"), [(10, 64), (50, 300), (2, 8), (400, 32)])
def test_equal_statistics_have_distance_0(count, dims):
    """Also singular ones, of fewer images than dimensions, and of the same images in another order."""
    features = np.abs(np.random.default_rng(0).standard_normal((count, dims))) ** 3
    first, second = gaussian_statistics(features), gaussian_statistics(features[::-1])
    for other in (first, second):
        assert 0 <= frechet_distance(*first, *other) < 1e-10


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        ([[1.0, 0.5], [0.1, 1.0]], "sigma2 is not a covariance: it differs from its transpose by up to 0.4"),
        ([[1.0, 2.0], [2.0, 1.0]], "sigma2 is not a covariance: its lowest eigenvalue is -1; expected 0 or more"),
        ([[-1.0, 0.0], [0.0, -1.0]], "sigma2 is not a covariance: its lowest eigenvalue is -1"),
        ([[1.0, np.nan], [np.nan, 1.0]], "statistics hold numbers that are not finite"),
    ],
)
def test_what_is_not_a_covariance_has_no_distance(sigma, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.array(sigma))


def test_agrees_with_the_matrix_square_root():
    rng = np.random.default_rng(0)
    (mu1, sigma1), (mu2, sigma2) = random_gaussian(rng, 20), random_gaussian(rng, 20)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dims", [8, 300])
def test_rotated_gaussians_have_a_closed_form(dims):
    """Commuting covariances: the sum of squared differences of the standard deviations."""
    rng = np.random.default_rng(dims)
    rotation = np.linalg.qr(rng.standard_normal((dims, dims)))[0]
    a, b = rng.uniform(0, 3, (2, dims))
    a[: dims // 4] = 0  # singular
    mu1, mu2 = rng.standard_normal((2, dims))
    expected = np.square(mu1 - mu2).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    distance = frechet_distance(mu1, rotation * a @ rotation.T, mu2, rotation * b @ rotation.T)
    assert distance == pytest.approx(expected, rel=1e-6)


def class_probabilities(per_class: int, num_classes: int = 50, sharpness: float = 9.0):
    """Confident predictions, class after class, each a little different."""
    logits = np.random.default_rng(0).standard_normal((num_classes * per_class, num_classes))
    logits[np.arange(len(logits)), np.repeat(np.arange(num_classes), per_class)] += sharpness
    return scipy.special.softmax(logits, axis=1)


def test_inception_score_of_known_predictions():
    # All alike: 1. One class each, evenly: as many as there are classes.
    assert inception_score(np.full((40, 8), 1 / 8)) == pytest.approx((1, 0))
    assert inception_score(np.eye(8)[np.arange(800) % 8], splits=1) == pytest.approx((8, 0))


def test_inception_score_does_not_depend_on_order_only_when_shuffled():
    in_order = class_probabilities(per_class=200)
    shuffled = in_order[np.random.default_rng(1).permutation(len(in_order))]
    expected, deviation = inception_score(shuffled)
    assert expected > 30
    assert deviation > 0
    assert inception_score(in_order)[0] == pytest.approx(expected, rel=0.005)
    assert inception_score(in_order[::-1])[0] == pytest.approx(expected, rel=0.005)
    # Ten splits of five classes each: what ADM's evaluator makes of a sorted file.
    assert inception_score(in_order, permute=False)[0] < 6
    assert inception_score(shuffled, permute=False)[0] == pytest.approx(expected, rel=0.005)


def test_inception_score_is_adms_without_the_permutation():
    probabilities = class_probabilities(per_class=11)
    shuffled = probabilities[np.random.default_rng(1).permutation(len(probabilities))]
    scores = []
    for part in np.split(shuffled, 10):
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    assert inception_score(shuffled, permute=False) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_kid_against_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / 20
    expected = within - 2 * np.mean([kernel(x[i], y[j]) for i, j in pairs])
    # Subsets of all rows: the order in which they are drawn changes nothing.
    assert kernel_inception_distance(x, y, 1, 5) == pytest.approx((expected, 0))


def brute_force(samples: torch.Tensor, reference: torch.Tensor, k: int) -> tuple[float, float]:
    samples, reference = samples.double(), reference.double()

    def distances(a, b):
        return (a[:, None] - b[None]).square().sum(-1)

    def radii(a):
        return distances(a, a).fill_diagonal_(torch.inf).kthvalue(k, 1).values

    between = distances(samples, reference)
    precision = (between <= radii(reference)).any(1).double().mean().item()
    return precision, (between <= radii(samples)[:, None]).any(0).double().mean().item()


def clouds(seed: int, count: int = 150, dims: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    samples = 0.7 * torch.randn(count, dims, generator=generator)
    return samples, torch.randn(count * 2 // 3, dims, generator=generator)


@pytest.mark.parametrize("block", [16, 64, 4096])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_brute_force_whatever_the_blocks(monkeypatch, block, k):
    monkeypatch.setattr(manifold, "_BLOCK", block)
    samples, reference = clouds(k)
    expected = brute_force(samples, reference, k)
    assert 0.1 < expected[0] <= 1
    assert 0.1 < expected[1] < 1
    assert precision_recall(samples, reference, k) == expected
    assert precision_recall(samples.numpy(), reference.numpy(), k) == expected


@pytest.mark.parametrize("seed", range(4))
def test_ties_duplicates_and_far_origins_are_decided_exactly(monkeypatch, seed):
    monkeypatch.setattr(manifold, "_BLOCK", 64)
    monkeypatch.setattr(manifold, "_EXACT_NUMBERS", 500)
    samples, reference = (torch.round(2 * cloud) / 2 for cloud in clouds(seed, dims=4))
    # Distances on a lattice tie all the time; copies have radius 0; far from the origin float32 products cancel.
    samples[20:60], reference[20:40] = samples[0], samples[0]
    samples, reference = samples + 1000, reference + 1000
    assert precision_recall(samples, reference) == brute_force(samples, reference, 3)


def test_what_float32_products_cannot_tell_apart(monkeypatch):
    # Rows whose distances differ by less than the rounding of their squared norms.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 64, generator=generator)
    offsets = torch.tensor([[-300.0], [300.0]])
    samples = torch.cat([base + o + 1e-3 * torch.randn(40, 64, generator=generator) for o in offsets]).double()
    reference = torch.cat([base + o + 1e-3 * torch.randn(40, 64, generator=generator) for o in offsets]).double()
    assert precision_recall(samples, reference) == brute_force(samples, reference, 3)
    settled = []
    exact = manifold._exact_distances
    monkeypatch.setattr(manifold, "_exact_distances", lambda a, b: settled.append(1) or exact(a, b))
    precision_recall(samples, reference)
    assert settled


def test_precision_and_recall_of_known_sets():
    reference = torch.arange(10.0)[:, None]
    # Balls reach 3 at the ends, 2 elsewhere.
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference + 100, reference) == (0, 0)
    assert precision_recall(torch.tensor([[-3.0], [12.0], [13.0], [5.0]]), reference)[0] == 0.75


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_statistics(np.zeros((1, 4))), "N of 2 or more"),
        (lambda: frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4)), "statistics have shapes"),
        (lambda: frechet_distance(np.array([np.nan]), np.eye(1), np.zeros(1), np.eye(1)), "not finite"),
        (lambda: score_digits(torch.zeros(64, 1, 8, 8), torch.zeros(64).long()), "64 samples; allowed: 65 or more"),
        (lambda: score_digits(torch.zeros(70, 3, 8, 8), torch.zeros(70).long()), r"expected \(N, 1, 8, 8\), \(N,\)"),
        (lambda: inception_score(np.full((5, 4), 0.25)), "5 images cannot be split into 10 parts"),
        (lambda: inception_score(np.full((50, 4), 0.3)), "sum to 1"),
        (lambda: inception_score(np.full((50, 4), np.nan)), "finite"),
        (lambda: inception_score(np.ones(50)), r"expected floats \(N, classes\)"),
        (lambda: kernel_inception_distance(np.zeros((9, 2)), np.zeros((9, 3))), "features have shapes"),
        (lambda: kernel_inception_distance(np.zeros((9, 2)), np.zeros((7, 2))), "subset_size is 1000; allowed: 2 to 7"),
        (lambda: kernel_inception_distance(np.full((9, 2), np.inf), np.zeros((9, 2)), 1, 3), "not finite"),
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2)), 3), "3 samples have no 3-th nearest"),
        (lambda: precision_recall(np.zeros((9, 2)), np.zeros((9, 3)), 3), "samples have 2 numbers each, the"),
        (lambda: precision_recall(np.zeros((9, 2)), np.zeros((9, 2)), 0), "k is 0"),
        (lambda: precision_recall(np.full((9, 2), np.nan), np.zeros((9, 2)), 3), "samples hold .* not finite"),
        (lambda: precision_recall(np.zeros(9), np.zeros((9, 2)), 3), r"expected floating point \(N, D\)"),
    ],
)
def test_metrics_refuse_what_they_cannot_score(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
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
