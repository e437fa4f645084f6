"""The figure of `benchmarks.pareto`: two losses over two costs, and the guidance intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import figure
from benchmarks.fronts import front

if TYPE_CHECKING:
    from benchmarks.pareto import Measurement, Point

COSTS = {"tflop_xl2": "TFLOP per image at XL/2, 256 px", "mflop_digits": "MFLOP per image of the digits model"}
LOSSES = {"error": "relative error of the sample", "frechet": "pixel Fréchet distance"}


def plot(measurement: Measurement, path: Path) -> None:
    """Write it to `path`."""
    title = "Sampling settings on the trained digits model against the guided ODE's solution, w 2"
    with figure(path, 2, 3, (21, 12), title) as axes:
        rows = (axes[:3], axes[3:])
        for (loss, loss_label), row in zip(LOSSES.items(), rows, strict=True):
            for (cost, cost_label), axis in zip(COSTS.items(), row[:2], strict=True):
                _losses(axis, measurement, cost, loss)
                axis.set(xlabel=cost_label, ylabel=loss_label, title=f"{loss_label} in (0.3, 1)")
        _intervals(rows[0][2], measurement.intervals, "frechet", LOSSES["frechet"])
        _intervals(rows[1][2], measurement.intervals, "accuracy", "class accuracy")


def _losses(axis: Any, measurement: Measurement, cost: str, loss: str) -> None:
    from matplotlib.colors import LogNorm

    points = measurement.finalists
    if loss == "error":
        rest = [p for p in measurement.points if p.error is None]
        screened = [(getattr(p, cost), p.screening_error) for p in rest]
        axis.scatter(*_columns(screened), s=8, color="0.8", label="screened, not near the front")
        axis.set_yscale("log")
    else:
        axis.axhline(measurement.scores["frechet"], color="black", linewidth=1, label="the truth")
        axis.axhline(measurement.scores["frechet_real"], color="grey", linestyle=":", label="real digits")
    axis.set_xscale("log")
    values = [(getattr(p, cost), getattr(p, loss)) for p in points]
    steps = [p.config.num_steps for p in points]
    drawn = axis.scatter(*_columns(values), s=28, c=steps, norm=LogNorm(10, 250), cmap="viridis", zorder=2)
    axis.figure.colorbar(drawn, ax=axis, label="solver steps", ticks=[10, 25, 50, 100, 250], format="%d")
    edge = [values[i] for i in front(*_columns(values))]
    axis.plot(*_columns(edge), color="crimson", drawstyle="steps-post", linewidth=2, zorder=1, label="front")
    for point, place in zip(points, values, strict=True):
        if point.name:
            axis.scatter(*place, s=70, facecolors="none", edgecolors="black", zorder=3)
            axis.annotate(point.name, place, xytext=(6, 5), textcoords="offset points", fontsize=8)
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="upper right", fontsize="small")


def _intervals(axis: Any, points: Sequence[Point], name: str, label: str) -> None:
    shortcuts = {False: "everything evaluated", True: "encoder and guidance at every 2nd step, forecast"}
    for with_shortcuts, series in shortcuts.items():
        chosen = [p for p in points if (p.config.refresh_every > 1) == with_shortcuts]
        axis.scatter(*_columns([(p.tflop_xl2, getattr(p, name)) for p in chosen]), s=50, label=series)
        for p in chosen:
            low, high = p.config.guidance_interval
            place = (p.tflop_xl2, getattr(p, name))
            axis.annotate(f"({low:g}, {high:g})", place, xytext=(6, 3), textcoords="offset points", fontsize=9)
    axis.set(xlabel=COSTS["tflop_xl2"], ylabel=label, title=f"guidance interval: {label}, multistep 3, 25 steps")
    axis.margins(x=0.15)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _columns(points: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [[point[i] for point in points] for i in range(2)]
