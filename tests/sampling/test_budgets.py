"""Settings for a budget: the table, what is chosen from it, and that it keeps what it promises."""

from dataclasses import replace

import pytest
import torch

from benchmarks.report.files import FOLDER
from ddt_fast.config import SamplingConfig
from ddt_fast.files import read_json
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.model.weights import load_model
from ddt_fast.presets import PRESETS
from ddt_fast.sampling import SamplingPlan, sample
from ddt_fast.sampling.budgets import budget_table, fast_settings, settings_within
from ddt_fast.sampling.noise import seeded_noise
from golden_data import relative_error

XL2 = PRESETS["xl2_256"]


def within(tflop: float, **settings) -> tuple[SamplingConfig, str]:
    return settings_within(replace(XL2.sampling, **settings), XL2.model, 32, 32, tflop)


def test_the_table_is_what_was_measured():
    record = read_json(FOLDER / "pareto.json")
    assert budget_table()["rows"] == record["budgets"]
    assert record["environment"]["commit"][:12] in budget_table()["evidence"]


@pytest.mark.parametrize(("tflop", "error", "median"), [(10, 0.0008, 0.0005), (5, 0.010, 0.0045)])
def test_what_the_budgets_reach(tflop, error, median):
    config, words = within(tflop)
    cost = SamplingPlan.from_config(config).flops(XL2.model, 32, 32) / 1e12
    assert 0.85 * tflop < cost <= tflop
    (row,) = (
        row
        for row in budget_table()["rows"]
        if (row["guidance_scale"], row["num_steps"], row["order"]) == (2, config.num_steps, config.order)
    )
    assert row["error"] <= error
    assert row["error_median"] <= median
    assert f"{config.num_steps} steps of solver pec, order {config.order}, with an edge at 0.3" in words
    assert f"{cost:.3g} TFLOP an image" in words
    assert "256 samples, benchmarks.pareto, commit" in words


def test_more_money_buys_more_and_fast_is_what_ten_buy():
    chosen = [within(tflop)[0] for tflop in (3, 5, 10, 20, 40, 1000)]
    assert [config.num_steps for config in chosen] == sorted({config.num_steps for config in chosen})
    assert fast_settings(XL2.sampling) == chosen[2]
    assert SamplingPlan.from_config(fast_settings(XL2.sampling)).flops(XL2.model, 32, 32) < 10e12
    kept = fast_settings(SamplingConfig(solver="lms", order=4, guidance_scale=3.0, refresh_steps=(0, 7), timeshift=2.0))
    assert (kept.guidance_scale, kept.timeshift, kept.refresh_steps) == (3.0, 2.0, None)


def test_strong_guidance_and_none_have_choices_of_their_own():
    strong, plain = within(7.5, guidance_scale=4.0)[0], within(7.5)[0]
    assert (strong.order, plain.order) == (2, 3)
    config, words = within(7.5, guidance_scale=1.0)
    assert config.num_steps > plain.num_steps
    assert "edge" not in words
    with pytest.raises(ValueError, match=r"budget is 1 TFLOP an image; allowed: 1\.\d+ or more with this model"):
        within(1)


@pytest.mark.slow
def test_fast_is_nearer_to_the_solution_than_the_published_run():
    model, labels = load_model(EMBEDDED_CHECKPOINT), torch.arange(10)
    noise, _ = seeded_noise(range(10), (1, 8, 8))
    published = replace(XL2.sampling)
    truth, fast, slow = (
        sample(model, noise, labels, config)
        for config in (replace(published, solver="pec", order=3, num_steps=100), fast_settings(published), published)
    )
    assert 0 < 5 * relative_error(fast, truth) < relative_error(slow, truth)
