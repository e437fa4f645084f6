"""Streaming statistics: exact whatever the batches, mergeable, and kept in ADM's format."""

import numpy as np
import pytest
import torch

from ddt_fast.evaluation.statistics import RunningStatistics, load_statistics, save_statistics


def rows(count: int = 500, dims: int = 12, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(dims, dims, generator=generator)
    return torch.randn(count, dims, generator=generator) @ mix + offset


def running(parts) -> RunningStatistics:
    statistics = RunningStatistics()
    for part in parts:
        statistics.add(part)
    return statistics


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_batches_do_not_matter(batch):
    # An offset that would take seven digits from a sum of squares.
    data = rows(offset=1e5)
    gaussian = running(data.split(batch)).gaussian()
    assert gaussian.mu.dtype == gaussian.sigma.dtype == np.float64
    np.testing.assert_allclose(gaussian.mu, data.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(gaussian.sigma, np.cov(data.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_parts_merge():
    data = rows()
    merged = running([data[:100]])
    for part in (data[100:101], data[101:101], data[101:]):
        merged.merge(running([part] if len(part) else []))
    whole = running([data]).gaussian()
    np.testing.assert_allclose(merged.gaussian().mu, whole.mu, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(merged.gaussian().sigma, whole.sigma, rtol=1e-12, atol=1e-13)
    empty = RunningStatistics()
    empty.merge(merged)
    merged.add(data)
    assert empty.count == 500  # a copy, which later rows do not reach
    np.testing.assert_allclose(empty.gaussian().sigma, whole.sigma, rtol=1e-12, atol=1e-13)


def test_files_have_adms_names(tmp_path):
    pool, spatial = (running([rows(dims=dims)]).gaussian() for dims in (4, 6))
    save_statistics(tmp_path / "both.npz", pool, spatial, 500)
    with np.load(tmp_path / "both.npz") as archive:
        assert sorted(archive.files) == ["mu", "mu_s", "num_images", "sigma", "sigma_s"]
    found_pool, found_spatial, count = load_statistics(tmp_path / "both.npz")
    assert count == 500
    np.testing.assert_array_equal(found_pool.sigma, pool.sigma)
    np.testing.assert_array_equal(found_spatial.mu, spatial.mu)
    save_statistics(tmp_path / "pool.npz", pool, None, None)
    assert load_statistics(tmp_path / "pool.npz")[1:] == (None, None)
    # Other programmes save float32 too.
    np.savez(tmp_path / "float32.npz", mu=pool.mu.astype(np.float32), sigma=pool.sigma.astype(np.float32))
    assert load_statistics(tmp_path / "float32.npz")[0].mu.dtype == np.float64
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    assert load_statistics(tmp_path / "images.npz") == (None, None, None)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([rows(dims=4), torch.zeros(3, 5)], "features have 5 numbers, those before 4"),
        ([torch.full((3, 4), torch.nan)], "not finite"),
        ([torch.zeros(4)], r"expected \(B, D\)"),
        ([torch.zeros(1, 4)], "covariance of 1 row "),
    ],
)
def test_wrong_rows_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        running(parts).gaussian()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sigma": np.eye(3)}, "holds sigma but no mu; expected both"),
        ({"mu_s": np.zeros(3)}, "holds mu_s but no sigma_s"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu has shape \(3,\), sigma \(4, 4\)"),
        ({"mu": np.zeros(3, dtype=int), "sigma": np.eye(3)}, "mu is int64; expected floating point"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "mu holds numbers that are not finite"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "num_images": np.array(0.5)}, "num_images is float64"),
        (
            {"mu": np.zeros(2), "sigma": np.eye(2), "num_images": np.array(-3)},
            "num_images is -3; expected .* 2 or more",
        ),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu has shape \(0,\), .* with D of 1 or more"),
        (
            {"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.1, 1.0]])},
            "sigma is not a .* differs from its transpose",
        ),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [2.0, 1.0]])}, "sigma is not a .* lowest eigenvalue is -1"),
        ({"mu_s": np.zeros(1), "sigma_s": -np.eye(1)}, "sigma_s is not a .* lowest eigenvalue is -1"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "sigma holds numbers that are not finite"),
        ({"mu": np.array([{}, 1]), "sigma": np.eye(2)}, "mu cannot be read: it holds Python objects, "),
    ],
)
def test_wrong_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=rf"wrong\.npz.*{message}") as refusal:
        load_statistics(tmp_path / "wrong.npz")
    assert "allow_pickle" not in str(refusal.value)


@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.99])
def test_damaged_files_are_refused(tmp_path, kept):
    file = tmp_path / "wrong.npz"
    np.savez(file, mu=np.zeros(9), sigma=np.eye(9))
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"wrong\.npz cannot be read: .*; expected an npz with mu and sigma"):
        load_statistics(file)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rounded_and_singular_covariances_are_read(tmp_path, dtype):
    gaussian = running([rows(count=20, dims=200)]).gaussian()
    np.savez(tmp_path / "rounded.npz", mu=gaussian.mu.astype(dtype), sigma=gaussian.sigma.astype(dtype))
    found = load_statistics(tmp_path / "rounded.npz")[0]
    np.testing.assert_allclose(found.sigma, gaussian.sigma, rtol=1e-3, atol=1e-3)
