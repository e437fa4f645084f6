"""Pipelines of pixels and of latents, made once; tests change copies of their folders only."""

import shutil

import pytest

from ddt_fast.pipeline import DDTPipeline
from pipeline_cases import digits, latent_folder


@pytest.fixture(scope="session")
def pipe():
    """The pipeline of the digits in the package."""
    return digits()


@pytest.fixture(scope="session")
def latent_model(tmp_path_factory):
    """A model folder of latents, see `latent_folder`."""
    return latent_folder(tmp_path_factory.mktemp("latent"))


@pytest.fixture(scope="session")
def saved(pipe, latent_model, tmp_path_factory):
    """Saved pipelines: pixels/ and latents/."""
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder / "pixels")
    DDTPipeline.from_pretrained(latent_model).save_pretrained(folder / "latents")
    return folder


@pytest.fixture
def pixels(saved, tmp_path):
    """A copy of the saved pipeline of pixels."""
    return shutil.copytree(saved / "pixels", tmp_path / "pixels")


@pytest.fixture
def latents(saved, tmp_path):
    """A copy of the saved pipeline of latents."""
    return shutil.copytree(saved / "latents", tmp_path / "latents")
