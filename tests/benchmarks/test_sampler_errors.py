"""Errors, fronts and recommendations by hand; small runs of `benchmarks.forecast`, `.pareto` and `.candidates`."""

import json
import random
from dataclasses import replace

import pytest
import torch

from benchmarks import candidates, forecast, pareto, sampler_errors
from benchmarks.pareto import dominating, front, recommend
from benchmarks.report.tables import FORECAST_ROWS, MEASURES, SHORT
from benchmarks.sampler_errors import PUBLISHED, DigitsRuns, kept_samples, sample_errors, write_record
from ddt_fast import SamplingConfig
from ddt_fast.sampling import SamplingPlan, sample
from ddt_fast.sampling.fast import fast_settings

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


def points(seed, size, span):
    generator = random.Random(seed)
    return [generator.randint(1, span) for _ in range(size)], [generator.randint(1, span) / 3 for _ in range(size)]


CASES = [points(*case) for case in ((0, 1, 12), (1, 5, 12), (2, 60, 5), (3, 60, 20), (4, 100, 1000))]


def beats(costs, losses, i, j):
    return costs[i] <= costs[j] and losses[i] <= losses[j] and (costs[i], losses[i]) != (costs[j], losses[j])


@pytest.mark.parametrize(("costs", "losses"), CASES)
def test_fronts_and_recommendations_against_brute_force(costs, losses):
    numbers = range(len(costs))
    pairs = list(zip(costs, losses, strict=True))
    edge = front(costs, losses)
    # Of equal points the first stands for all.
    unbeaten = [j for j in numbers if not any(beats(costs, losses, i, j) for i in numbers)]
    assert sorted(edge) == [j for j in unbeaten if pairs.index(pairs[j]) == j]
    assert [costs[i] for i in edge] == sorted({costs[i] for i in unbeaten})
    near = front(costs, losses, 1.3)
    assert set(edge) <= set(near)
    for j in set(numbers) - set(edge):
        cheaper = [losses[i] for i in numbers if pairs[i] < pairs[j]]
        if cheaper and losses[j] != min(cheaper):
            assert (j in near) == (losses[j] < 1.3 * min(cheaper))
        assert dominating(costs, losses, j) == {i for i in numbers if beats(costs, losses, i, j)}
    for budget in sorted(set(costs)):
        affordable = [i for i in numbers if costs[i] <= budget]
        enough = [i for i in affordable if losses[i] <= 1.5 * min(losses[j] for j in affordable)]
        chosen = recommend(costs, losses, budget, 1.5)
        assert chosen in enough
        assert costs[chosen] == min(costs[i] for i in enough)


def test_a_tolerance_spares_what_the_last_percent_costs():
    costs, losses = [1.0, 2.0, 50.0], [0.5, 0.101, 0.1]
    assert [recommend(costs, losses, budget, 1.1) for budget in (0.5, 1, 2, 100)] == [None, 0, 1, 1]
    assert recommend(costs, losses, 100, 1.0) == 2


def test_settings_compared():
    grid = list(pareto.grid(pareto.STEPS))
    assert len(set(grid)) == len(grid)
    assert {(c.solver, c.order) for c in grid} == set(pareto.SOLVERS)
    assert {c.state_forecast for c in grid} == {"hold", "linear", "quadratic"}
    assert {c.refresh_every for c in grid} == {c.guidance_every for c in grid} == {1, *pareto.PERIODS}
    for steps in pareto.STEPS[1:]:  # guidance sets in midway between two steps
        plan = SamplingPlan.from_config(next(pareto.grid([steps])))
        first = next(i for i, step in enumerate(plan.steps) if step.guided)
        assert plan.steps[first - 1].t + plan.steps[first].t == pytest.approx(0.6)
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
    # Without the long ones among the settings that people run.
    named = {"published": PUBLISHED, "fast": fast_settings(PUBLISHED)}
    short = [(name, replace(config, num_steps=15)) for name, config in named.items()]
    monkeypatch.setattr(pareto, "named", lambda: iter(short))
    monkeypatch.setattr(pareto, "INTERVALS", ((0.3, 1.0), (0.5, 1.0)))
    monkeypatch.setattr(pareto, "NEAR", 1.0)
    counts = ["--steps", "10", "--screen-samples", "4", "--samples", "65", "--truth-steps", "25"]
    pareto.main([*counts, "--output-dir", str(tmp_path)])
    record = json.loads((tmp_path / "pareto.json").read_text())
    assert 0 < record["truth"]["own_error"] < 0.1
    points = record["points"]
    assert len(points) == len(list(pareto.grid([10]))) + 2
    assert [p["name"] for p in points if "name" in p] == ["published", "fast"]
    finalists = {i: p for i, p in enumerate(points) if "error" in p}
    assert 2 < len(finalists) < len(points)
    assert all(1e-4 < p["error"] < 1 and 0.5 <= p["accuracy"] <= 1 for p in finalists.values())
    assert all(0 < p["error_median"] < p["error_p90"] < 1 for p in finalists.values())
    numbers, by_cost = list(finalists), [p["tflop_xl2"] for p in finalists.values()]
    losses = {name: [p[name] for p in finalists.values()] for name in (*MEASURES, "frechet")}
    for name, values in losses.items():
        assert record["fronts"][f"{name} over tflop_xl2"] == [numbers[i] for i in front(by_cost, values)]
    assert {row["by"] for row in record["recommended"]} == MEASURES.keys()
    for row in record["recommended"]:
        best = recommend(by_cost, losses[row["by"]], row["budget_tflop_xl2"], pareto.TOLERANCE)
        assert row["point"] == numbers[best]
    better = {points[row["point"]]["name"]: row["cheapest"] for row in record["better_than_named"]}
    # A multistep solver with a shortcut beats Euler with 15 steps by far.
    cheapest, published = points[better["published"]], next(p for p in points if p.get("name") == "published")
    assert cheapest["tflop_xl2"] < published["tflop_xl2"]
    assert all(cheapest[name] <= published[name] for name in ("error", "error_median", "error_p90"))
    assert [p["settings"]["guidance_interval"] for p in record["intervals"]] == [[0.3, 1], [0.5, 1]] * 2
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    assert "Recommended for a budget" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_run_of_candidates(tmp_path, monkeypatch, capsys):
    settings = dict(candidates.candidates())
    names = ("Euler 250, published", "multistep 3, 35, K 2 quadratic")
    short = [(name, replace(settings[name], num_steps=n)) for n, name in zip((4, 8), names, strict=True)]
    monkeypatch.setattr(candidates, "candidates", lambda: iter(short))
    monkeypatch.setattr(candidates, "GUIDANCE", {"none": (1.0, (0.0, 1.0)), "2 in (0.3, 1)": (2.0, (0.3, 1.0))})
    monkeypatch.setattr(candidates, "TRUTH", replace(candidates.TRUTH, num_steps=15))
    monkeypatch.setattr(candidates, "FRECHET_REFERENCE", ("fine", replace(candidates.TRUTH, num_steps=10)))
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
    chosen = [s for s in forecast.settings() if s[0] == "steps" and s[2] == 25]
    monkeypatch.setattr(forecast, "settings", lambda: iter(chosen))
    forecast.main(["--num-samples", "65", "--output-dir", str(tmp_path)])
    everything, *rows = json.loads((tmp_path / "forecast.json").read_text())["results"]
    assert (everything["series"], everything["error"]) == ("everything", 0)
    assert [row["series"] for row in rows] == ["hold K 2", "hold K 6", "--fast"]
    held, rare, fast = (row["error_median"] for row in rows)
    assert 0 < held < rare
    assert 0 < fast < rare
    assert (tmp_path / "forecast.png").is_file()
