"""The training-step benchmark on a tiny model: what is compared, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_training, training_step
from benchmarks.harness import Ceilings
from benchmarks.harness import measure as measure_case
from benchmarks.training_step import REFERENCE, VARIANTS, Variant, measure, measure_memory
from ddt_fast.config import DDTConfig
from ddt_fast.training.parallel import process_group

CPU = torch.device("cpu")
TINY = DDTConfig(4, 8, hidden_size=16, num_heads=2, num_blocks=3, num_encoder_blocks=2, num_classes=5)
EAGER = tuple(variant for variant in VARIANTS if not variant.compile)


def rows(repa=False, variants=EAGER):
    with process_group(CPU):
        return list(measure(TINY, 2, 1, repa, CPU, variants))


@pytest.mark.slow
@pytest.mark.parametrize("repa", [False, True])
def test_every_variant_is_checked_against_the_reference_then_timed(repa):
    found = {row["variant"]: row for row in rows(repa)}
    assert list(found) == [variant.name for variant in EAGER]
    base = found[REFERENCE]
    assert (base["times_faster"], base["kept_of_reference"], base["gradient_error"]) == (1, 1, 0)
    assert found["FusedDDT, fp32"]["gradient_error"] < 1e-5
    assert 1e-4 < found["FusedDDT, bf16"]["gradient_error"] < 0.1
    for row in found.values():
        assert row["times_faster"] == pytest.approx(base["seconds"]["median"] / row["seconds"]["median"])
        assert row["peak_bytes"] >= row["kept_bytes"] > 0


def test_memory_is_what_lives_and_what_lived_at_most():
    def run():
        first = torch.empty(1000)
        second = first + 1
        del first
        return second[:10]

    kept, peak = measure_memory(run, CPU)
    assert kept == 4000
    assert 8000 <= peak < 8100  # the scalar that is added is a tensor too


def test_wrong_gradients_are_not_timed(monkeypatch):
    from_reference = training_step.FusedDDT.from_reference

    def other(reference):
        model = from_reference(reference)
        with torch.no_grad():
            model.final_layer.linear.weight.mul_(2)
        return model

    monkeypatch.setattr(training_step.FusedDDT, "from_reference", other)
    with pytest.raises(ValueError, match=r"FusedDDT, fp32: gradients are off by .*not timed"):
        rows(variants=(VARIANTS[0], Variant("FusedDDT, fp32", "fused")))


def test_the_suites_case_verifies_losses_and_gradients():
    names = tuple(step.name for step in bench_training.STEPS if not step.compile)
    model = replace(TINY, patch_size=2)  # as many tokens as the features
    case = bench_training.training_case("tiny", model, 2, names)
    result = measure_case(replace(case, rounds=1), Ceilings({"float32": 1e9}, 1e9, ""))
    assert list(result.rounds) == list(names), result.wrong
    assert all(v["error"] < 1e-4 for v in result.record["variants"])


@pytest.mark.slow
def test_the_command_writes_what_it_was_made_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_step, "B_SHAPED", TINY)
    output = tmp_path / "out.json"
    training_step.main(["--output", str(output), "--calls", "1", "--device", "cpu", "--only", "FusedDDT, fp32"])
    record = json.loads(output.read_text())
    assert [row["variant"] for row in record["rows"]] == [REFERENCE, "FusedDDT, fp32"]
    assert record["environment"]["torch"] == torch.__version__
    assert "FusedDDT, fp32" in capsys.readouterr().out
