"""The CPU benchmark on a tiny model: it counts and composes what the engine runs, and times nothing that is wrong."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import golden_data as golden
from benchmarks import cpu_sampling
from benchmarks.cpu_sampling import (
    PUBLISHED,
    SETTINGS,
    SamplingRuns,
    StepCosts,
    composed,
    measure_forward,
    published_run,
)
from benchmarks.harness import timing
from ddt_fast.model import FusedDDT
from ddt_fast.model.quantization import quantize_int8
from ddt_fast.sampling import Sampler

SIZE = 8


@pytest.mark.parametrize("setting", SETTINGS)
def test_parts_are_all_that_a_run_does(setting):
    model = FusedDDT.from_reference(golden.model("tiny_h48_d24"))
    noise, labels = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    costs = StepCosts(Sampler(model, SETTINGS[setting], 1, SIZE, SIZE), noise, labels)
    plan = costs.sampler.plan
    assert sum(costs.counts.values()) == len(plan.steps) + 1
    assert costs.functions().keys() == costs.counts.keys()
    # A decoder run costs 1, all else nothing: what is composed are the plan's network evaluations.
    decoders = {p: p.count("decode 1") + 2 * p.count("decode 2") + p.count("afresh") for p in costs.counts}
    price = {part: timing([count]) for part, count in decoders.items()}
    assert composed(costs.counts, price) == plan.network_evaluations


@torch.no_grad()
def test_the_published_run_is_the_engines_exactly():
    reference, config = golden.model("tiny_h48_d24"), replace(PUBLISHED, num_steps=24)
    noise, labels = torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0])
    expected = Sampler(reference, config, 2, SIZE, SIZE)(noise, labels)
    assert golden.relative_error(published_run(reference, noise, labels, config), expected) < 1e-5


@pytest.fixture(scope="module")
def models():
    reference = golden.model("tiny_h48_d24")
    model = FusedDDT.from_reference(reference)
    return {"reference, fp32 eager": reference, "fp32 eager": model, "int8 eager": quantize_int8(model)}


def test_forwards_are_verified_then_timed(models):
    rows = measure_forward(models, SIZE, calls=1)
    assert rows[0]["of_reference"] == 1
    assert [row["relative_error"] < limit for row, limit in zip(rows, (1e-9, 1e-5, 0.01), strict=True)] == [True] * 3
    wrong = FusedDDT.from_reference(models["reference, fp32 eager"])
    wrong.final_layer.linear.bias.data += 1
    with pytest.raises(ValueError, match="not timed"):
        measure_forward({**models, "wrong": wrong}, SIZE, calls=1)


@pytest.mark.slow
@torch.no_grad()
def test_a_runs_time_is_the_sum_of_its_parts(models):
    reference, engines = models["reference, fp32 eager"], {"int8 eager": models["int8 eager"]}
    made = SamplingRuns(reference, engines, SIZE, batch_size=1, calls=1, run_steps=24)
    sampling, runs = made.sampling(), list(made.runs())
    assert [row["network_evaluations"] for row in sampling["settings"]] == [422, 422, 268]
    published = sampling["published"]["seconds_per_image"]
    for row in sampling["settings"]:
        total = sum(part["count"] * part["seconds"]["median"] for part in row["parts"])
        assert row["seconds_per_image"] == pytest.approx(total)
        assert row["times_faster_than_published"] == pytest.approx(published / total)
    assert published == pytest.approx(250 * sampling["published"]["step"]["median"])
    assert [run["setting"] for run in runs] == ["published", *SETTINGS]
    assert 1e-5 < runs[1]["relative_error"] < 0.01


def test_the_command_writes_its_file_and_prints_its_tables(models, tmp_path, monkeypatch, capsys):
    config = models["fp32 eager"].config
    preset = SimpleNamespace(model=config, data=SimpleNamespace(sample_size=SIZE))
    monkeypatch.setattr(cpu_sampling, "PRESETS", {"xl2_256": preset})
    output = tmp_path / "out.json"
    cpu_sampling.main(["--output", str(output), "--calls", "1", "--only", "int8 eager"])
    record = json.loads(output.read_text())
    assert [row["variant"] for row in record["forward"]] == ["reference, fp32 eager", "int8 eager"]
    assert "\n| int8 eager " in capsys.readouterr().out
