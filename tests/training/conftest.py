"""What several tests continue from, made once."""

import shutil

import pytest
from latent_cases import PatchMeanFeatures, encode, make_images
from tiny_runs import CLIPPED, CPU, digits

from ddt_fast.training.loop import train


@pytest.fixture(scope="session")
def latent_cache(tmp_path_factory):
    """4 x 2 x 2 latents of 24 images of 2 classes, 16 features of 3 numbers each."""
    folder = tmp_path_factory.mktemp("cache")
    images = make_images(folder / "images", {"a": 14, "b": 10})
    encode(images, folder / "latents", repa_encoder=PatchMeanFeatures())
    return folder / "latents"


@pytest.fixture(scope="session")
def ten_steps(tmp_path_factory):
    """A finished run of 10 steps with checkpoints at 5 and 10; not to be changed."""
    folder = tmp_path_factory.mktemp("ten") / "run"
    train(digits(10, **CLIPPED), folder, CPU)
    return folder


@pytest.fixture
def ten(ten_steps, tmp_path):
    """A copy of that run."""
    return shutil.copytree(ten_steps, tmp_path / "ten")


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Plotting takes longer than the runs of these tests."""
    monkeypatch.setattr("ddt_fast.training.run.plot_runs", lambda logs, output: None)
