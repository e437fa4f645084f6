"""The one command for a GPU machine: its steps without a GPU, their limits, and what a step that fails leaves."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_kernels, gpu_run, headline, schedule
from benchmarks.gpu_run import LIMITS, TRAINING_VARIANTS, Steps, gpu_tests, install
from benchmarks.headline import Case, Headline, calls_and_rounds
from benchmarks.models import random_model
from benchmarks.training_step import VARIANTS
from ddt_fast.config import DDTConfig
from ddt_fast.model import FusedDDT

ROOT = Path(__file__).parents[2]
MINIMAL = DDTConfig(4, 2, hidden_size=16, num_heads=2, num_blocks=3, num_encoder_blocks=2, num_classes=5)


def run_gpu_run(*arguments, paths=()):
    """`python benchmarks/gpu_run.py`, on one thread; paths: folders to import from first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark would measure nothing
    command = [sys.executable, "benchmarks/gpu_run.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_dry_run_needs_neither_a_gpu_nor_jsonargparse_nor_diffusers(tmp_path):
    code = "import sys\nsys.modules['jsonargparse'] = sys.modules['diffusers'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    folder = tmp_path / "out"
    names = ("headline", "training_step", "profile")
    done = run_gpu_run("--dry-run", "--output-dir", folder, "--steps", *names, paths=[tmp_path])
    assert done.returncode == 0, done.stderr
    steps = {step["step"]: step["status"] for step in json.loads((folder / "steps.json").read_text())}
    assert list(steps.items()) == [(name, "done") for name in names], (folder / "log.txt").read_text()
    assert {row["plan"] for row in json.loads((folder / "headline.json").read_text())["headline"]} == {*headline.PLANS}
    assert len(json.loads((folder / "training_step.json").read_text())["rows"]) == 1 + len(TRAINING_VARIANTS)
    with zipfile.ZipFile(folder / "traces.zip") as traces:
        for step in ("refresh", "reuse"):
            assert json.loads(traces.read(f"{step}_step.trace.json"))["traceEvents"]
    assert len(list(folder.iterdir())) <= 8  # as many come back from the GPU machine


def test_every_step_fits_its_limit_on_a_slow_machine():
    rows = list(schedule.schedule())
    assert [name for name, *_ in rows] == [name for name in LIMITS if name != "profile"]
    for name, seconds, limit, _ in rows:
        assert seconds <= limit, name
    assert rows[-1][-1] >= 30  # for the tests and the suite
    # No case is left out for lack of time.
    seconds, commands = {name: row[0] for name, *row in rows}, gpu_run.first_steps(Path("unused"), parsed())
    for name in ("attention", "swiglu", "headline"):
        time_limit = float(commands[name][commands[name].index("--time-limit") + 1])
        assert seconds[name] - schedule.Rates().start <= time_limit, name


def test_the_forecast_grows_with_what_is_measured(monkeypatch):
    before = schedule.forecast()
    slower = schedule.forecast(replace(schedule.Rates(), sampling_flops=1e14))
    assert slower["headline"] > before["headline"] + 40
    monkeypatch.setattr(schedule, "GPU_CASES", (*headline.GPU_CASES, replace(headline.GPU_CASES[0], batch_size=512)))
    assert schedule.forecast()["headline"] > before["headline"] + 20


def test_every_kind_of_step_is_timed_once_and_counted(tmp_path):
    output = tmp_path / "headline.json"
    cases = (Case("minimal", MINIMAL, 4, 2, False), Case("no such side", MINIMAL, 5, 1, False))
    Headline(output, 1e-3, 12, 1e9).measure(cases)
    record = json.loads(output.read_text())
    steps = [step["step"] for step in record["steps"]]
    assert len(set(steps)) == len(steps)
    rows = {row["plan"]: row for row in record["headline"]}
    assert {entry["case"] for entry in record["missing"]} == {f"no such side, B 1, eager, {name}" for name in rows}
    seconds = {step["step"]: step["seconds"]["median"] for step in record["steps"]}
    for plan, row in rows.items():
        total = sum(count * seconds[part] for part, count in row["counts"].items())
        assert row["seconds_per_batch"] == pytest.approx(total)
        assert row["images_per_second"] == pytest.approx(2 / total)
        assert sum(row["counts"].values()) == 1 + (21 if plan == "--fast" else 12)
    assert rows["refresh 1"]["tflop_per_image"] > rows["refresh 6"]["tflop_per_image"]
    assert rows["--fast"]["whole_run"]["difference"] > -1
    assert seconds["encode 2, decode 2"] > seconds["decode 2"]


def test_plans_that_had_no_time_or_fail_are_listed(tmp_path, monkeypatch):
    output = tmp_path / "headline.json"
    cases = (Case("minimal", MINIMAL, 4, 1, False),)
    Headline(output, 1e-3, 12, -1.0).measure(cases)
    record = json.loads(output.read_text())
    assert record["headline"] == []
    assert {entry["reason"] for entry in record["missing"]} == {"not started in time"}

    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(headline, "Sampler", fails)
    Headline(output, 1e-3, 12, 1e9).measure(cases)
    record = json.loads(output.read_text())
    assert {entry["reason"] for entry in record["missing"]} == {"OutOfMemoryError: CUDA out of memory"}


def test_the_engine_is_the_one_that_ran(tmp_path):
    output = tmp_path / "headline.json"
    with pytest.warns(UserWarning, match="sampling eagerly"):
        Headline(output, 1e-3, 12, 1e9).measure((Case("minimal", MINIMAL, 4, 1, True),))
    rows = json.loads(output.read_text())["headline"]
    assert {row["engine"] for row in rows} == {"eager"}
    checked = {row["plan"] for row in rows if row["whole_run"]}
    assert {"refresh 6", "--fast"} <= checked
    assert "refresh dp" not in checked  # its steps were timed before: no sampler is made


def test_steps_are_timed_in_the_rows_that_a_run_has(monkeypatch):
    """Each execution moves the step counter on; beyond the last row there is nothing to read."""
    model = FusedDDT.from_reference(random_model(MINIMAL))
    plan = headline.Plan(Headline(Path("unused"), 1e-4, 12, 1e9), Case("", MINIMAL, 4, 1, False), model, "--fast", {})
    sampler, reached = plan.sampler(False), []
    advance = sampler._execute
    sampler._execute = lambda kind: (advance(kind), reached.append(int(sampler.buffers.step)))
    for kind in plan.kinds.values():
        plan._time_step(sampler, kind)
    assert 1 <= max(reached) <= len(plan.plan.steps)


@pytest.mark.parametrize(
    ("seconds", "steps", "expected"),
    [(1e-3, 250, (50, 20)), (1e-4, 21, (21, 20)), (0.1, 250, (1, 10)), (2.6, 250, (1, 1))],
)
def test_about_a_second_is_spent_on_a_kind_of_step(seconds, steps, expected):
    assert calls_and_rounds(seconds, 1.0, steps) == expected


def test_what_the_steps_name_exists(tmp_path):
    assert set(TRAINING_VARIANTS) < {variant.name for variant in VARIANTS}
    titles = [case.title for case in bench_kernels.CASES]
    for op in ("attention", "swiglu"):
        command = gpu_run.first_steps(tmp_path, parsed())[op]
        words = command[command.index("--only") + 1]
        chosen = [case for case in bench_kernels.CASES if words in case.title]
        assert len(chosen) == 2 * len(bench_kernels.SHAPES), titles
        assert not any("torch.compile" in case.variants for case in chosen) or op == "attention"


def parsed(*arguments):
    return gpu_run.command_parser().parse_args(arguments)


def test_only_files_with_gpu_tests_are_collected():
    files = gpu_tests(ROOT / "tests")
    assert str(ROOT / "tests" / "kernels" / "test_attention.py") in files
    assert str(ROOT / "tests" / "test_class_names.py") not in files
    assert len(files) < 0.3 * len(list((ROOT / "tests").rglob("test_*.py")))


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
    steps.run("imports", ["-c", "import brought_along; print(brought_along.WORD)"], 20.0)
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
    steps.run("hangs", ["-c", "print('started'); import time; time.sleep(60)"], 1.0)
    steps.run("fails", ["-c", "raise SystemExit(3)"], 10.0)
    steps.deadline -= 30
    steps.run("late", ["-c", "print('late')"], 10.0)
    statuses = [step["status"] for step in json.loads((tmp_path / "steps.json").read_text())]
    assert statuses == ["stopped after 1 s", "exit code 3", "left out: no time left"]
    assert "started" in (tmp_path / "log.txt").read_text()
    assert "late" not in (tmp_path / "log.txt").read_text()
