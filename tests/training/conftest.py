"""A latent cache with features for REPA, made once."""

import pytest
from latent_cases import PatchMeanFeatures, encode, make_images


@pytest.fixture(scope="session")
def latent_cache(tmp_path_factory):
    """4 x 2 x 2 latents of 24 images of 2 classes, 16 features of 3 numbers each."""
    folder = tmp_path_factory.mktemp("cache")
    images = make_images(folder / "images", {"a": 14, "b": 10})
    encode(images, folder / "latents", repa_encoder=PatchMeanFeatures())
    return folder / "latents"
