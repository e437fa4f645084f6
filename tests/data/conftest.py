"""An image folder and its latent cache, made once; tests copy what they change."""

import shutil

import pytest
from latent_cases import PatchMeanFeatures, encode, make_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """26 images of 3 classes, two of them broken."""
    root = make_images(tmp_path_factory.mktemp("images") / "images", {"a": 7, "b": 9, "c": 10})
    (root / "a" / "002.png").write_bytes((root / "a" / "002.png").read_bytes()[:300])
    (root / "c" / "000.png").write_text("not an image")
    return root


@pytest.fixture(scope="session")
def unbroken(images, tmp_path_factory):
    """What a run that nothing stops writes, in 4 shards: latents and features, mirrored ones too."""
    output = tmp_path_factory.mktemp("unbroken") / "cache"
    encode(images, output, repa_encoder=PatchMeanFeatures())
    return output


@pytest.fixture
def cache(unbroken, tmp_path):
    """A copy of it."""
    return shutil.copytree(unbroken, tmp_path / "cache")
