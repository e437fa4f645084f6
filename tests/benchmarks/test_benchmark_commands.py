"""The benchmarks as they are run: answers to mistakes, and pytest's tables."""

import json
from pathlib import Path

import pytest

from benchmarks import attention, candidates, cpu_sampling, forecast, pareto, training_step
from benchmarks.report import __main__ as report
from ddt_fast.command import run_command

ROOT = Path(__file__).parents[2]
WHOLE = "allowed: a whole number,"


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (forecast, "--num-samples 64", f"--num-samples is 64; {WHOLE} 65 or more"),
        (candidates, "--samples 0", f"--samples is 0; {WHOLE} 1 or more"),
        (candidates, "--frechet-samples 649", f"--frechet-samples is 649; {WHOLE} 650 or more"),
        (pareto, "--samples 64", f"--samples is 64; {WHOLE} 65 or more"),
        (pareto, "--truth-steps 209", f"--truth-steps is 209; {WHOLE} 210 or more"),
        (pareto, "--samples many", "many"),
        (pareto, "--no-such-option", "no-such-option"),
        (cpu_sampling, "--calls 0", f"--calls is 0; {WHOLE} 1 or more"),
        (cpu_sampling, "--run-steps -1", "--run-steps is -1"),
        (cpu_sampling, "--threads many", "--threads is many; allowed: a whole number"),
        (cpu_sampling, "--only mine", "--only is 'mine'; allowed: reference, fp32 eager, fp32 eager"),
        (training_step, "--calls 0", f"--calls is 0; {WHOLE} 1 or more"),
        (training_step, "--batch-size -1", "--batch-size is -1"),
        (training_step, "--calls many", "--calls is many; allowed: a whole number"),
        (training_step, "--only mine", "--only is 'mine'; allowed: reference, fp32"),
        (training_step, "--device cuda:9", "device 'cuda:9' cannot be used here"),
        (attention, "--rounds 0", f"--rounds is 0; {WHOLE} 1 or more"),
        (attention, "--threads 0", "--threads is 0"),
        (attention, '--dtypes ["float8"]', "--dtypes is 'float8'; allowed: float32, bfloat16"),
        (attention, "--shapes [[1,0,2,8]]", "B, N, H and D of 1 or more"),
        (report, "--check --write-readme", "--check writes nothing"),
        (report, "absent.json", "No such file"),
        (report, "README.md", "is not valid JSON"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(command, arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("{")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: command.main(arguments.split()))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.slow
def test_attention_backends_are_verified_and_timed(capsys):
    attention.main(["--device", "cpu", "--shapes", "[[2,16,2,8]]", "--rounds", "1"])
    out = capsys.readouterr().out
    assert out.count("| plain PyTorch") == out.count("| sdpa_math") == 2
    assert " (auto)" in out
    assert "- xformers: " in out


@pytest.fixture
def alone(monkeypatch):
    """As if no other worker of pytest-xdist were there: pytest-benchmark would measure nothing."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.mark.slow
def test_pytest_shows_the_interleaved_rounds(alone, tmp_path, capsys):
    results, shown = tmp_path / "results.json", tmp_path / "shown.json"
    options = ["--benchmark-only", "--only", "attention forward,", "-p", "no:cacheprovider", "-q"]
    files = ["--results", str(results), f"--benchmark-json={shown}"]
    assert pytest.main([str(ROOT / "benchmarks" / "bench_kernels.py"), *options, *files]) == 0
    (case,) = json.loads(results.read_text())["cases"]
    medians = {variant["name"]: variant["seconds"]["median"] for variant in case["variants"]}
    assert {"plain PyTorch", "ddt_kernels", "sdpa_math"} <= medians.keys()
    for benchmark in json.loads(shown.read_text())["benchmarks"]:
        assert benchmark["group"] == "kernels: attention forward, small B 4 N 256 C 288 float32"
        assert benchmark["stats"]["median"] == pytest.approx(medians.pop(benchmark["name"]), rel=1e-6)
    assert not medians
    missing = {entry["name"]: entry["reason"] for entry in case["missing"]}
    out = capsys.readouterr().out
    assert "| **ddt_kernels** " in out
    assert f"xformers (1 case): {missing['xformers']}" in out
    results.write_text("{}")
    assert pytest.main([str(ROOT / "benchmarks"), *files, "--append"]) == pytest.ExitCode.USAGE_ERROR
    assert "has format None; allowed: 1" in capsys.readouterr().err
