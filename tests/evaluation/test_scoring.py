"""From images to scores: the accumulator, what can be computed of what, and torch-fidelity's scores end to end."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from independent_metrics import independent

from ddt_fast.data.digits import digits
from ddt_fast.evaluation import scoring
from ddt_fast.evaluation.features import FeatureAccumulator, InceptionExtractor, PixelExtractor
from ddt_fast.evaluation.metrics import gaussian_statistics
from ddt_fast.evaluation.scoring import evaluate
from ddt_fast.evaluation.statistics import save_statistics
from ddt_fast.generation.images import to_uint8
from inception_cases import smooth_images, weights_file

pytestmark = pytest.mark.filterwarnings("ignore:.*no published score", "ignore:FID of")


@cache
def inception():
    return InceptionExtractor(weights_file())


def accumulated(images, extractor=None, **options):
    accumulator = FeatureAccumulator(extractor or PixelExtractor(), **options)
    accumulator.add(images)
    return accumulator.finish("images")


def pixels(images):
    return images.astype(np.float64).mean(3).reshape(len(images), -1) / 127.5 - 1


def write(path, images, **arrays):
    np.savez(path, arr_0=images, **arrays)
    return path


def test_same_weights_and_images_give_the_scores_of_torch_fidelity():
    module = independent("torch_fidelity.feature_extractor_inceptionv3")
    samples, reference = smooth_images(16, 0), smooth_images(14, 1)
    report = evaluate(accumulated(samples, inception()), accumulated(reference, inception()))
    network = module.FeatureExtractorInceptionV3(
        "test", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights_file()
    )
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(
        lambda _module, _inputs, y: spatial.append(y[:, :7].permute(0, 2, 3, 1).flatten(1).numpy())
    )
    with torch.no_grad():
        features, logits = network(torch.from_numpy(samples).permute(0, 3, 1, 2))
        real, _ = network(torch.from_numpy(reference).permute(0, 3, 1, 2))
    distance = independent("pytorch_fid.fid_score").calculate_frechet_distance
    kid = independent("torch_fidelity.metric_kid").kid_features_to_metric
    expected = {
        "fid": distance(*gaussian_statistics(features.numpy()), *gaussian_statistics(real.numpy())),
        **independent("torch_fidelity.metric_isc").isc_features_to_metric(logits),
        **independent("torch_fidelity.metric_prc").prc_features_to_metric(features, real, verbose=False),
        **kid(features.double(), real.double(), kid_subset_size=14, verbose=False),
    }
    sigma = [gaussian_statistics(part)[1] for part in spatial]
    values = report["metrics"]
    assert values["fid"] == pytest.approx(expected["fid"], rel=1e-4)
    assert values["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert values["inception_score_std"] == pytest.approx(expected["inception_score_std"], rel=1e-4)
    assert values["precision"] == pytest.approx(expected["precision"])
    assert values["recall"] == pytest.approx(expected["recall"])
    assert values["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    # No package has sFID: by the nuclear norm of the product of the centred features, which is its trace term.
    centred = [(part - part.mean(0)).astype(np.float64) / (len(part) - 1) ** 0.5 for part in spatial]
    trace = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    gap = np.square(spatial[0].mean(0, dtype=np.float64) - spatial[1].mean(0, dtype=np.float64)).sum()
    assert values["sfid"] == pytest.approx(gap + np.trace(sigma[0]) + np.trace(sigma[1]) - 2 * trace, rel=1e-4)


def test_scores_do_not_depend_on_batches_or_order_of_arrival():
    images = smooth_images(60, 0, size=8)
    reference = accumulated(smooth_images(50, 1, size=8))
    expected = evaluate(accumulated(images), reference)["metrics"]
    assert expected.keys() == {"fid", "precision", "recall", "kid", "kid_std"}
    order = np.random.default_rng(0).permutation(60)
    accumulator = FeatureAccumulator(PixelExtractor(), batch_size=7)
    for part in np.split(order, [13, 14, 40]):
        accumulator.add(images[part], indices=part.tolist())
    found = accumulator.finish("images")
    np.testing.assert_allclose(found.features, pixels(images), atol=1e-6)
    assert evaluate(found, reference)["metrics"] == pytest.approx(expected, rel=1e-4)


def test_ranks_merge_in_memory_and_through_files(tmp_path):
    images = smooth_images(60, 0, size=8)
    expected = accumulated(images)
    ranks = [FeatureAccumulator(PixelExtractor()) for _ in range(4)]  # the last has no images
    for rank, accumulator in enumerate(ranks):
        if rank < 3:
            accumulator.add(images[rank::3], range(rank, 60, 3))
        accumulator.save(tmp_path / f"{rank}.pt")
    loaded = FeatureAccumulator(PixelExtractor())
    for rank in (3, 2, 0, 1):
        loaded.load(tmp_path / f"{rank}.pt")
    for other in ranks[1:]:
        ranks[0].merge(other)
    for merged in (ranks[0], loaded):
        assert len(merged) == 60
        found = merged.finish("images")
        assert found.size == (8, 8)
        assert torch.equal(found.features, expected.features)
        np.testing.assert_allclose(found.pool.sigma, expected.pool.sigma, rtol=1e-11, atol=1e-14)
    without = FeatureAccumulator(PixelExtractor(), keep_features=False)
    without.add(smooth_images(2, 0, size=8), [60, 61])
    loaded.merge(without)
    with pytest.raises(ValueError, match="2 of 62 images have no features"):
        loaded.finish("images")
    ranks[0].merge(ranks[1])
    with pytest.raises(ValueError, match="image 1 was added twice"):
        ranks[0].finish("images")


def test_accumulators_refuse_what_does_not_fit(tmp_path):
    accumulator = FeatureAccumulator(PixelExtractor())
    accumulator.add(smooth_images(3, 0, size=8))
    accumulator.save(tmp_path / "pixels.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "pixels.pt").read_bytes()[:100])
    other = FeatureAccumulator(inception())
    for refused, message in (
        (lambda: accumulator.add(np.zeros((2, 8, 8, 3))), r"expected uint8 \(B, H, W, 3\)"),
        (lambda: accumulator.add(np.zeros((2, 3, 8, 8), np.uint8)), r"expected uint8 \(B, H, W, 3\)"),
        (lambda: accumulator.add(smooth_images(3, 0, size=4)), "images of 4x4 pixels after images of 8x8"),
        (lambda: accumulator.add(smooth_images(3, 0, size=8), [0, 1]), "2 indices for 3 images"),
        (lambda: accumulated(np.zeros((1, 72, 72, 3), np.uint8)), "5,184 pixels are too many; allowed: up to 4096"),
        (lambda: FeatureAccumulator(PixelExtractor(), batch_size=0), "batch_size is 0"),
        (lambda: other.merge(accumulator), "cannot be merged"),
        (lambda: other.load(tmp_path / "pixels.pt"), "holds features of pixels"),
        (lambda: accumulator.load(tmp_path / "cut.pt"), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert len(accumulator) == 3


def test_statistics_alone_do_not_keep_features():
    found = accumulated(smooth_images(30, 0, size=8), keep_features=False)
    assert found.features is None
    np.testing.assert_allclose(found.pool.mu, pixels(smooth_images(30, 0, size=8)).mean(0), atol=1e-6)
    some = accumulated(smooth_images(30, 0, size=8), keep_features={3, 20, 7}, batch_size=4)
    np.testing.assert_allclose(some.features, pixels(smooth_images(30, 0, size=8))[[3, 7, 20]], atol=1e-6)


def test_statistics_of_a_file_go_before_its_images(tmp_path):
    # As in ADM's reference batches: statistics of the whole data set, some images of it.
    images, _ = digits()
    real = to_uint8(images)
    whole = accumulated(real)
    save_statistics(tmp_path / "whole.npz", whole.pool, None, len(real))
    write(tmp_path / "reference.npz", real[:100], mu=whole.pool.mu, sigma=whole.pool.sigma)
    samples = write(tmp_path / "samples.npz", real[500:900])
    alone, beside = (
        evaluate(samples, tmp_path / f"{name}.npz", make_extractor=PixelExtractor) for name in ("whole", "reference")
    )
    assert alone["metrics"] == {"fid": beside["metrics"]["fid"]}
    assert alone["not_computed"]["recall"].endswith("whole.npz holds only statistics, no images")
    assert beside["metrics"].keys() == {"fid", "precision", "recall", "kid", "kid_std"}
    assert beside["reference"]["num_features"] == 100
    expected = evaluate(accumulated(real[500:900]), accumulated(real[:100]))["metrics"]
    assert beside["metrics"]["precision"] == expected["precision"]
    assert beside["metrics"]["fid"] != expected["fid"]


def test_no_network_is_needed_for_statistics(tmp_path):
    found = accumulated(smooth_images(30, 0, size=8))
    save_statistics(tmp_path / "a.npz", found.pool, found.pool, 30)

    def make_extractor():
        raise AssertionError("nothing is to be read")

    report = evaluate(tmp_path / "a.npz", tmp_path / "a.npz", make_extractor=make_extractor)
    assert report["metrics"] == {"fid": pytest.approx(0, abs=1e-6), "sfid": pytest.approx(0, abs=1e-6)}
    assert report["features"] is None


def test_a_large_reference_is_thinned_for_precision_and_recall(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "REFERENCE_FEATURES", 20)
    reference = write(tmp_path / "reference.npz", smooth_images(50, 1, size=8))
    samples = write(tmp_path / "samples.npz", smooth_images(50, 0, size=8))
    report = evaluate(samples, reference, make_extractor=PixelExtractor)
    assert report["reference"]["num_features"] == 20
    assert report["reference"]["statistics_of"] == 50
    assert report["samples"]["num_features"] == 50


def test_what_cannot_be_computed_is_said(tmp_path):
    samples = accumulated(smooth_images(30, 0, size=8))
    missing = evaluate(samples, accumulated(smooth_images(3, 1, size=8)))["not_computed"]
    assert missing == {
        "sfid": "these features have no part for sFID",
        "inception_score": "these features have no class probabilities",
        "precision": "reference: 3 images; 4 or more are needed",
        "recall": "reference: 3 images; 4 or more are needed",
    }
    narrow = replace(accumulated(smooth_images(30, 0, size=4)), size=None)
    other = replace(samples, extractor={"name": "inception", "sha256": "abc"})
    for arguments, message in (
        ((samples,), "fid cannot be computed: no reference is given; "),
        ((accumulated(smooth_images(1, 0, size=8)), samples), "fid cannot be computed: samples: 1 image; 2 or more"),
        ((samples, narrow, ["fid"]), "samples have 64 features, the reference 16"),
        ((other, samples), "samples have features of abc, the reference of pixels"),
        ((samples, samples, ["is"]), "metric 'is' does not exist; allowed: fid, sfid, inception_score"),
        ((samples, samples, []), "no metrics are asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(*arguments)


def test_only_what_is_asked_for_is_computed():
    samples, reference = accumulated(smooth_images(30, 0, size=8)), accumulated(smooth_images(30, 1, size=8))
    whole = evaluate(samples, reference)["metrics"]
    for name in ("fid", "precision", "recall"):
        report = evaluate(samples, reference, [name])
        assert (report["metrics"], report["not_computed"]) == ({name: whole[name]}, {})


@pytest.mark.slow
def test_doubts_are_warned_of_and_broken_weights_refused():
    with pytest.warns(UserWarning, match="no published score was computed with it"):
        extractor = InceptionExtractor(weights_file())
    assert extractor.description["published_weights"] is False
    found = accumulated(smooth_images(3, 0), extractor)
    size, few = "samples have 32x32 pixels, the reference 16x16", "FID of 3 images \\(samples\\) is far too high"
    with pytest.warns(UserWarning, match=size), pytest.warns(UserWarning, match=few):
        scoring._warn_of_doubts(found, replace(found, size=(16, 16)), True)
    extractor.network.Conv2d_1a_3x3.conv.weight.mul_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        FeatureAccumulator(extractor).add(smooth_images(2, 0))
