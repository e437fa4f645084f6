"""What benchmarks of sampling settings share: runs of the digits model, their errors, and samples that are kept."""

import pytest
import torch

from benchmarks import digits_runs
from benchmarks.digits_runs import DigitsRuns, digits_model, kept_samples, sample_errors
from ddt_fast import SamplingConfig
from ddt_fast.sampling import sample

CONFIG = SamplingConfig(num_steps=2, guidance_scale=1.0, last_step=None)


def test_errors_are_of_all_samples_and_of_each():
    truth = torch.ones(11, 1, 8, 8)
    samples = truth.clone()
    # The first ten are off by 1% to 10%, the last goes another way.
    samples[:10] += torch.arange(1, 11).reshape(10, 1, 1, 1) / 100
    samples[10] = -1
    errors = sample_errors(samples, truth)
    assert errors.error_median == pytest.approx(0.06)
    assert errors.error_p90 == pytest.approx(0.10)
    assert errors.error == pytest.approx(((sum(i**2 for i in range(1, 11)) / 1e4 + 4) / 11) ** 0.5)


def test_batches_are_the_run(monkeypatch):
    monkeypatch.setattr(digits_runs, "BATCH", 4)
    runs = DigitsRuns(digits_model(), 10)
    expected = sample(runs.model, runs.noise, runs.labels, CONFIG)
    torch.testing.assert_close(runs(CONFIG), expected, rtol=1e-4, atol=1e-5)


def test_samples_that_are_kept_are_not_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_runs, "BATCH", 4)
    model = digits_model()
    first = DigitsRuns(model, 10, tmp_path)(CONFIG)
    assert len(list(tmp_path.iterdir())) == 3
    again = DigitsRuns(model, 10, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(digits_runs, "Sampler", None)
        assert torch.equal(again(CONFIG), first)
        with pytest.raises(TypeError):
            again(SamplingConfig(num_steps=3, guidance_scale=1.0, last_step=None))
    # What was stopped within a run goes on with the batch that is missing.
    next(tmp_path.glob("*_4_8.safetensors")).unlink()
    assert torch.equal(again(CONFIG), first)


def test_samples_are_kept_by_the_code_that_drew_them(tmp_path, monkeypatch):
    assert kept_samples(None) is None
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    for name in ("__init__.py", "part/code.py"):
        (package / name).write_text("first")
    monkeypatch.setattr(digits_runs.ddt_kernels, "__file__", str(package / "__init__.py"))
    folder = tmp_path / "keep"
    first = kept_samples(str(folder))
    assert first is not None
    assert first.is_dir()
    assert first.parent == folder
    assert kept_samples(str(folder)) == first
    (package / "part" / "code.py").write_text("second")
    second = kept_samples(str(folder))
    assert second != first
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert kept_samples(str(folder)) not in (first, second)
