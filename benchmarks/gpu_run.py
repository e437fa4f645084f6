"""Everything worth knowing from ten minutes on a GPU machine: `python benchmarks/gpu_run.py --profile`.

From the repository's root, on a machine with one NVIDIA GPU, torch 2.11 or later and triton 3.6 or later; no network,
nothing to install. In this order, each step in a process of its own, so that what breaks one leaves the others alone:

    tests          pytest -m gpu, several at a time with pytest-xdist  tests.txt
    profile        with --profile: benchmarks.profile_steps            *_step.trace.json.gz, profile.json
    training_step  benchmarks.training_step, nothing compiled          training_step.json
    suite          every module of benchmarks, by pytest               results.json, suite.txt (output of all but tests)

steps.json says how each step ended. All files are under --output-dir (default: $OUT, else benchmarks/results/gpu) and
are written as the run goes: one that is cut off leaves what it had. A step that takes longer than its share of
--minutes is stopped. Without pytest the tests are left out, and the suite runs without it; without pytest-benchmark
its tables are missing; without jsonargparse training_step is left out, without it or diffusers some of the tests cannot
be imported. What is missing is said at the beginning. Wheels of it that were brought along are installed, for this run
alone, from the folder that --wheels names.

--dry-run does the same on a machine without a GPU, on small shapes.
"""

from __future__ import annotations

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
SHARES = {
    "bench_kernels": 0.4,
    "bench_sampling": 0.25,
    "bench_model": 0.19,
    "bench_training": 0.07,
    "bench_evaluation": 0.05,
    "bench_data": 0.04,
}
"""Of the suite's time, in the order of what is wanted most; what one module leaves goes to the next ones."""

TESTS_SHARE, PROFILE_SECONDS, TRAINING_SHARE = 0.25, 60.0, 0.15
START_SECONDS, GRACE_SECONDS = 10.0, 30.0
"""Until a module of the suite measures, and for its last case to end."""

STOP_SECONDS = 20.0
"""What it may take to stop a step; kept free at the end. No step starts with less left."""

TRAINING_VARIANTS = ("reference, bf16 autocast", "FusedDDT, bf16")
"""Beside the baseline, on a GPU: to compile takes minutes, and the suite's training cases do it on a smaller model."""

WANTED = ("pytest", "pytest_benchmark", "diffusers", "jsonargparse", "safetensors", "triton", "scipy")


class Steps:
    """Runs commands, and keeps steps.json.

    Args:
        folder: where it is.
        seconds: that all of them may take, the stopping of the last one included.
        packages: a folder of packages that they find first; or None.
    """

    def __init__(self, folder: Path, seconds: float, packages: Path | None = None) -> None:
        self.folder = folder
        self.deadline = time.monotonic() + seconds - STOP_SECONDS
        self.done: list[dict[str, Any]] = []
        paths = [str(packages or ""), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}

    @property
    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def run(self, name: str, command: list[str], log: str, seconds: float) -> None:
        """Run a Python command, its output appended to a log file; after `seconds` it is interrupted, then killed."""
        seconds = min(seconds, self.left)
        if self.left < STOP_SECONDS:
            self.note(name, "left out: no time left")
            return
        print(f"{name}: python {' '.join(command)} (up to {seconds:.0f} s)", flush=True)
        started = time.monotonic()
        with (self.folder / log).open("a") as stream:
            stream.write(f"\n$ python {' '.join(command)}\n")
            stream.flush()
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = _wait(process, seconds)
        took = time.monotonic() - started
        self.note(name, status, took)
        print("\n".join((self.folder / log).read_text(errors="replace").splitlines()[-4:]), flush=True)

    def note(self, name: str, status: str, seconds: float = 0.0) -> None:
        """Say how a step ended."""
        print(f"{name}: {status}, {seconds:.0f} s, {self.left:.0f} s left", flush=True)
        self.done.append({"step": name, "status": status, "seconds": round(seconds, 1)})
        temporary = self.folder / ".steps.json"
        temporary.write_text(json.dumps(self.done, indent=1) + "\n")
        temporary.replace(self.folder / "steps.json")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """How it ended, in words."""
    try:
        code = process.wait(seconds)
        return "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        # An interrupted pytest still says what it has done.
        for sign, patience in ((signal.SIGINT, 10.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            try:
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue
        return f"stopped after {seconds:.0f} s"


def install(wheels: Path, target: Path) -> None:
    """Install the wheels of a folder, and nothing that they depend on, into another folder, for this process too.

    Raises:
        ValueError: there are none, or pip does not take them.
    """
    files = [str(file.resolve()) for file in sorted(wheels.glob("*.whl"))]
    if not files:
        raise ValueError(f"--wheels is {wheels}, which holds no .whl file")
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"the wheels in {wheels} cannot be installed: {reason[-1]}")
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()


def preflight(folder: Path, dry_run: bool) -> None:
    """Say what this machine has; exit code 2 where it has no GPU and this is no dry run."""
    try:
        import torch
    except ImportError:
        print("error: torch is not installed; wanted torch 2.11 or later", file=sys.stderr)
        raise SystemExit(2) from None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name(0)
    elif dry_run:
        device = "no GPU, a dry run"
    else:
        print("error: PyTorch sees no NVIDIA GPU here; --dry-run goes through the steps without one", file=sys.stderr)
        raise SystemExit(2)
    missing = [name for name in WANTED if importlib.util.find_spec(name) is None]
    print(f"{device}; torch {torch.__version__}; files under {folder}", flush=True)
    print(f"not installed here: {', '.join(missing) or 'nothing'}", flush=True)


def digest(results: Path) -> list[str]:
    """A line for every case: the baseline's time, what of it our fastest variant and the fastest peer take."""
    if not results.exists():
        return ["no results"]
    lines = []
    for case in json.loads(results.read_text())["cases"]:
        line = f"{case['group']}: {case['case']}, {case['size']}:"
        variants = [v for v in case["variants"] if v["ratio"] is not None]
        for words, chosen in (
            ("", [v for v in variants if v["baseline"]]),
            ("ours", [v for v in variants if v["ours"]]),
            ("peer", [v for v in variants if not v["ours"] and not v["baseline"]]),
        ):
            if chosen:
                best = min(chosen, key=lambda v: v["ratio"])
                share = "" if best["share_of_ceiling"] is None else f" {best['share_of_ceiling']:.0%}"
                time_ms = f"{1e3 * best['seconds']['median']:.4g} ms"
                line += f" {words or time_ms} x{best['ratio']:.2f}{share};"
        lines.append(line + "".join(f" WRONG {entry['name']}" for entry in case["wrong"]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_run.py", description=__doc__.splitlines()[0])
    default = os.environ.get("OUT") or str(ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--output-dir", type=Path, default=Path(default))
    parser.add_argument("--minutes", type=float, default=9.0, help="that all may take")
    parser.add_argument("--profile", action="store_true", help="trace a refresh step and a reuse step")
    parser.add_argument("--dry-run", action="store_true", help="go through the steps without a GPU, on small shapes")
    parser.add_argument("--commit", help="of the source, where it came without its history")
    parser.add_argument("--modules", nargs="+", default=list(SHARES), help=f"of {', '.join(SHARES)}")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose title has these words")
    parser.add_argument("--tests", default="tests", help="folder or file of the tests to run")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install its wheels first, for this run alone")
    options = parser.parse_args()
    unknown = [name for name in options.modules if name not in SHARES]
    if unknown:
        parser.error(f"no module {unknown[0]!r}; allowed: {', '.join(SHARES)}")
    folder = options.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "results.json").exists():
        parser.error(f"{folder} holds results.json of another run; name another folder")
    if options.commit:
        os.environ["DDT_FAST_COMMIT"] = options.commit
    with tempfile.TemporaryDirectory() as temporary:
        packages = None if options.wheels is None else Path(temporary)
        if packages is not None:
            try:
                install(options.wheels, packages)
            except ValueError as error:
                parser.error(str(error))
        preflight(folder, options.dry_run)
        run_steps(Steps(folder, 60 * options.minutes, packages), options)
    print("\n".join(digest(folder / "results.json")))


def run_steps(steps: Steps, options: argparse.Namespace) -> None:
    """All of them, one after the other."""
    folder, seconds = steps.folder, 60 * options.minutes
    has_pytest = importlib.util.find_spec("pytest") is not None
    if has_pytest:
        tests = ["-m", "pytest", options.tests, "-m", "gpu", "-q", "-rfE", "--continue-on-collection-errors"]
        cores = os.cpu_count() or 1
        if importlib.util.find_spec("xdist") and cores >= 8:
            tests += ["-n", str(min(8, cores // 2))]  # most of their time is Triton's compiler, on the CPU
        steps.run("tests", tests, "tests.txt", TESTS_SHARE * seconds)
    else:
        steps.note("tests", "left out: pytest is not installed")
    if options.profile:
        command = ["-m", "benchmarks.profile_steps", "--output-dir", str(folder)]
        steps.run("profile", command, "suite.txt", PROFILE_SECONDS)
    if importlib.util.find_spec("jsonargparse") is not None:
        command = ["-m", "benchmarks.training_step", "--output", str(folder / "training_step.json")]
        small = ["--batch-size", "1", "--calls", "1", "--only", "FusedDDT, bf16"]
        command += small if options.dry_run else ["--only", *TRAINING_VARIANTS]
        steps.run("training_step", command, "suite.txt", TRAINING_SHARE * seconds)
    else:
        steps.note("training_step", "left out: jsonargparse is not installed")
    with_pytest = has_pytest and importlib.util.find_spec("pytest_benchmark") is not None
    modules = [name for name in SHARES if name in options.modules]
    for i, name in enumerate(modules):
        share = SHARES[name] / sum(SHARES[other] for other in modules[i:])
        limit = share * steps.left
        start = ["-m", "pytest", f"benchmarks/{name}.py", "--benchmark-only", "-q", "-rfE"]
        command = start if with_pytest else ["-m", "benchmarks.suite", name]
        command += ["--results", str(folder / "results.json"), "--append"]
        command += [
            "--time-limit",
            f"{max(1.0, limit - START_SECONDS):.0f}",
            *(["--only", options.only] * bool(options.only)),
        ]
        steps.run(name, command, "suite.txt", limit + GRACE_SECONDS)


if __name__ == "__main__":
    main()
