"""The benchmarks as they are run: answers to mistakes, pytest's tables, and the one command for a GPU machine."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import attention, candidates, cpu_sampling, forecast, gpu_run, pareto, training_step
from benchmarks.gpu_run import Steps, install
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


def run_gpu_run(*arguments, paths=()):
    """`python benchmarks/gpu_run.py`, on one thread; paths: folders to import from first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu_run.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_gpu_command_without_a_gpu_and_its_packages(alone, tmp_path):
    code = "import sys\nsys.modules['jsonargparse'] = sys.modules['diffusers'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    folder = tmp_path / "out"
    options = ("--modules", "bench_evaluation", "--only", "precision", "--tests", "tests/kernels/test_tuning.py")
    command = ("--dry-run", "--profile", "--minutes", "4", "--output-dir", folder, *options)
    done = run_gpu_run(*command, paths=[tmp_path])
    assert done.returncode == 0, done.stderr
    assert "not installed here: diffusers, jsonargparse" in done.stdout
    steps = {step["step"]: step["status"] for step in json.loads((folder / "steps.json").read_text())}
    expected = {"tests": "done", "profile": "done", "training_step": "exit code 1", "bench_evaluation": "done"}
    assert steps == expected, done.stdout
    assert len(json.loads((folder / "results.json").read_text())["cases"]) == 1
    for step in ("refresh", "reuse"):
        with gzip.open(folder / f"{step}_step.trace.json.gz") as file:
            assert json.load(file)["traceEvents"]
    times = json.loads((folder / "profile.json").read_text())["steps"]
    # A reuse step has no encoder: fewer products.
    products = [sum(t["calls"] for t in times[step] if "mm" in t["name"]) for step in ("refresh", "reuse")]
    assert products[0] > 2 * products[1] > 0
    assert len(list(folder.iterdir())) <= 8  # as many come back from the GPU machine


def make_wheel(folder, tag="py3-none-any"):
    """Of a module of one line, which says that it needs another."""
    info = "brought_along-1.0.dist-info"
    files = {
        "brought_along.py": "WORD = 'here'\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: brought_along\nVersion: 1.0\nRequires-Dist: another\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"brought_along-1.0-{tag}.whl", "w") as wheel:
        for file, content in files.items():
            wheel.writestr(file, content)


def test_wheels_are_there_for_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    make_wheel(tmp_path)
    install(tmp_path, tmp_path / "packages")
    assert importlib.util.find_spec("brought_along") is not None
    steps = Steps(tmp_path, 60, tmp_path / "packages")
    steps.run("imports", ["-c", "import brought_along; print(brought_along.WORD)"], "log.txt", 20.0)
    assert "\nhere\n" in (tmp_path / "log.txt").read_text()


def test_mistakes_of_the_gpu_command(tmp_path, monkeypatch, capsys):
    def error(*options):
        arguments = ["gpu_run.py", "--output-dir", str(tmp_path / "out"), *map(str, options)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            gpu_run.main()
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    results = tmp_path / "out" / "results.json"
    results.parent.mkdir()
    results.touch()
    assert error("--dry-run") == f"error: {results.parent} holds results.json of another run; name another folder"
    results.unlink()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert error() == "error: PyTorch sees no NVIDIA GPU here; --dry-run goes through the steps without one"
    assert error("--dry-run", "--wheels", tmp_path) == f"error: --wheels is {tmp_path}, which holds no .whl file"
    make_wheel(tmp_path, tag="cp27-cp27m-win32")
    message = "cannot be installed: ERROR: brought_along-1.0-cp27-cp27m-win32.whl is not a supported wheel"
    assert message in error("--dry-run", "--wheels", tmp_path)


def test_a_step_that_hangs_is_stopped_and_none_begins_too_late(tmp_path):
    steps = Steps(tmp_path, seconds=60)
    steps.run("hangs", ["-c", "print('started'); import time; time.sleep(60)"], "log.txt", 1.0)
    steps.run("fails", ["-c", "raise SystemExit(3)"], "log.txt", 10.0)
    steps.deadline -= 30
    steps.run("late", ["-c", "print('late')"], "log.txt", 10.0)
    statuses = [step["status"] for step in json.loads((tmp_path / "steps.json").read_text())]
    assert statuses == ["stopped after 1 s", "exit code 3", "left out: no time left"]
    assert "started" in (tmp_path / "log.txt").read_text()
    assert "late" not in (tmp_path / "log.txt").read_text()
