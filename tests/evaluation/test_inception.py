"""The Inception network: against torch-fidelity's with the same random weights, and by its own properties."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from independent_metrics import independent
from torch import nn

from ddt_fast.evaluation import inception_weights
from ddt_fast.evaluation.features import InceptionExtractor
from ddt_fast.evaluation.inception import Inception, resize
from ddt_fast.evaluation.inception_weights import load_inception
from golden_data import relative_error
from inception_cases import random_weights, smooth_images, weights_file

pytestmark = pytest.mark.filterwarnings("ignore:.*no published score")


@pytest.fixture(scope="module")
def network():
    found = Inception()
    found.load_state_dict(random_weights())
    return found


def images_of(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_every_tensor_is_that_of_torch_fidelity(network):
    module = independent("torch_fidelity.feature_extractor_inceptionv3")
    names = ["64", "192", "768", "2048", "logits_unbiased", "logits"]
    theirs = module.FeatureExtractorInceptionV3("test", names, feature_extractor_weights_path=weights_file())
    ours, expected = {}, {}

    def keep(into, name):
        return lambda _module, _inputs, output: into.update({name: output.clone()})

    for into, of in ((ours, network), (expected, theirs)):
        for name, child in of.named_modules():
            if child is not of and (name.startswith(("Mixed", "Conv2d"))) and not name.endswith((".conv", ".bn")):
                child.register_forward_hook(keep(into, name))
    images = images_of((24, 40))
    with torch.no_grad():
        output = network(images)
        features = dict(zip(names, theirs(images), strict=True))
    assert ours.keys() == expected.keys()
    assert len(ours) == 94 + 11  # convolutions, blocks
    for name, tensor in expected.items():
        assert relative_error(ours[name], tensor) < 1e-6, name
    assert relative_error(output.pool, features["2048"]) < 1e-6
    assert relative_error(network.probabilities(output.pool), features["logits_unbiased"].softmax(1)) < 1e-6
    # ADM takes mixed_6/conv[..., :7] of a (row, column, channel) tensor and flattens it.
    spatial = expected["Mixed_6d.branch1x1"].permute(0, 2, 3, 1)[..., :7].reshape(len(images), -1)
    assert relative_error(output.spatial, spatial) < 1e-6


@pytest.mark.parametrize("size", [(8, 8), (32, 64), (299, 299), (500, 256)])
def test_resize_is_that_of_torch_fidelity(size):
    module = independent("torch_fidelity.interpolate_compat_tensorflow")
    images = images_of(size).float()
    theirs = module.interpolate_bilinear_2d_like_tensorflow1x(images, (299, 299), align_corners=False)
    assert torch.equal(resize(images), theirs)


def test_quirks_of_the_graph(network):
    row = torch.tensor([0.0, 10.0]).expand(1, 1, 2, 2)
    # No half-pixel centres: output i lies at i / 2: 0, 0.5, 1 and 1.5, the last beyond the last pixel.
    assert resize(row, 4)[0, 0, 0].tolist() == [0, 5, 10, 10]
    seen = []
    handle = network.Mixed_6d.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
    output = network(images_of((32, 32), 3))
    handle.remove()
    assert (output.pool.shape, output.spatial.shape) == ((3, 2048), (3, 2023))
    # The spatial features are (row, column, channel): the first seven numbers are the channels of the first pixel.
    assert torch.equal(output.spatial[:, :7], seen[0][:, :7, 0, 0])
    assert torch.equal(output.spatial[:, 7:14], seen[0][:, :7, 0, 1])
    logits = output.pool @ network.fc.weight.T
    torch.testing.assert_close(network.probabilities(output.pool), logits.softmax(1))
    assert network.fc.bias.abs().max() > 1  # which would have changed them


@pytest.mark.slow
def test_folded_network_is_the_same_function(network):
    folded, weights = load_inception(weights_file())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not weights.published
    images = images_of((64, 64))
    for ours, expected in zip(folded(images), network(images), strict=True):
        assert relative_error(ours, expected) < 1e-5


@pytest.mark.slow
def test_features_do_not_depend_on_the_batch():
    extractor = InceptionExtractor(weights_file())
    images = torch.from_numpy(smooth_images(4, 0)).permute(0, 3, 1, 2)
    apart = [torch.cat(tensors) for tensors in zip(*map(extractor, images.split(3)), strict=True)]
    for ours, expected in zip(apart, extractor(images), strict=True):
        assert relative_error(ours, expected) < 1e-5


def test_images_must_be_uint8(network):
    for wrong in (torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, 3).byte(), torch.zeros(3, 8, 8).byte()):
        with pytest.raises(ValueError, match=r"expected uint8 \(B, 3, H, W\)"):
            network(wrong)


def test_weights_are_found_in_the_cache_under_either_name(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for name in ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"):
        link = tmp_path / "checkpoints" / name
        link.symlink_to(weights_file())
        assert load_inception()[1].path == link
        link.unlink()


def test_a_download_is_checked_and_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = {}

    def download(url, target, hash_prefix):
        asked.update(url=url, hash_prefix=hash_prefix)
        shutil.copy(weights_file(), target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    _, weights = load_inception()
    assert asked["hash_prefix"] == "6726825d"
    assert asked["url"].endswith("pt_inception-2015-12-05-6726825d.pth")
    assert weights.path == tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("fc.weight"), 'Missing key(s) in state_dict: "fc.weight"'),
        (lambda weights: weights.update(extra=torch.zeros(1)), 'Unexpected key(s) in state_dict: "extra"'),
        (lambda weights: weights.update({"fc.weight": torch.zeros(1000, 2048)}), "size mismatch for fc.weight"),
        (lambda weights: weights.update({"fc.bias": torch.full((1008,), torch.nan)}), "fc.bias has values that"),
    ],
)
def test_other_weights_are_refused(change, message):
    weights = dict(random_weights())
    change(weights)
    with torch.device("meta"):
        network = Inception()
    with pytest.raises(ValueError, match=re.escape(f"Inception weights w.pth do not fit: {message}")):
        inception_weights._load(network, weights, Path("w.pth"))


def test_files_that_are_not_weights(tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    torch.save({"fc.bias": 3}, tmp_path / "other.pth")
    for name, message in (
        ("text.pth", "cannot be read"),
        ("other.pth", "do not hold a state dict"),
        ("missing.pth", "does not exist"),
        ("", "is not a file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_inception(tmp_path / name)


def test_weights_without_batch_counts_load():
    network = Inception()
    weights = {name: value for name, value in random_weights().items() if not name.endswith("num_batches_tracked")}
    inception_weights._load(network, weights, Path("old.pth"))
    assert torch.equal(network.fc.weight, weights["fc.weight"])
