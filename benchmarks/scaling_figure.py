"""The figure of `benchmarks.scaling`: a row counted, a row measured, a row simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figures import figure


def plot(record: dict[str, Any], path: Path) -> None:
    """Write it to `path`."""
    title = "Cost as the work grows: counted from the plan, measured here, simulated"
    with figure(path, 3, 4, (22, 14), title) as axes:
        _counted(axes[:4], record["counted"])
        _measured(axes[4:8], record["measured"])
        _simulated(axes[8:], record["simulated"])


def _counted(axes: list[Any], counted: dict[str, Any]) -> None:
    size, batch, depth, refresh = axes
    pixels = [row["image_size"] for row in counted["image_size"]]
    for name in counted["plans"]:
        size.plot(pixels, [row[f"tflop_per_image {name}"] for row in counted["image_size"]], marker="o", label=name)
    for row in counted["image_size"]:
        place = (row["image_size"], row["tflop_per_image published"])
        text = f"attention {row['attention_share']:.0%}"
        size.annotate(text, place, xytext=(-4, 7), textcoords="offset points", ha="right", fontsize=8)
    size.set_xscale("log", base=2)
    size.set_xticks(pixels, [str(p) for p in pixels])
    size.set(yscale="log", xlabel="image side, px", ylabel="TFLOP per image", title="counted: image size")
    batches = [row["batch"] for row in counted["batch"]]
    for name in counted["plans"]:
        batch.plot(batches, [row[f"cache_gigabytes {name}"] for row in counted["batch"]], marker="o", label=name)
    weights = counted["batch"][0]["weights_gigabytes"]
    batch.axhline(weights, color="grey", linestyle=":", label=f"weights, {weights:.2f} GB")
    batch.set_xscale("log", base=2)
    batch.set(yscale="log", xlabel="batch", ylabel="GB kept between steps", title="counted: batch, 256 px")
    names = [row["model"] for row in counted["depth"]]
    for i, name in enumerate(counted["plans"]):
        places = [j + 0.27 * (i - 1) for j in range(len(names))]
        depth.bar(places, [row[f"tflop_per_image {name}"] for row in counted["depth"]], width=0.25, label=name)
    depth.set_xticks(range(len(names)), names, fontsize=8)
    depth.set(ylabel="TFLOP per image", title="counted: depth and width, 256 px")
    every = [row["refresh_every"] for row in counted["refresh"]]
    refresh.plot(every, [row["tflop_per_image"] for row in counted["refresh"]], marker="o", label="states held")
    refresh.set(xlabel="encoder at every K-th step", ylabel="TFLOP per image", title="counted: refresh, 250 steps")
    refresh.set_ylim(bottom=0)
    _finish(axes)


def _measured(axes: list[Any], measured: dict[str, Any]) -> None:
    panels = {"image size": axes[0], "batch": axes[1], "depth": axes[2], "refresh": axes[3]}
    for name, axis in panels.items():
        rows = [row for row in measured[name] if "skipped" not in row]
        if name != "refresh":
            rows.sort(key=lambda row: row["gflop"])
        places = range(len(rows))
        if name == "batch":
            # An image's share: 1 everywhere if a batch took as long as its images one by one.
            base = rows[0]["images"]
            values = [row["measured_ratio"] * base / row["images"] for row in rows]
            counted = [row["counted_ratio"] * base / row["images"] for row in rows]
            label = "per image, ratio to the base"
        else:
            values, counted = [row["measured_ratio"] for row in rows], [row["counted_ratio"] for row in rows]
            label = "ratio to the base"
        axis.plot(places, values, marker="o", label="time, measured")
        axis.plot(places, counted, marker="x", linestyle="--", label="FLOPs, counted")
        axis.set_xticks(places, [row["at"] for row in rows])
        if name in ("image size", "depth"):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set(ylabel=label, title=f"measured: {name}")
    _finish(axes)


def _simulated(axes: list[Any], sources: list[dict[str, Any]]) -> None:
    sampling, weak, strong, hours = axes
    for source in sources:
        rows, name = source["sampling"], source["from"].split(",")[0]
        ranks = [row["ranks"] for row in rows]
        sampling.plot(ranks, [row["efficiency"] for row in rows], marker="o", label=name)
        hours.plot(ranks, [row["seconds"] / 3600 for row in rows], marker="o", label=name)
    floor = sources[-1]
    for axis, kind in ((weak, "weak"), (strong, "strong")):
        for i, link in enumerate(dict.fromkeys(row["bandwidth"] for row in floor["training"])):
            for overlapped, style in ((False, "--"), (True, "-")):
                rows = [r for r in floor["training"] if (r["bandwidth"], r["overlapped"]) == (link, overlapped)]
                values = [row[f"{kind}_efficiency"] for row in rows]
                label = f"{link.split(' (')[0]}{', overlapped' if overlapped else ''}"
                axis.plot([r["ranks"] for r in rows], values, style, color=f"C{i}", marker="o", label=label)
    sampling.set(ylabel="share of n times one rank's speed", title="simulated: sampling 50,000 images")
    hours.set(ylabel="hours", yscale="log", title="simulated: sampling 50,000 images")
    each, total = floor["training_inputs"]["weak_batch_per_rank"], floor["training_inputs"]["strong_total_batch"]
    weak.set(title=f"simulated: training XL/2 at its floor, {each} images a rank")
    strong.set(title=f"simulated: training XL/2 at its floor, {total} images in all")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set(xlabel="ranks")
    for axis in (sampling, weak, strong):
        axis.set_ylim(0, 1.05)
    _finish(axes)


def _finish(axes: list[Any]) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
