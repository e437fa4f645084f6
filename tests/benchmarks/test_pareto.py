"""`python -m benchmarks.pareto`: its grid, a small run from end to end, and its answers to mistakes."""

import json

import pytest
from PIL import Image

from benchmarks import pareto, pareto_settings
from benchmarks.fronts import front, recommend
from ddt_fast.command import run_command
from ddt_fast.sampling import SamplingPlan
from ddt_fast.sampling.fast import fast_settings

SMALL = ["--steps", "10", "--screen-samples", "4", "--samples", "65", "--truth-steps", "25"]


def test_the_grid_spans_solvers_periods_and_forecasts():
    configs = list(pareto.grid(pareto.STEPS))
    assert len(set(configs)) == len(configs)
    assert {(c.solver, c.order) for c in configs} == {("euler", 2), ("lms", 2), ("lms", 3), ("lms", 4)}
    assert {c.state_forecast for c in configs} == {"hold", "linear", "quadratic"}
    assert {c.guidance_forecast for c in configs} == {"hold", "linear"}
    assert {c.refresh_every for c in configs} == {c.guidance_every for c in configs} == {1, *pareto_settings.PERIODS}
    assert all(c.num_steps >= 5 * max(c.refresh_every, c.guidance_every) or c.num_steps == 1 for c in configs)


def test_guidance_sets_in_midway_between_two_steps_of_the_grid():
    for steps in (steps for steps in pareto.STEPS if steps != 10):
        plan = SamplingPlan.from_config(next(pareto.grid([steps])))
        first = next(i for i, step in enumerate(plan.steps) if step.guided)
        assert plan.steps[first - 1].t + plan.steps[first].t == pytest.approx(0.6)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pareto")
    with pytest.MonkeyPatch.context() as patch:
        # Without the long ones among the settings that people run.
        named = {"published": pareto_settings.PUBLISHED, "fast": fast_settings(pareto_settings.PUBLISHED)}
        short = [(name, pareto.replace(config, num_steps=15)) for name, config in named.items()]
        patch.setattr(pareto, "named", lambda: iter(short))
        patch.setattr(pareto, "INTERVALS", ((0.3, 1.0), (0.5, 1.0)))
        patch.setattr(pareto, "NEAR", 1.0)
        pareto.main([*SMALL, "--output-dir", str(folder)])
    return folder


def test_a_small_run_writes_what_it_measured(small):
    record = json.loads((small / "pareto.json").read_text())
    assert (record["samples"], record["screen_samples"], record["guidance_scale"]) == (65, 4, 2.0)
    assert len(record["environment"]["commit"]) == 40
    assert 0 < record["truth"]["own_error"] < 0.1
    points = record["points"]
    assert len(points) == len(list(pareto.grid([10]))) + 2
    assert [p["name"] for p in points if "name" in p] == ["published", "fast"]
    # A run of everything at few steps is off; the truth is not far from a run of somewhat more steps.
    finalists = {i: p for i, p in enumerate(points) if "error" in p}
    assert 2 < len(finalists) < len(points)
    assert all(1e-4 < p["error"] < 1 and 0.5 <= p["accuracy"] <= 1 for p in finalists.values())
    assert all(0 < p["error_median"] < p["error_p90"] < 1 for p in finalists.values())
    everything = next(p for p in points if p["settings"]["solver"] == "lms" and p["network_evaluations"] == 16)
    assert everything["tflop_xl2"] == pytest.approx(4.207, abs=1e-3)
    numbers = list(finalists)
    costs = [finalists[i]["tflop_xl2"] for i in numbers]
    for loss in ("error", "error_median", "error_p90", "frechet"):
        losses = [finalists[i][loss] for i in numbers]
        assert record["fronts"][f"{loss} over tflop_xl2"] == [numbers[i] for i in front(costs, losses)]
    assert {row["by"] for row in record["recommended"]} == {"error", "error_median", "error_p90"}
    for row in record["recommended"]:
        errors = [finalists[i][row["by"]] for i in numbers]
        found = recommend(costs, errors, row["budget_tflop_xl2"], pareto.TOLERANCE)
        assert found is not None
        assert row["point"] == numbers[found]
    better = {points[row["point"]]["name"]: row["cheapest"] for row in record["better_than_named"]}
    assert better.keys() == {"published", "fast"}
    # A multistep solver with a shortcut beats Euler with 15 steps by far.
    assert better["published"] is not None
    cheapest, published = points[better["published"]], next(p for p in points if p.get("name") == "published")
    assert cheapest["tflop_xl2"] < published["tflop_xl2"]
    assert all(cheapest[name] <= published[name] for name in ("error", "error_median", "error_p90"))
    assert [p["settings"]["guidance_interval"] for p in record["intervals"]] == [[0.3, 1], [0.5, 1]] * 2
    assert all("error" not in p and "frechet" in p for p in record["intervals"])
    # A later interval costs less.
    assert record["intervals"][1]["tflop_xl2"] < record["intervals"][0]["tflop_xl2"]
    with Image.open(small / "pareto.png") as picture:
        assert picture.width > 1000


def test_files_stay_short(small):
    assert len((small / "pareto.json").read_text().splitlines()) < 150


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps is 0; allowed: a whole number, 1 or more"),
        (["--samples", "64"], "--samples is 64; allowed: a whole number, 65 or more"),
        (["--screen-samples", "0"], "--screen-samples is 0"),
        (["--steps", "50", "--truth-steps", "50"], "--truth-steps is 50; allowed: a whole number, 51 or more"),
        (["--steps", "many"], "many"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: pareto.main([*arguments, "--output-dir", str(tmp_path / "new")]))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
