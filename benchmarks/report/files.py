"""Results files, told apart by what they hold."""

import hashlib
from pathlib import Path

from benchmarks.harness import FORMAT
from ddt_fast.files import read_json
from ddt_fast.wording import plural

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results"

# By kind of file: the command that writes one, and the keys it is known by.
KINDS = {
    "suite": ("pytest benchmarks --benchmark-only --results benchmarks/results/suite.json", {"format", "cases"}),
    "cpu_sampling": ("python -m benchmarks.cpu_sampling", {"forward", "sampling", "runs"}),
    "training_step": ("python -m benchmarks.training_step", {"batch_size", "rows"}),
    "forecast": ("python -m benchmarks.forecast", {"num_samples", "results"}),
    "pareto": ("python -m benchmarks.pareto", {"points", "recommended"}),
    "candidates": ("python -m benchmarks.candidates", {"errors", "frechet"}),
}


class ResultsFile:
    """A file of any kind.

    Attributes:
        path: of the file; name: within the repository, else its name alone; picture: beside it.
        kind: one of KINDS.
        record: all that it holds.
        gpu: whether it was made on one.

    Raises:
        ValueError: it is of no kind, or of another format.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.picture = path.resolve(), path.resolve().with_suffix(".png")
        self.name = self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else path.name
        self.record = read_json(path)
        kinds = [kind for kind, (_, keys) in KINDS.items() if {"environment"} | keys <= self.record.keys()]
        if not kinds:
            raise ValueError(f"{self.name} is not a results file; allowed: those of {', '.join(KINDS)}")
        self.kind = kinds[0]
        if self.kind == "suite" and self.record["format"] != FORMAT:
            raise ValueError(f"{self.name} has format {self.record['format']}; allowed: {FORMAT}")
        self.gpu = bool(self.record["environment"]["gpus"])

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def provenance(self, group: str | None = None) -> str:
        """One line: file, hardware, versions, commit, command; of a suite's group, the commands that measured it."""
        env = self.record["environment"]
        cpu = env["cpu"]
        hardware = ", ".join([cpu["model"], plural(env["threads"], "thread"), *cpu["flags"]])
        if self.gpu:
            driver = f", driver {env['driver']}" if env.get("driver") else ""
            hardware = f"{', '.join(gpu['name'] for gpu in env['gpus'])}{driver}; {hardware}"
        versions = [f"torch {env['torch']}", f"Python {env['python']}"]
        versions += [f"{package} {version}" for package, version in env["packages"].items() if package != "ddt-fast"]
        commit = (env["commit"] or "not known")[:12]
        commit += " with uncommitted changes" * bool(env.get("uncommitted_changes"))
        load = f"load before {env['load_average'][0]}; " if env.get("load_average") else ""
        numbers = [case["session"] for case in self.record.get("cases", []) if case["group"] == group]
        sessions = [self.record["sessions"][number] for number in dict.fromkeys(numbers)] or [env]
        commands = ", ".join(dict.fromkeys(f"`{session['command']}`" for session in sessions))
        return (
            f"From `{self.name}`: {hardware}; {load}{', '.join(versions)}; commit {commit}; {env['date'][:10]}; "
            f"{commands}."
        )
