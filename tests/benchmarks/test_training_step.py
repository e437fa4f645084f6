"""The training-step benchmark on a tiny model: what is compared, what is refused, and how memory is plural."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import training_step
from benchmarks.gpu_run import TRAINING_VARIANTS
from benchmarks.memory import measure_memory
from benchmarks.training_step import REFERENCE, VARIANTS, Variant, measure
from ddt_fast.config import DDTConfig
from ddt_fast.training.parallel import process_group

CPU = torch.device("cpu")
TINY = DDTConfig(4, 8, hidden_size=16, num_heads=2, num_blocks=3, num_encoder_blocks=2, num_classes=5)
EAGER = tuple(variant for variant in VARIANTS if not variant.compile)


def rows(repa=False, variants=EAGER):
    with process_group(CPU):
        return list(
            measure(replace(TINY, num_blocks=9, num_encoder_blocks=8) if repa else TINY, 2, 1, repa, CPU, variants)
        )


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


def test_memory_is_what_lives_and_what_lived_at_most():
    def run():
        first = torch.empty(1000)
        second = first + 1
        del first
        return second[:10]

    measured = measure_memory(run, CPU)
    assert measured.kept == 4000
    assert 8000 <= measured.peak < 8100  # the scalar that is added is a tensor too


def test_memory_counts_compiled_functions_too():
    linear = torch.nn.Linear(100, 100)
    function = torch.compile(lambda x: torch.relu(linear(x)).square())
    x = torch.randn(50, 100)
    function(x)
    assert measure_memory(lambda: function(x), CPU).kept >= 50 * 100 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calls", "0"], "--calls is 0; allowed: 1 or more"),
        (["--batch-size", "-1"], "--batch-size is -1; allowed: 1 or more"),
        (["--only", "mine"], "variant 'mine' does not exist; allowed: reference, fp32"),
        (["--device", "cuda:9"], "device 'cuda:9' cannot be used here"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.training_step", "--output", str(output), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1
    assert not output.exists()


def test_the_variants_of_a_gpu_run_exist():
    assert set(TRAINING_VARIANTS) < {variant.name for variant in VARIANTS}


def test_the_command_writes_what_it_was_made_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_step, "B_SHAPED", TINY)
    output = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["x", "--output", str(output), "--calls", "1", "--device", "cpu", "--only", "FusedDDT, fp32"]
    )
    training_step.main()
    record = json.loads(output.read_text())
    assert [row["variant"] for row in record["rows"]] == [REFERENCE, "FusedDDT, fp32"]
    assert record["environment"]["torch"] == torch.__version__
    assert "FusedDDT, fp32" in capsys.readouterr().out
