"""One figure for a results file that has something to show: a picture beside it that carries the file's digest, so that
one drawn from other results is found out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report.files import ResultsFile
from benchmarks.sampler_errors import front
from ddt_fast.files import atomic_file

Record = dict[str, Any]


def is_current(file: ResultsFile) -> bool:
    """Whether the file's picture, if it has one, was drawn from the file as it is."""
    from PIL import Image

    if file.kind not in FIGURES:
        return True
    if not file.picture.is_file():
        return False
    with Image.open(file.picture) as image:
        return bool(image.info.get("Description") == file.digest)


def draw(file: ResultsFile, folder: Path | None = None) -> None:
    """Draw a results file's picture, if it has one, beside it or into another folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if file.kind not in FIGURES:
        return
    title, fill = FIGURES[file.kind]
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    try:
        fill(axis, file.record)
        axis.set(xlabel="TFLOP per image at XL/2, 256 px", ylabel="median relative error", yscale="log", title=title)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        with atomic_file((folder or file.path.parent) / file.picture.name) as temporary:
            figure.savefig(temporary, dpi=90, metadata={"Description": file.digest})
    finally:
        plt.close(figure)


def _draw_forecast(axis: Any, record: Record) -> None:
    """Median error over cost, by what is held or forecast."""
    chosen = [r for r in record["results"] if r["group"] in ("encoder, w 2", "guidance", "both") and r["error"] > 0]
    names = [(r["group"].split(",")[0], r["series"].split(", ")[-1]) for r in chosen]
    for group, series in dict.fromkeys(names):
        own = [r for r, name in zip(chosen, names, strict=True) if name == (group, series)]
        points = sorted((r["tflop_per_image_xl2_256"], r["error_median"]) for r in own)
        axis.plot(*zip(*points, strict=True), marker="o", label=f"{group}: {series}")


def _draw_pareto(axis: Any, record: Record) -> None:
    """Median error over cost, the front, and the settings that have a name."""
    points = [(p["tflop_xl2"], p["error_median"], p.get("name")) for p in record["points"] if "error_median" in p]
    costs, errors = [p[0] for p in points], [p[1] for p in points]
    axis.scatter(costs, errors, s=16, color="grey", label=f"near the front, {record['samples']} samples")
    edge = front(costs, errors)
    step = {"color": "crimson", "drawstyle": "steps-post", "label": "front"}
    axis.plot([costs[i] for i in edge], [errors[i] for i in edge], **step)
    for i, (x, y, name) in enumerate(sorted((x, y, name) for x, y, name in points if name)):
        axis.scatter(x, y, s=60, facecolors="none", edgecolors="black")
        place = {"xytext": (10, 14 + 13 * (i % 4)), "textcoords": "offset points"}
        axis.annotate(name, (x, y), fontsize=8, arrowprops={"arrowstyle": "-", "linewidth": 0.5}, **place)
    axis.set_xscale("log")


# By kind of file: title, and what draws it.
FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "forecast": ("What shortcuts cost: digits, 250 steps, w 2, against evaluating everything", _draw_forecast),
    "pareto": ("What FLOPs buy: digits, w 2, settings near the front against the ODE's solution", _draw_pareto),
}
