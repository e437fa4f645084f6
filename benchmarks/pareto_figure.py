"""The figure of `benchmarks.pareto`: the screening, losses over costs, and the guidance intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import figure
from benchmarks.fronts import front

COSTS = {"tflop_xl2": "TFLOP per image at XL/2, 256 px", "mflop_digits": "MFLOP per image of the digits model"}
FRECHET, ACCURACY = "pixel Fréchet distance", "class accuracy"
ERRORS = {
    "screening_error": "relative error of all samples",
    "error": "relative error of all samples",
    "error_median": "median of the samples' relative errors",
    "error_p90": "90% quantile of the samples' relative errors",
}


def plot(record: dict[str, Any], path: Path) -> None:
    """Write the figure of a record, as pareto.json holds it, to `path`."""
    title = "Sampling settings on the trained digits model against the guided ODE's solution, w 2"
    points = [point for point in record["points"] if "error" in point]
    screened = [point for point in record["points"] if "screening_error" in point]
    with figure(path, 2, 5, (32, 12), title) as axes:
        few, many = (f"{words} samples" for words in (record["screen_samples"], f"near the front, {record['samples']}"))
        for axis, name in zip(axes[:4], ("screening_error", "error", "error_median", "error_p90"), strict=True):
            chosen, heading = (screened, f"the grid, {few}") if axis is axes[0] else (points, many)
            _losses(axis, chosen, "tflop_xl2", name, heading)
            axis.set(yscale="log", ylabel=ERRORS[name])
        _losses(axes[5], points, "mflop_digits", "error_median", many)
        axes[5].set(yscale="log", ylabel=ERRORS["error_median"])
        _accuracies(axes[6], points, record["truth"]["accuracy"])
        for axis, cost in zip(axes[7:9], COSTS, strict=True):
            _losses(axis, points, cost, "frechet", many)
            axis.axhline(record["truth"]["frechet"], color="black", linewidth=1, label="the truth")
            axis.axhline(record["truth"]["frechet_real"], color="grey", linestyle=":", label="real digits")
            axis.set(ylabel=FRECHET)
        _intervals(axes[4], record["intervals"], "frechet", FRECHET)
        _intervals(axes[9], record["intervals"], "accuracy", ACCURACY)
        for axis in axes:
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize="small")


def _losses(axis: Any, points: Sequence[dict[str, Any]], cost: str, loss: str, title: str) -> None:
    from matplotlib.colors import LogNorm

    values = [(point[cost], point[loss]) for point in points]
    steps = [point["settings"]["num_steps"] for point in points]
    drawn = axis.scatter(*_columns(values), s=24, c=steps, norm=LogNorm(10, 250), cmap="viridis", zorder=2)
    axis.figure.colorbar(drawn, ax=axis, label="solver steps", ticks=[10, 25, 50, 100, 250], format="%d")
    edge = [values[i] for i in front(*_columns(values))]
    axis.plot(*_columns(edge), color="crimson", drawstyle="steps-post", linewidth=2, zorder=1, label="front")
    named = sorted((point[cost], point[loss], point["name"]) for point in points if "name" in point)
    for i, (x, y, name) in enumerate(named):
        axis.scatter(x, y, s=70, facecolors="none", edgecolors="black", zorder=3)
        # At four heights, so that neighbours do not cover each other.
        place = (10, 14 + 13 * (i % 4))
        line = {"arrowstyle": "-", "linewidth": 0.5}
        axis.annotate(name, (x, y), xytext=place, textcoords="offset points", fontsize=8, arrowprops=line)
    axis.set_xscale("log")
    axis.set(xlabel=COSTS[cost], title=title)


def _accuracies(axis: Any, points: Sequence[dict[str, Any]], truth: float) -> None:
    axis.scatter(*_columns([(point["tflop_xl2"], point["accuracy"]) for point in points]), s=24)
    axis.axhline(truth, color="black", linewidth=1, label="the truth")
    axis.set_xscale("log")
    axis.set(xlabel=COSTS["tflop_xl2"], ylabel=ACCURACY, title="near the front")


def _intervals(axis: Any, points: Sequence[dict[str, Any]], name: str, label: str) -> None:
    shortcuts = {False: "everything evaluated", True: "encoder and guidance at every 2nd step, forecast"}
    for with_shortcuts, series in shortcuts.items():
        chosen = [p for p in points if (p["settings"]["refresh_every"] > 1) == with_shortcuts]
        axis.scatter(*_columns([(p["tflop_xl2"], p[name]) for p in chosen]), s=50, label=series)
        for i, p in enumerate(chosen):
            low, high = p["settings"]["guidance_interval"]
            place = (0, 7 + 12 * (i % 3))
            text = f"({low:g}, {high:g})"
            axis.annotate(text, (p["tflop_xl2"], p[name]), xytext=place, textcoords="offset points", fontsize=8)
    axis.set(xlabel=COSTS["tflop_xl2"], ylabel=label, title="other guidance intervals, multistep 3, 25 steps")
    axis.margins(0.15)


def _columns(points: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [[point[i] for point in points] for i in range(2)]
