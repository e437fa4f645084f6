"""Everything worth knowing from ten minutes on a GPU machine: `python benchmarks/gpu_run.py --profile`.

From the repository's root, on a machine with one NVIDIA GPU, torch 2.11 or later, triton 3.6 or later and pytest; no
network needed. In this order, each step in a process of its own, so that what breaks one leaves the others alone:

    tests          pytest -m gpu, several at a time with pytest-xdist  tests.txt
    profile        with --profile: benchmarks.profile_steps            *_step.trace.json.gz, profile.json
    training_step  benchmarks.training_step, nothing compiled          training_step.json
    suite          every bench_*.py, by pytest                         results.json, suite.txt (output of all but tests)

steps.json says how each step ended. All files are written as the run goes: one that is cut off leaves what it had. A
step that takes longer than its share of --minutes is stopped. What is not installed is listed first: without
pytest-benchmark the suite prints the report's tables alone, without jsonargparse training_step and some tests fail.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Of the suite's time, in the order of what is wanted most; what one module leaves goes to the next ones.
SHARES = {
    **{"bench_kernels": 0.4, "bench_sampling": 0.25, "bench_model": 0.19},
    **{"bench_training": 0.07, "bench_evaluation": 0.05, "bench_data": 0.04},
}
TESTS_SHARE, PROFILE_SECONDS, TRAINING_SHARE = 0.25, 60.0, 0.15
START_SECONDS, GRACE_SECONDS = 10.0, 30.0  # until a module of the suite measures, and for its last case to end
STOP_SECONDS = 20.0  # what it may take to stop a step; kept free at the end: no step starts with less left
# Beside the baseline, on a GPU: to compile takes minutes, and the suite's training cases do it on a smaller model.
TRAINING_VARIANTS = ("reference, bf16 autocast", "FusedDDT, bf16")
WANTED = ("pytest", "pytest_benchmark", "diffusers", "jsonargparse", "safetensors", "triton", "scipy")


class Steps:
    """Runs commands, which find the packages of a folder first, and keeps steps.json. `seconds` are all that they may
    take, the stopping of the last one included."""

    def __init__(self, folder: Path, seconds: float, packages: Path | None = None) -> None:
        self.folder, self.deadline = folder, time.monotonic() + seconds - STOP_SECONDS
        self.done: list[dict[str, Any]] = []
        paths = [str(packages or ""), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}

    @property
    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def run(self, name: str, command: list[str], log: str, seconds: float) -> None:
        """Run a Python command, its output appended to a log file; after `seconds` it is interrupted, then killed."""
        started, status = time.monotonic(), "left out: no time left"
        if self.left >= STOP_SECONDS:
            seconds = min(seconds, self.left)
            print(f"{name}: python {' '.join(command)} (up to {seconds:.0f} s)", flush=True)
            with (self.folder / log).open("a") as stream:
                print(f"\n$ python {' '.join(command)}", file=stream, flush=True)
                options: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT, "start_new_session": True}
                process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=self.environment, **options)
                status = _wait(process, seconds)
            print("\n".join((self.folder / log).read_text(errors="replace").splitlines()[-4:]), flush=True)
        seconds = time.monotonic() - started
        print(f"{name}: {status}, {seconds:.0f} s, {self.left:.0f} s left", flush=True)
        self.done.append({"step": name, "status": status, "seconds": round(seconds, 1)})
        (self.folder / "steps.json").write_text(json.dumps(self.done, indent=1) + "\n")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    try:
        code = process.wait(seconds)
        return "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        for sign in (signal.SIGINT, signal.SIGKILL):  # an interrupted pytest still says what it has done
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sign)
                process.wait(STOP_SECONDS / 2)
                break
        return f"stopped after {seconds:.0f} s"


def install(wheels: Path, target: Path) -> None:
    """Install the wheels of a folder, without their dependencies, into another folder, for this process too; ValueError
    where there are none, or pip does not take them."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise ValueError(f"--wheels is {wheels}, which holds no .whl file")
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr or done.stdout or f"exit code {done.returncode}").strip().splitlines()[-1]
        raise ValueError(f"the wheels in {wheels} cannot be installed: {reason}")
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def preflight(folder: Path, dry_run: bool) -> None:
    """Say what this machine has; ValueError where it has no torch, or no GPU and this is not a dry run."""
    if not installed("torch"):
        raise ValueError("torch is not installed; expected torch 2.11 or later")
    import torch

    if not torch.cuda.is_available() and not dry_run:
        raise ValueError("PyTorch sees no NVIDIA GPU here; --dry-run goes through the steps without one")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU, a dry run"
    print(f"{device}; torch {torch.__version__}; files under {folder}", flush=True)
    missing = [name for name in WANTED if not installed(name)]
    print(f"not installed here: {', '.join(missing) or 'nothing'}", flush=True)


def run_steps(steps: Steps, options: argparse.Namespace) -> None:
    folder, seconds, cores = steps.folder, 60 * options.minutes, os.cpu_count() or 1
    tests = ["-m", "pytest", options.tests, "-m", "gpu", "-q", "-rfE", "--continue-on-collection-errors"]
    if installed("xdist") and cores >= 8:
        tests += ["-n", str(min(8, cores // 2))]  # most of their time is Triton's compiler, on the CPU
    steps.run("tests", tests, "tests.txt", TESTS_SHARE * seconds)
    if options.profile:
        command = ["-m", "benchmarks.profile_steps", "--output-dir", str(folder)]
        steps.run("profile", command, "suite.txt", PROFILE_SECONDS)
    command = ["-m", "benchmarks.training_step", "--output", str(folder / "training_step.json"), "--only"]
    command += ["FusedDDT, bf16", "--batch-size", "1", "--calls", "1"] if options.dry_run else TRAINING_VARIANTS
    steps.run("training_step", command, "suite.txt", TRAINING_SHARE * seconds)
    modules = [name for name in SHARES if name in options.modules]
    for i, name in enumerate(modules):
        limit = SHARES[name] / sum(SHARES[other] for other in modules[i:]) * steps.left
        command = ["-m", "pytest", f"benchmarks/{name}.py", "-q", "-rfE", "--append", "--only", options.only]
        command += ["--benchmark-only"] * installed("pytest_benchmark")
        command += ["--results", str(folder / "results.json"), "--time-limit", f"{max(1.0, limit - START_SECONDS):.0f}"]
        steps.run(name, command, "suite.txt", limit + GRACE_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_run.py", description=__doc__.splitlines()[0])
    default = os.environ.get("OUT") or str(ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--output-dir", type=Path, default=Path(default))
    parser.add_argument("--minutes", type=float, default=9.0, help="that all may take")
    parser.add_argument("--profile", action="store_true", help="trace a refresh step and a reuse step")
    parser.add_argument("--dry-run", action="store_true", help="go through the steps without a GPU, on small shapes")
    parser.add_argument("--commit", help="of the source, where it came without its history")
    parser.add_argument("--modules", nargs="+", default=list(SHARES), choices=SHARES, help="of the suite")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose title has these words")
    parser.add_argument("--tests", default="tests", help="folder or file of the tests to run")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install its wheels first, for this run alone")
    options = parser.parse_args()
    folder = options.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.commit:
        os.environ["DDT_FAST_COMMIT"] = options.commit
    with tempfile.TemporaryDirectory() as temporary:
        packages = options.wheels and Path(temporary)
        try:
            if (folder / "results.json").exists():
                raise ValueError(f"{folder} holds results.json of another run; name another folder")
            if packages is not None:
                install(options.wheels, packages)
            preflight(folder, options.dry_run)
        except ValueError as error:
            print("error:", error, file=sys.stderr)
            raise SystemExit(2) from None
        run_steps(Steps(folder, 60 * options.minutes, packages), options)


if __name__ == "__main__":
    main()
