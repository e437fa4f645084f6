"""Errors by hand; small runs of `benchmarks.forecast`, `.pareto` and `.candidates`."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import candidates, forecast, pareto, sampler_errors
from benchmarks.report import tables
from benchmarks.report.tables import FORECAST_ROWS, SHORT
from benchmarks.sampler_errors import PUBLISHED, DigitsRuns, kept_samples, sample_errors, write_record
from ddt_fast import SamplingConfig
from ddt_fast.sampling import SamplingPlan, sample
from ddt_fast.work import tune_sampler

CONFIG = SamplingConfig(num_steps=2, guidance_scale=1.0, last_step=None)


def test_errors_are_of_all_samples_and_of_each():
    truth = torch.ones(11, 1, 8, 8)
    samples = truth.clone()
    # The first ten are off by 1% to 10%, the last goes another way.
    samples[:10] += torch.arange(1, 11).reshape(10, 1, 1, 1) / 100
    samples[10] = -1
    errors = sample_errors(samples, truth)
    assert errors["error_median"] == pytest.approx(0.06)
    assert errors["error_p90"] == pytest.approx(0.10)
    assert errors["error"] == pytest.approx(((sum(i**2 for i in range(1, 11)) / 1e4 + 4) / 11) ** 0.5)


def test_samples_are_drawn_in_batches_and_not_again_where_they_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sampler_errors, "BATCH", 4)
    runs = DigitsRuns(10, str(tmp_path))
    first = runs(CONFIG)
    expected = sample(runs.model, runs.noise, runs.labels, CONFIG)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr(sampler_errors, "Sampler", None)
        assert torch.equal(runs(CONFIG), first)
        with pytest.raises(TypeError):
            runs(replace(CONFIG, num_steps=3))
    # A run that was stopped continues with the batch that is missing.
    next(tmp_path.rglob("*_4_8.safetensors")).unlink()
    assert torch.equal(runs(CONFIG), first)


def test_samples_are_kept_by_the_code_that_drew_them(tmp_path, monkeypatch):
    assert kept_samples(None) is None
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    for name in ("__init__.py", "part/code.py"):
        (package / name).write_text("first")
    monkeypatch.setattr(sampler_errors.ddt_kernels, "__file__", str(package / "__init__.py"))
    folder = str(tmp_path / "keep")
    first = kept_samples(folder)
    assert kept_samples(folder) == first
    (package / "part" / "code.py").write_text("second")
    second = kept_samples(folder)
    assert second != first
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert kept_samples(folder) not in (first, second)


def test_records_are_short_json(tmp_path):
    record = {"environment": {"a": [1.5]}, "rows": [{"x": 1 / 3, "n": 123456}, {}], "none": [], "text": "é"}
    write_record(tmp_path / "a.json", record)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == record | {"rows": [{"x": 0.33333, "n": 123456}, {}]}
    assert len(text.splitlines()) == 9


def test_settings_compared():
    settings = [config for _, config in pareto.compared()]
    assert len(set(settings)) == len(settings)
    for name in ("Euler", "multistep 3"):  # guidance sets in midway between two steps
        for config in (config for series, config in pareto.compared() if series == name):
            steps = SamplingPlan.from_config(config).steps
            first = next(i for i, step in enumerate(steps) if step.guided)
            assert steps[first - 1].t + steps[first].t == pytest.approx(0.6)
    compared = dict(candidates.candidates())
    assert len(compared) == len(list(candidates.candidates())) == len(set(compared.values()))
    assert compared["Euler 250, published"] == PUBLISHED
    assert {*candidates.FRECHET_CANDIDATES, *SHORT} <= {*compared}
    guidance = (PUBLISHED.guidance_scale, PUBLISHED.guidance_interval)
    assert candidates.GUIDANCE[candidates.FRECHET_GUIDANCE] == guidance
    shown = {(group, series) for _, group, series, _ in FORECAST_ROWS if series != "everything"}
    assert shown <= {(group, series) for group, series, _, _ in forecast.settings()}


@pytest.mark.slow
def test_a_small_run_of_pareto(tmp_path, monkeypatch, capsys):
    names = ("multistep 3", "corrected 2", "corrected 3", "published")
    series = {name: (pareto.SERIES[name][0], (15,)) for name in names}
    monkeypatch.setattr(pareto, "SERIES", series)
    monkeypatch.setattr(pareto, "STEPS", (8, 15))
    monkeypatch.setattr(pareto, "FITTED_STEPS", (6,))
    monkeypatch.setattr(pareto, "BFLOAT16_STEPS", (8, 15))
    few = partial(pareto.fit_schedule, num_samples=24, guidance_scales=[2.0])
    monkeypatch.setattr(pareto, "fit_schedule", few)
    monkeypatch.setattr(tune_sampler, "_ITERATIONS", 8)
    monkeypatch.setattr(pareto, "BUDGET_SCALES", (2.0, 4.0))
    monkeypatch.setitem(pareto.NUMBERS, "--truth-steps", (40, 40, "enough for 15 steps"))
    monkeypatch.setattr(tables, "BUDGETS", (10.0, 15.0))
    pareto.main(["--samples", "65", "--truth-steps", "40", "--output-dir", str(tmp_path)])
    record = json.loads((tmp_path / "pareto.json").read_text())
    assert 0 < record["truth"]["own_error"] < 1e-3
    points = {point["series"]: point for point in record["points"]}
    assert points.keys() == series.keys()
    assert all(0 < p["error_median"] < p["error_p90"] < 1 and 0.5 <= p["accuracy"] <= 1 for p in points.values())
    # With the same evaluations, correction is nearer; a multistep solver is nearer than Euler by far.
    assert points["corrected 3"]["error"] < points["multistep 3"]["error"] / 2 < points["published"]["error"] / 4
    rows = {(row["guidance_scale"], row["num_steps"], row["order"]): row["error"] for row in record["budgets"]}
    assert len(rows) == len(pareto.BUDGET_SCALES) * 2 * 2
    assert all(rows[scale, 15, 2] < rows[scale, 8, 2] for scale in pareto.BUDGET_SCALES)
    assert rows[4.0, 15, 2] < rows[4.0, 15, 3]
    assert pareto.budget_table(record)["rows"] == record["budgets"]
    assert all(row["error"] > rows[2.0, row["num_steps"], 3] for row in record["bfloat16"])
    (fitted,) = record["fitted"]
    assert fitted["fitted"]["error_median"] < 0.8 * fitted["rule"]["error_median"]
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    assert "For a budget, the least error of all" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_run_of_candidates(tmp_path, monkeypatch, capsys):
    settings = dict(candidates.candidates())
    names = ("Euler 250, published", "multistep 3, 35, K 2 quadratic")
    short = [(name, replace(settings[name], num_steps=n)) for n, name in zip((3, 6), names, strict=True)]
    monkeypatch.setattr(candidates, "candidates", lambda: iter(short))
    monkeypatch.setattr(candidates, "GUIDANCE", {"none": (1.0, (0.0, 1.0)), "2 in (0.3, 1)": (2.0, (0.3, 1.0))})
    monkeypatch.setattr(candidates, "TRUTH", replace(candidates.TRUTH, num_steps=16))
    monkeypatch.setattr(candidates, "FRECHET_REFERENCE", ("fine", replace(candidates.TRUTH, num_steps=12)))
    monkeypatch.setattr(candidates, "FRECHET_CANDIDATES", names)
    candidates.main(["--samples", "8", "--frechet-samples", "650", "--output-dir", str(tmp_path)])
    record = json.loads((tmp_path / "candidates.json").read_text())
    rows = {(row["guidance"], row["candidate"]): row for row in record["errors"]}
    for guidance in ("none", "2 in (0.3, 1)"):
        coarse, fine = (rows[guidance, name] for name in names)
        assert 1e-4 < fine["error_median"] < coarse["error_median"] < 0.5
    assert rows["none", names[0]]["tflop_xl2"] < rows["2 in (0.3, 1)", names[0]]["tflop_xl2"]
    reference, coarse, fine = record["frechet"]
    assert abs(fine["difference"]) < abs(coarse["difference"])
    # The same seeds: of the difference far more is known than of the distance.
    assert 0 < fine["difference_sd"] < reference["frechet_sd"]
    assert "Pixel Fréchet distance of 650 samples" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_run_of_forecast(tmp_path, monkeypatch):
    chosen = [
        (*s[:3], replace(s[3], num_steps=25)) for s in forecast.settings() if s[0] == "guidance scale" and s[2] == 2
    ]
    monkeypatch.setattr(forecast, "settings", lambda: iter(chosen))
    forecast.main(["--num-samples", "65", "--output-dir", str(tmp_path)])
    everything, held, linear = json.loads((tmp_path / "forecast.json").read_text())["results"]
    assert (everything["series"], everything["error"]) == ("everything", 0)
    assert [row["series"] for row in (held, linear)] == ["hold K 2", "K 6, M 10, linear"]
    assert 0 < held["error_median"] < linear["error_median"] < 0.5
    assert (tmp_path / "forecast.png").is_file()
