"""The headline numbers of a GPU machine, in nine minutes: `python benchmarks/gpu_run.py`.

From the repository's root, on a machine with one NVIDIA GPU, torch 2.11 or later, triton 3.6 or later, numpy, pytest,
PyYAML, safetensors and tqdm, for the training step also Pillow and scikit-learn; no network needed. In this order, each
step in a process of its own, so that what breaks one leaves the others alone:

    check               ddt_kernels.check: every kernel against its reference       check.json
    attention, swiglu   bench_kernels: every implementation, without torch.compile  results.json
    headline            benchmarks.headline: seconds per image of XL/2              headline.json
    training_step       benchmarks.training_step: FusedDDT bf16, reference fp32     training_step.json
    scoring             bench_evaluation: Inception, VAE decoding                   results.json
    profile             if --steps has it: benchmarks.profile_steps    traces.zip, profile.json
    tests               pytest -m gpu on the files that have such tests, several at a time with pytest-xdist
    suite               every other bench_*.py, by pytest                           results.json

log.txt has what they print, steps.json how each ended. All files are written as the run goes: one that is cut off
leaves what it had. A step that takes longer than its limit is stopped; `benchmarks.schedule` forecasts that none does.
What is not installed is listed first: without diffusers there is no VAE decoding, without jsonargparse some tests fail.
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
# Seconds that a step may take, in the order of what is wanted most. Those that follow share what is left.
LIMITS = {
    **{"check": 75.0, "attention": 70.0, "swiglu": 60.0, "headline": 240.0, "training_step": 75.0, "scoring": 50.0},
    "profile": 60.0,
}
TESTS_SHARE = 0.5  # of what is left then
# Of the suite's time; what one module leaves goes to the next ones.
SHARES = {
    **{"bench_training": 0.3, "bench_model": 0.25, "bench_kernels": 0.2, "bench_sampling": 0.2, "bench_data": 0.05},
}
START_SECONDS, GRACE_SECONDS = 10.0, 30.0  # until a module of the suite measures, and for its last case to end
STOP_SECONDS = 20.0  # what it may take to stop a step; kept free at the end: no step starts with less left
# Beside the reference in fp32; the suite has the slower ones.
TRAINING_VARIANTS = ("FusedDDT, bf16",)
LOG = "log.txt"
WANTED = (
    "pytest",
    "pytest_benchmark",
    "diffusers",
    "jsonargparse",
    "safetensors",
    "tqdm",
    "triton",
    "yaml",
    "PIL",
    "scipy",
)


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

    def run(self, name: str, command: list[str], seconds: float) -> None:
        """Run a Python command, its output appended to the log; after `seconds` it is interrupted, then killed."""
        started, status = time.monotonic(), "left out: no time left"
        if self.left >= STOP_SECONDS:
            seconds = min(seconds, self.left)
            print(f"{name}: up to {seconds:.0f} s", flush=True)
            with (self.folder / LOG).open("a") as stream:
                print(f"\n$ python {' '.join(command)}", file=stream, flush=True)
                options: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT, "start_new_session": True}
                process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=self.environment, **options)
                status = _wait(process, seconds)
            print("\n".join((self.folder / LOG).read_text(errors="replace").splitlines()[-4:]), flush=True)
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


def gpu_tests(path: Path) -> list[str]:
    """The test files that have tests for a GPU: to collect all others takes a minute."""
    files = sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
    return [str(file) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def suite_command(name: str, folder: Path, only: str, seconds: float) -> list[str]:
    """A module of the suite, which starts no case later than after `seconds`."""
    command = ["-m", "pytest", f"benchmarks/{name}.py", "-q", "-rfE", "--append", "--only", only]
    command += ["--benchmark-only"] * installed("pytest_benchmark")
    return [*command, "--results", str(folder / "results.json"), "--time-limit", f"{max(1.0, seconds):.0f}"]


def training_command(folder: Path, dry_run: bool) -> list[str]:
    """By its function: the command itself needs jsonargparse."""
    batch, calls, config = (1, 1, "TINY") if dry_run else (None, 5, None)
    output = f"Path({str(folder / 'training_step.json')!r})"
    modules = {"pathlib": "Path", "benchmarks.bench_sampling": "DEVICE, TINY", "benchmarks.training_step": "run"}
    call = f"run({output}, {TRAINING_VARIANTS}, {batch}, {calls}, DEVICE, {config})"
    return ["-c", "\n".join([*(f"from {module} import {names}" for module, names in modules.items()), call])]


def first_steps(folder: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Command by step of LIMITS, in their order."""

    def kernels(name: str) -> list[str]:
        return suite_command("bench_kernels", folder, f": {name} forward", LIMITS[name] - 2 * START_SECONDS)

    headline = ["-m", "benchmarks.headline", "--output", str(folder / "headline.json")]
    headline += ["--time-limit", f"{LIMITS['headline'] - GRACE_SECONDS:.0f}"]
    headline += ["--seconds", "0.02", "--num-steps", "24"] * options.dry_run
    steps = {
        "check": ["-m", "ddt_kernels.check", "--output", str(folder / "check.json")],
        "attention": kernels("attention"),
        "swiglu": kernels("swiglu"),
        "headline": headline,
        "training_step": training_command(folder, options.dry_run),
        # Half of it: the last case is torch.compile's, which takes a minute.
        "scoring": suite_command("bench_evaluation", folder, options.only, LIMITS["scoring"] / 2),
    }
    steps["profile"] = ["-m", "benchmarks.profile_steps", "--output-dir", str(folder)]
    return {name: command for name, command in steps.items() if name in options.steps}


def run_steps(steps: Steps, options: argparse.Namespace) -> None:
    folder, cores = steps.folder, os.cpu_count() or 1
    for name, command in first_steps(folder, options).items():
        steps.run(name, command, LIMITS[name])
    tests = ["-m", "pytest", *gpu_tests(options.tests), "-m", "gpu", "-q", "-rfE", "--continue-on-collection-errors"]
    if installed("xdist") and cores >= 8:
        tests += ["-n", str(min(8, cores // 2))]  # most of their time is Triton's compiler, on the CPU
    if "tests" in options.steps:
        steps.run("tests", tests, TESTS_SHARE * steps.left)
    modules = [name for name in SHARES if name in options.steps]
    for i, name in enumerate(modules):
        limit = SHARES[name] / sum(SHARES[other] for other in modules[i:]) * steps.left
        command = suite_command(name, folder, options.only, limit - START_SECONDS)
        steps.run(name, command, limit + GRACE_SECONDS)


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_run.py", description=__doc__.splitlines()[0])
    default = os.environ.get("OUT") or str(ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--output-dir", type=Path, default=Path(default))
    parser.add_argument("--minutes", type=float, default=9.0, help="that all may take")
    parser.add_argument("--dry-run", action="store_true", help="go through the steps without a GPU, on small shapes")
    parser.add_argument("--commit", help="of the source, where it came without its history")
    names = [*LIMITS, "tests", *SHARES]
    usual = [name for name in names if name != "profile"]
    parser.add_argument("--steps", nargs="+", default=usual, choices=names, help="default: all but profile")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose title has these words")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="folder or file of the tests to run")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install its wheels first, for this run alone")
    return parser


def main() -> None:
    options = command_parser().parse_args()
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
