"""Plots of training logs: loss, REPA loss, gradient norm, learning rate, img/s."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from ddt_fast.files import atomic_file
from ddt_fast.training.log import read_log

_PANELS = {
    "loss": "loss",
    "repa_loss": "REPA loss",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "images_per_second": "img/s",
}
_COLOURS = ("#2563eb", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490", "#a16207", "#475569")

_FEW = 20
"""Shorter logs are not smoothed."""

Curve = NDArray[np.float64]


def plot_runs(logs: Mapping[str, Path], output: Path) -> None:
    """Plot the log.jsonl of every run, by name, into one PNG, with a panel for each metric that any run has.

    Noisy metrics are drawn twice: faint as logged, and smoothed by a Gaussian as wide as a fortieth of the lines.
    ValueError if a log is missing or damaged, or holds nothing to plot.
    """
    runs = {name: _columns(log) for name, log in logs.items()}
    panels = [metric for metric in _PANELS if any(metric in columns for columns in runs.values())]
    rows = 1 + len(panels) // 2
    figure = Figure(figsize=(11, 1.4 + 2.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, 2, height_ratios=(1.5, *[1] * (rows - 1)))
    for index, metric in enumerate(panels):
        row, column = (index + 1) // 2, (index + 1) % 2
        # The first panel has a row to itself, and so has the last one if no other panel can share its row.
        alone = index == 0 or (column == 0 and index == len(panels) - 1)
        axes = figure.add_subplot(grid[row, :] if alone else grid[row, column])
        for number, (name, columns) in enumerate(runs.items()):
            if metric in columns:
                _draw(axes, metric, *columns[metric], _COLOURS[number % len(_COLOURS)], name)
        _dress(axes, metric, [columns[metric][1] for columns in runs.values() if metric in columns])
        if index == 0:
            axes.legend(loc="upper right", frameon=False)
    with atomic_file(output) as file:
        figure.savefig(file, dpi=150, format="png")


def _columns(log: Path) -> dict[str, tuple[Curve, Curve]]:
    """Steps and values of each metric in a log; a null is NaN."""
    if not log.is_file():
        raise ValueError(f"{log} is missing; a training run writes it")
    rows: list[dict[str, float | None]] = []
    for row in read_log(log):
        # Concatenated logs repeat steps; the later line counts.
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    columns = {}
    for metric in _PANELS:
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        if np.isfinite(values).any():
            columns[metric] = (steps, values)
    if not columns:
        raise ValueError(f"{log} holds nothing to plot; looked for {', '.join(_PANELS)}")
    return columns


def _draw(axes: Axes, metric: str, steps: Curve, values: Curve, colour: str, name: str) -> None:
    noisy = metric != "learning_rate"
    smoothed = _smoothed(values) if noisy else values
    if metric == "grad_norm":  # spikes far above the usual value must not pull the mean up
        values = np.where(values > 0, values, np.nan)
        smoothed = np.exp(_smoothed(np.log(values)))
    if len(steps) >= _FEW and noisy:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    # A line through one point, or between two gaps, would be invisible.
    marker = "." if len(steps) < _FEW else None
    axes.plot(steps, smoothed, color=colour, marker=marker, linewidth=1.6, label=name)


def _smoothed(values: Curve) -> Curve:
    """A Gaussian mean over neighbouring lines, without NaNs; few lines are returned unchanged."""
    if len(values) < _FEW:
        return values
    deviation = len(values) / 80
    offsets = np.arange(-int(3 * deviation), int(3 * deviation) + 1)
    kernel = np.exp(-0.5 * (offsets / deviation) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), kernel, "same")
    weight = np.convolve(known.astype(np.float64), kernel, "same")
    return np.divide(total, weight, out=np.full_like(values, np.nan), where=weight > 0)


def _dress(axes: Axes, metric: str, curves: list[Curve]) -> None:
    axes.set_title(_PANELS[metric], loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    axes.tick_params(which="both", labelsize=9, length=0)
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if metric == "grad_norm":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    if metric in ("learning_rate", "images_per_second"):
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0, 1.1 * max(float(np.nanmax(values)) for values in curves) or 1.0)
        return
    # The drop of the first steps and single spikes may leave the panel: they would flatten the rest.
    tails = np.concatenate([values[len(values) // 20 :] for values in curves])
    tails = tails[np.isfinite(tails)]
    if len(tails) >= _FEW:
        low, high = np.percentile(tails, (1, 99), method="nearest")
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
