"""What a first run on one's own data must be told before it starts."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from tiny_runs import latents

from ddt_fast.training.loop import train

CPU = torch.device("cpu")


def test_a_missing_autoencoder_is_said_before_anything_is_trained_or_removed(latent_cache, tmp_path):
    train(latents(latent_cache, 1), tmp_path, CPU)
    experiment = latents(latent_cache, 1, sample_every=1)
    experiment = replace(experiment, data=replace(experiment.data, autoencoder=str(tmp_path)))
    message = r"could not be loaded: .*; wanted a local folder of .*; or train without .* --training.sample_every 0"
    with pytest.raises(ValueError, match=message):
        train(experiment, tmp_path, CPU)
    assert (tmp_path / "model").is_dir()


def test_classes_without_data_are_warned_of(latent_cache, tmp_path):
    experiment = latents(latent_cache, 1)
    more = replace(experiment, model=replace(experiment.model, num_classes=3))
    with pytest.warns(UserWarning, match="holds 2 classes, num_classes is 3: the others are never trained"):
        train(more, tmp_path / "three", CPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(experiment, tmp_path / "two", CPU)
    assert not [warning for warning in caught if "num_classes" in str(warning.message)]
