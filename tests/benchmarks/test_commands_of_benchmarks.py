"""The benchmarks as they are run: by pytest, and by the one command for a GPU machine, here without one."""

import gzip
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu_run import Steps, install
from python_processes import run_python

BARE = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in ("jsonargparse", "diffusers"))
"""A sitecustomize under which these packages, which the GPU machine lacks, cannot be imported."""


def test_pytest_shows_the_interleaved_rounds(tmp_path):
    results, shown = tmp_path / "results.json", tmp_path / "shown.json"
    options = ("--benchmark-only", "--only", "attention forward,", "--results", str(results))
    done = run_python("-m", "pytest", "benchmarks", *options, f"--benchmark-json={shown}")
    assert done.returncode == 0, done.stdout
    (case,) = json.loads(results.read_text())["cases"]
    medians = {variant["name"]: variant["seconds"]["median"] for variant in case["variants"]}
    assert {"plain PyTorch", "ddt_kernels", "sdpa_math"} <= medians.keys()
    for benchmark in json.loads(shown.read_text())["benchmarks"]:
        assert benchmark["group"] == "kernels: attention forward, small B 4 N 256 C 288 float32"
        assert benchmark["stats"]["median"] == pytest.approx(medians.pop(benchmark["name"]), rel=1e-6)
    assert not medians
    missing = {entry["name"]: entry["reason"] for entry in case["missing"]}
    assert "xformers" in missing
    assert f"missing in 1 case: xformers: {missing['xformers']}" in done.stdout


def test_a_file_that_cannot_be_added_to(tmp_path, capsys):
    results = tmp_path / "results.json"
    results.write_text("{}")
    folder = str(Path(__file__).parents[2] / "benchmarks")
    assert pytest.main([folder, "--results", str(results), "--append"]) == pytest.ExitCode.USAGE_ERROR
    assert "has format None; allowed: 1" in capsys.readouterr().err


def test_the_gpu_command_without_a_gpu_and_its_packages(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    folder = tmp_path / "out"
    options = ("--modules", "bench_kernels", "--only", "attention forward,", "--tests", "tests/kernels/test_tuning.py")
    command = ("benchmarks/gpu_run.py", "--dry-run", "--profile", "--minutes", "4", "--output-dir", str(folder))
    done = run_python(*command, *options, paths=[tmp_path])
    assert done.returncode == 0, done.stderr
    assert "not installed here: diffusers, jsonargparse" in done.stdout
    steps = {step["step"]: step["status"] for step in json.loads((folder / "steps.json").read_text())}
    assert steps.pop("training_step") == "left out: jsonargparse is not installed"
    assert steps == {"tests": "done", "profile": "done", "bench_kernels": "done"}, done.stdout
    assert len(json.loads((folder / "results.json").read_text())["cases"]) == 1
    for step in ("refresh", "reuse"):
        with gzip.open(folder / f"{step}_step.trace.json.gz") as file:
            assert json.load(file)["traceEvents"]
    times = json.loads((folder / "profile.json").read_text())["steps"]
    # A reuse step has no encoder: fewer products.
    products = [sum(t["calls"] for t in times[step] if "mm" in t["name"]) for step in ("refresh", "reuse")]
    assert products[0] > 2 * products[1] > 0
    assert len(list(folder.iterdir())) < 8  # as many come back from the GPU machine
    again = run_python(*command, *options)
    assert again.returncode == 2
    assert "holds results.json of another run" in again.stderr


def test_the_gpu_command_wants_a_gpu(tmp_path):
    done = run_python("benchmarks/gpu_run.py", "--output-dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "error: PyTorch sees no NVIDIA GPU here; --dry-run goes through the steps without one\n"


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


def test_wheels_that_cannot_be_installed(tmp_path):
    command = ("benchmarks/gpu_run.py", "--dry-run", "--output-dir", str(tmp_path / "out"), "--wheels")
    done = run_python(*command, str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"error: --wheels is {tmp_path}, which holds no .whl file")
    make_wheel(tmp_path, tag="cp27-cp27m-win32")
    done = run_python(*command, str(tmp_path))
    assert done.returncode == 2
    assert "cannot be installed: ERROR: brought_along-1.0-cp27-cp27m-win32.whl is not a supported wheel" in done.stderr


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
