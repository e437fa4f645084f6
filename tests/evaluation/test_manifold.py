"""Precision and recall against brute force, and against other packages."""

import numpy as np
import pytest
import torch
from independent_metrics import independent

from ddt_fast.evaluation import manifold, precision_recall


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
def test_brute_force_agrees_whatever_the_blocks(monkeypatch, block, k):
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


def test_known_sets():
    reference = torch.arange(10.0)[:, None]
    # Balls reach 3 at the ends, 2 elsewhere.
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference + 100, reference) == (0, 0)
    assert precision_recall(torch.tensor([[-3.0], [12.0], [13.0], [5.0]]), reference)[0] == 0.75


@pytest.mark.parametrize("seed", range(2))
def test_other_packages_agree(seed):
    samples, reference = clouds(seed)
    ours = precision_recall(samples, reference)
    theirs = independent("torch_fidelity.metric_prc").prc_features_to_metric(samples, reference, verbose=False)
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]))
    prdc = independent("prdc").compute_prdc(reference.numpy(), samples.numpy(), nearest_k=3)
    assert ours == pytest.approx((prdc["precision"], prdc["recall"]))


@pytest.mark.parametrize(
    ("samples", "reference", "k", "message"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), 3, "3 samples have no 3-th nearest neighbour; expected 4 or more"),
        (np.zeros((9, 2)), np.zeros((9, 3)), 3, "samples have 2 numbers each, the reference 3"),
        (np.zeros((9, 2)), np.zeros((9, 2)), 0, "k is 0"),
        (np.full((9, 2), np.nan), np.zeros((9, 2)), 3, "samples hold features that are not finite"),
        (np.zeros(9), np.zeros((9, 2)), 3, r"expected floating point \(N, D\)"),
    ],
)
def test_mistakes_are_answered(samples, reference, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(samples, reference, k)
