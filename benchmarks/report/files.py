"""Results files, told apart by what they hold, and the figures of those that have something to show."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import FORMAT
from ddt_fast.files import atomic_file, file_sha256, read_json
from ddt_fast.wording import plural

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results"

# By kind of file: the command that writes one, and the keys it is known by.
KINDS = {
    "suite": ("pytest benchmarks --benchmark-only --results benchmarks/results/suite.json", {"format", "cases"}),
    "cpu_sampling": ("python -m benchmarks.cpu_sampling", {"forward", "sampling", "runs"}),
    "headline": ("python -m benchmarks.headline", {"headline", "steps", "missing"}),
    "training_step": ("python -m benchmarks.training_step", {"batch_size", "rows"}),
    "host_time": ("python -m benchmarks.host_time", {"host_time"}),
    "forecast": ("python -m benchmarks.forecast", {"num_samples", "results"}),
    "pareto": ("python -m benchmarks.pareto", {"points", "budgets", "fitted", "bfloat16"}),
    "candidates": ("python -m benchmarks.candidates", {"errors", "frechet"}),
}


class ResultsFile:
    """A file of one of KINDS, and the record it holds; ValueError where it is of none, or of another format.

    name: within the repository, else of the file alone. picture: beside it. gpu: whether it was made on one.
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

    def picture_is_current(self) -> bool:
        """Whether its picture, if it should have one, was drawn from the file as it is."""
        from PIL import Image

        if self.kind not in FIGURES:
            return True
        if not self.picture.is_file():
            return False
        with Image.open(self.picture) as image:
            return bool(image.info.get("Description") == file_sha256(self.path))

    def draw(self, folder: Path | None = None) -> None:
        """Draw its picture, if it should have one, beside it or into another folder. The picture carries the file's
        digest, so that one drawn from other results is found out."""
        from matplotlib.figure import Figure

        if self.kind not in FIGURES:
            return
        title, fill = FIGURES[self.kind]
        figure = Figure(figsize=(8, 6), layout="constrained")
        axis = figure.subplots()
        fill(axis, self.record)
        axis.set(xlabel="TFLOP per image at XL/2, 256 px", ylabel="median relative error", yscale="log", title=title)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        with atomic_file((folder or self.path.parent) / self.picture.name) as temporary:
            figure.savefig(temporary, dpi=90, metadata={"Description": file_sha256(self.path)})


def _draw_forecast(axis: Any, record: Record) -> None:
    """Median error over cost, by what is held or forecast."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in record["results"]:
        if row["group"] in ("encoder, w 2", "guidance", "both") and row["error"] > 0:
            name = f"{row['group'].split(',')[0]}: {row['series'].split(', ')[-1]}"
            lines[name].append((row["tflop_per_image_xl2_256"], row["error_median"]))
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)


# Lines of the picture: series, label, style. Few, so that it says one thing.
PARETO_LINES = (
    ("Euler", "Euler", {"linestyle": ":", "color": "#6b7280"}),
    ("multistep 3, K 2 quadratic", "multistep, states shared", {"linestyle": "--", "color": "#2563eb"}),
    ("corrected 3", "corrected (pec), order 3", {"linewidth": 2.5, "color": "#c2410c"}),
    ("corrected 2", "corrected (pec), order 2", {"color": "#ea9a62"}),
    ("published", "as published", {"linestyle": "", "marker": "s", "color": "black"}),
)


def _draw_pareto(axis: Any, record: Record) -> None:
    """Median error over cost, a line for every solver."""
    for series, name, style in PARETO_LINES:
        points = [point for point in record["points"] if point["series"] == series]
        axis.plot(*_cost_and_error(points), label=name, **{"marker": "o", "markersize": 4, **style})
    kept = [row["fitted"] | {"tflop_xl2": row["tflop_xl2"]} for row in record["fitted"] if row["fitted"]]
    axis.plot(*_cost_and_error(kept), label="fitted to the model", marker="D", color="#15803d")
    axis.set_xscale("log")


def _cost_and_error(points: list[Record]) -> tuple[list[float], list[float]]:
    return [point["tflop_xl2"] for point in points], [point["error_median"] for point in points]


# By kind of file: title, and what draws it.
FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "forecast": ("What shortcuts cost: digits, 250 steps, w 2, against evaluating everything", _draw_forecast),
    "pareto": ("Corrected steps come nearer for fewer FLOPs: digits, w 2, against the ODE's solution", _draw_pareto),
}
