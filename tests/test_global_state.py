"""The functions leave torch's global state, and the caller's random numbers, as they were."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ddt_fast
from ddt_fast.presets import PRESETS


@pytest.fixture
def unusual_cudnn(monkeypatch):
    """(benchmark, deterministic) as no function would set them."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    return True, False


def cudnn():
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic


def test_generate_is_deterministic_and_leaves_cudnn_as_it_was(tmp_path, unusual_cudnn):
    within = []

    def look_and_stop_the_second(*_):
        within.append(cudnn())
        if len(within) == 2:
            raise RuntimeError("stopped")

    settings = {"draws": ddt_fast.Draws(num_images=4), "sampling": ddt_fast.SamplingConfig(num_steps=2)}
    ddt_fast.generate(output_dir=tmp_path / "a", on_images=look_and_stop_the_second, **settings)
    assert cudnn() == unusual_cudnn
    with pytest.raises(RuntimeError, match="stopped"):
        ddt_fast.generate(output_dir=tmp_path / "b", on_images=look_and_stop_the_second, **settings)
    assert within == [(False, True)] * 2
    assert cudnn() == unusual_cudnn
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        ddt_fast.generate(output_dir=tmp_path / "c", engine=ddt_fast.Engine(device="gpu"))
    assert cudnn() == unusual_cudnn


def next_random():
    """The numbers that a caller would draw next."""
    with torch.random.fork_rng(devices=[]):
        drawn = torch.rand(2).tolist()
    state = np.random.get_state()  # noqa: NPY002
    drawn += np.random.rand(2).tolist()  # noqa: NPY002
    np.random.set_state(state)  # noqa: NPY002
    return drawn


@pytest.mark.slow
def test_training_leaves_the_callers_random_numbers(tmp_path):
    digits = PRESETS["digits"]
    training = replace(digits.training, max_steps=2, batch_size=16, sample_images=10, score_samples=0)
    quick = replace(digits, training=training, sampling=replace(digits.sampling, num_steps=2))
    torch.manual_seed(5)
    before = next_random()
    ddt_fast.train_model(quick, tmp_path / "a", device="cpu")
    assert next_random() == before
    lost = replace(quick, training=replace(training, learning_rate=1e30, max_grad_norm=None))
    with pytest.raises(ValueError, match=r"is nan|is inf"):
        ddt_fast.train_model(lost, tmp_path / "b", device="cpu")
    assert next_random() == before
