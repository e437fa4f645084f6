"""Markdown from the files of the measurements that are no part of the suite."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.pareto_settings import MEASURES, label
from benchmarks.report.files import Fields, ResultsFile
from benchmarks.report.suite_tables import error, ratio
from benchmarks.tables import significant, table
from ddt_fast.config import SamplingConfig

SETTINGS = {
    "refresh 1": "every step refreshed",
    "refresh 6": "`refresh_every=6`",
    "refresh 6, guidance every 10, linear": "`--fast`",
}
"""Names of `benchmarks.models.SETTINGS` as users know them."""

OURS = "FusedDDT"
"""How our variants' names begin in training_step.json."""


def _setting(name: str) -> str:
    return SETTINGS.get(name, name)


def cpu_sampling(file: ResultsFile) -> Iterator[str]:
    """Times faster by setting and precision, and a forward's."""
    rows = file.content.object("sampling").objects("settings")
    engines = list(dict.fromkeys(row.text("engine") for row in rows))
    found = {(row.text("setting"), row.text("engine")): row for row in rows}
    lines = []
    for setting in dict.fromkeys(row.text("setting") for row in rows):
        own = [found.get((setting, engine)) for engine in engines]
        faster = [None if row is None else f"{row.number('times_faster_than_published'):.1f}" for row in own]
        evaluations = next(row.integer("network_evaluations") for row in own if row is not None)
        lines.append([_setting(setting), *faster, evaluations])
    yield (
        f"{file.content.text('model')}, random weights, batch {file.content.integer('batch_size')}, time per image "
        "against the fp32 reference run the published way, runs of 250 steps put together from the times of "
        "their steps:"
    )
    yield table(["", *(f"{engine}: times faster" for engine in engines), "network evaluations"], lines)
    forward = [row for row in file.content.objects("forward") if row.text("variant") in engines]
    times = [
        f"{ratio(row.number('of_reference'))} of the reference's time in {row.text('variant')} (error "
        f"{row.number('relative_error'):.1g})"
        for row in forward
    ]
    if times:
        yield f"One forward of a guidance pair takes {', '.join(times)}."
    yield file.provenance()


def cpu_sampling_details(file: ResultsFile) -> Iterator[str]:
    """Every precision's forward pass, and whole runs against what their steps add up to."""
    rows = [
        [row.text("variant"), ratio(row.number("of_reference")), error(row.number("relative_error"))]
        for row in file.content.objects("forward")
    ]
    yield table(["forward of a guidance pair", "of the reference's time", "error"], rows)
    runs = [
        [
            f"{row.text('engine')}, {row.text('setting')}",
            row.integer("num_steps"),
            ratio(row.number("seconds") / row.positive("composed_seconds")),
            error(row.number("relative_error")),
        ]
        for row in file.content.objects("runs")
    ]
    yield (
        "Whole runs of fewer steps, against what the times of their steps add up to. With random weights and refreshes "
        "so far apart, errors compare precisions; they do not say what a shortcut costs:"
    )
    yield table(["run", "steps", "measured / put together", "error"], runs)
    yield file.provenance()


def training_step(file: ResultsFile) -> Iterator[str]:
    """Time and memory of every variant against the reference's; on a GPU img/s too."""
    head = ["variant", "times faster", "kept for backward", "peak", "gradients off by"]
    head += ["img/s", "TFLOP/s", "MFU"] if file.gpu else []
    rows = []
    for row in file.content.objects("rows"):
        line = [row.text("variant"), f"{row.number('times_faster'):.2f}"]
        line += [f"{row.number(f'{name}_of_reference'):.2f}" for name in ("kept", "peak")]
        line.append(error(row.number("gradient_error")))
        if file.gpu:
            mfu = row.optional("mfu")
            line += [significant(row.number("images_per_second")), significant(row.number("tflops"))]
            line.append("-" if mfu is None else f"{mfu:.0%}")
        rows.append(line)
    yield (
        f"{file.content.text('model')}, batch {file.content.integer('batch_size')}; time, and memory beyond weights, "
        "moments and averages, against the first row:"
    )
    yield table(head, rows)
    yield file.provenance()


def training_summary(file: ResultsFile) -> list[str] | None:
    """A row of the suite's summary: the fastest of ours and of the others; None where there is but a baseline."""
    rows = file.content.objects("rows")
    ours = [row for row in rows[1:] if row.text("variant").startswith(OURS)]
    peers = [row for row in rows[1:] if row not in ours]
    if not ours:
        return None

    def fastest(rows: list[Fields]) -> str:
        row = max(rows, key=lambda row: row.number("times_faster"), default=None)
        return "" if row is None else f"{ratio(1 / row.positive('times_faster'))}: {row.text('variant')}"

    line = [f"training step: {file.content.text('model')}, batch {file.content.integer('batch_size')}"]
    line += [rows[0].text("variant"), fastest(ours), fastest(peers)]
    if file.gpu:
        best = max(ours, key=lambda row: row.number("times_faster"))
        mfu = best.optional("mfu")
        line += [significant(best.number("images_per_second")), "-" if mfu is None else f"{mfu:.0%} (MFU)"]
    return line


FORECAST_ROWS = (
    ("everything evaluated", "encoder, w 2", "everything", None),
    ("hold, K = 2 (the paper: no loss of FID)", "encoder, w 2", "hold", 2),
    ("hold, K = 6", "encoder, w 2", "hold", 6),
    ("linear, K = 6", "encoder, w 2", "linear", 6),
    ("linear, K = 6 and M = 10 (`--fast`)", "both", "K 6, M 10, linear", 6),
    ("linear, K = 10 and M = 10", "both", "K 10, M 10, linear", 10),
)
"""(label, group, series, place on the group's axis, None: any) of the settings that the README shows."""


def forecast(file: ResultsFile) -> Iterator[str]:
    """The settings that the README shows, and --fast at a high guidance scale."""

    def find(group: str, series: str, at: float | None) -> Fields:
        for row in file.content.objects("results"):
            if (row.text("group"), row.text("series")) == (group, series) and at in (None, row.number("at")):
                return row
        raise ValueError(f"{file.name} has no result of {series!r} at {at} in group {group!r}")

    rows = []
    for words, *key in FORECAST_ROWS:
        row = find(*key)
        rows.append(
            [
                words,
                *(f"{off:.4f}" if (off := row.number(name)) else "0" for name in ("error", "error_median")),
                f"{row.number('frechet'):.3f}",
                f"{row.number('accuracy'):.1%}",
                f"{row.number('tflop_per_image_xl2_256'):.1f}",
            ]
        )
    samples = file.content.integer("num_samples")
    head = [f"digits, 250 steps, w 2 in (0.3, 1), {samples} samples", "error of all samples", "median error"]
    yield table([*head, "pixel Fréchet distance", "class accuracy", "TFLOP at XL/2, 256 px"], rows)
    fast, hold = (find("guidance scale", series, 4) for series in ("--fast", "hold K 2"))
    numbers = [row.number(name) for row in (fast, hold) for name in ("error", "error_median")]
    yield (
        "Errors are relative L2 distances from the first row's samples: of all as one vector, and the median of each "
        "by itself. At guidance 4 `--fast` has errors of {:.4f} and {:.4f}, hold with K = 2 of {:.4f} and {:.4f}. The "
        "file holds all settings.".format(*numbers)
    )
    yield file.provenance()


def pareto(file: ResultsFile) -> Iterator[str]:
    """What to take for a budget, by each measure of the error, and what people run."""
    points = file.content.objects("points")

    def numbered(entry: Fields, name: str) -> Fields:
        number = entry.integer(name)
        if not 0 <= number < len(points):
            raise ValueError(f"{entry.place}.{name} is {number}; allowed: 0 to {len(points) - 1}")
        return points[number]

    def row(point: Fields) -> list[object]:
        numbers = [point.number(name) for name in ("tflop_xl2", *MEASURES, "frechet")]
        return [_pareto_label(point), *numbers, f"{point.number('accuracy'):.1%}"]

    head = ["setting", "TFLOP per image", *MEASURES.values(), "Fréchet", "accuracy"]
    measures: dict[tuple[float, float, int], list[str]] = {}
    for entry in file.content.objects("recommended"):
        cost = numbered(entry, "point").number("tflop_xl2")
        key = (entry.number("budget_tflop_xl2"), cost, entry.integer("point"))
        measures.setdefault(key, []).append(MEASURES[entry.text("by")])
    chosen = [[f"{key[0]:g}", ", ".join(measures[key]), *row(points[key[2]])] for key in sorted(measures)]
    truth = file.content.object("truth")
    yield (
        f"Digits model, {file.content.integer('samples')} samples, errors against {truth.text('what')}, whose Fréchet "
        f"distance is {truth.number('frechet'):.3f}: one below it is no gain. Errors are relative L2 distances: of all "
        "samples as one vector, and the median and 90% quantile of each by itself. TFLOP per image at XL/2, 256 px. "
        "Recommended for a budget, by each:"
    )
    yield table(["budget", "by", *head], chosen)
    yield "What people run, and the cheapest of all that errs no more by any of the three:"
    better = {}
    for entry in file.content.objects("better_than_named"):
        if entry.has("cheapest"):
            cheapest = numbered(entry, "cheapest")
            better[entry.integer("point")] = f"{_pareto_label(cheapest)}: {cheapest.number('tflop_xl2'):.3g} TFLOP"
    named = [(i, point) for i, point in enumerate(points) if point.has("name")]
    yield table(["name", *head, "cheapest"], [[p.text("name"), *row(p), better.get(i)] for i, p in named])
    yield file.provenance()


def candidates(file: ResultsFile) -> Iterator[str]:
    """Errors by candidate and guidance setting, and Fréchet distances."""
    rows = file.content.objects("errors")
    guidance = list(dict.fromkeys(row.text("guidance") for row in rows))
    found = {(row.text("candidate"), row.text("guidance")): row for row in rows}
    lines = []
    for name in dict.fromkeys(row.text("candidate") for row in rows):
        own = [found.get((name, setting)) for setting in guidance]
        errors = [row and " / ".join(f"{1000 * row.number(measure):.3g}" for measure in MEASURES) for row in own]
        lines.append([name, max(row.number("tflop_xl2") for row in own if row), *errors])
    yield (
        f"Digits model, {file.content.integer('samples')} samples, errors in thousandths against the solution of the "
        "ODE, by guidance: of all samples as one vector / median / 90% quantile of each by itself. TFLOP per image at "
        "XL/2, 256 px, of the guidance that takes most:"
    )
    yield table(["setting", "TFLOP", *guidance], lines)
    distances = [
        [
            row.text("candidate"),
            row.number("tflop_xl2"),
            f"{row.number('frechet'):.4f} ± {row.number('frechet_sd'):.4f}",
            _difference(row) if row.has("difference") else None,
        ]
        for row in file.content.objects("frechet")
    ]
    yield (
        f"Pixel Fréchet distance of {file.content.integer('frechet_samples')} samples to all real digits, guidance "
        f"{file.content.text('frechet_guidance')}, and its difference from the first row's with the same seeds; ± is "
        "the standard error over ten blocks of samples:"
    )
    yield table(["setting", "TFLOP", "Fréchet", "difference"], distances)
    yield file.provenance()


SHORT = (
    *("Euler 250, published", "Euler 250, K 2 held", "Euler 250, --fast", "Euler 250, even steps, --fast"),
    *(f"multistep 3, {steps}, K 2 quadratic" for steps in (55, 35)),
)
"""Of the candidates, those that the README shows."""


def candidates_in_short(file: ResultsFile) -> Iterator[str]:
    """Errors of a few at the published guidance, and their Fréchet distances where they were measured."""
    guidance = file.content.text("frechet_guidance")
    distances = {row.text("candidate"): row for row in file.content.objects("frechet")}
    rows = []
    for row in file.content.objects("errors"):
        name = row.text("candidate")
        if name in SHORT and row.text("guidance") == guidance:
            off = _difference(distances[name]) if name in distances else None
            rows.append([name, f"{row.number('tflop_xl2'):.1f}", *(row.number(measure) for measure in MEASURES), off])
    measures = ["error of all samples", "median error", "90% of errors below", "Fréchet distance off by"]
    yield table([f"digits, w {guidance}", "TFLOP at XL/2, 256 px", *measures], rows)
    noise = [
        f" (with others it would be {row.number('frechet'):.3f} ± {row.number('frechet_sd'):.3f})"
        for row in file.content.objects("frechet")[:1]
    ]
    yield (
        f"Errors of {file.content.integer('samples')} samples against the ODE's solution. Fréchet distances of "
        f"{file.content.integer('frechet_samples')} samples to all real digits, off that of a run that is nearly the "
        f"solution, with the same seeds{''.join(noise)}."
    )
    yield file.provenance()


def _difference(row: Fields) -> str:
    return f"{row.number('difference'):+.5f} ± {row.number('difference_sd'):.5f}"


def _pareto_label(point: Fields) -> str:
    settings = point.object("settings")
    values = {name: settings.integer(name) for name in ("num_steps", "refresh_every", "guidance_every")}
    words = {name: settings.text(name) for name in ("solver", "state_forecast", "guidance_forecast")}
    order = {"order": settings.integer("order")} if settings.has("order") else {}
    return label(SamplingConfig(**values, **words, **order))  # type: ignore[arg-type]


SWEEPS = ("image size", "batch", "depth", "refresh", "training batch")


def scaling(file: ResultsFile) -> Iterator[str]:
    """The measured sweeps, as ratios to each one's first point."""
    measured = file.content.object("measured")
    rows: list[list[object]] = []
    for sweep in SWEEPS:
        for i, row in enumerate(measured.objects(sweep)):
            names = ("measured_ratio", "counted_ratio", "measured_over_counted")
            values: list[object] = [None if row.has("skipped") else row.number(name) for name in names]
            note = f", skipped: {row.text('skipped')}" if row.has("skipped") else ""
            rows.append(["" if i else sweep, f"{row.text('at')}{note}", *values])
    yield (
        f"FusedDDT, {measured.text('dtype')}, C {measured.object('model').integer('hidden_size')}; times and counted "
        "FLOPs, each against the first point of its sweep:"
    )
    yield table(["what grows", "to", "time", "FLOPs", "time / FLOPs"], rows)
    yield "Counts for XL/2 and simulated ranks are in the same file."
    yield file.provenance()
