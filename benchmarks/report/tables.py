"""Markdown from the record of a results file: a function for every kind of table, which yields its paragraphs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.report.text import ratio, relative, significant, table
from benchmarks.sampler_errors import MEASURES, label
from ddt_fast.config import SamplingConfig
from ddt_fast.wording import plural

Record = dict[str, Any]

ABOVE = (
    "Shares above 100%: caches serve a case so small, or its GEMMs have a better shape than the square one that the "
    "ceiling was measured with."
)


def suite_group(record: Record, group: str) -> Iterator[str]:
    """A group's table, and what is missing. On a CPU ratios only: times there say nothing of another machine."""
    cases = [case for case in record["cases"] if case["group"] == group]
    gpu = bool(record["environment"]["gpus"])
    head = ["case", "variant", *["ms"] * gpu, "of the baseline's time", "middle half", *["img/s", "TFLOP/s"] * gpu]
    rows = []
    for case in cases:
        base = next((variant for variant in case["variants"] if variant["baseline"]), None)
        for i, variant in enumerate(case["variants"]):
            seconds, images, flops = variant["seconds"], variant["images_per_second"], variant["flops"]
            spread = (ratio(seconds[f"{q}_quartile"] / base["seconds"]["median"]) for q in ("lower", "upper") if base)
            name = f"**{variant['name']}**" if variant["ours"] else variant["name"]
            row = [
                "" if i else f"{case['case'].strip(' ,')}; {case['size']}",
                name + " (baseline)" * variant["baseline"],
            ]
            row += [significant(1e3 * seconds["median"])] * gpu
            row += [ratio(variant["ratio"]), " to ".join(spread)]
            if gpu:
                row += [significant(images) if images else "-"]
                row += [significant(flops / seconds["median"] / 1e12) if flops else "-"]
            share = f"{variant['share_of_ceiling']:.0%} {variant['bound_by']}" if variant["bound_by"] else "-"
            rows.append([*row, share, relative(variant["error"]), variant["note"]])
    if rows:
        columns = zip([*head, "share of ceiling", "error", "note"], *rows, strict=True)
        kept = [column for column in columns if any(cell.strip("-") for cell in column[1:])]
        yield table([column[0] for column in kept], list(zip(*(column[1:] for column in kept), strict=True)))
    if any((v["share_of_ceiling"] or 0) > 1 for case in cases for v in case["variants"]):
        yield ABOVE
    yield from _not_timed(record, group, cases)


def _not_timed(record: Record, group: str, cases: Sequence[Record]) -> Iterator[str]:
    for key, words in (("missing", "Missing"), ("wrong", "Wrong, so not timed")):
        names: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in (entry for case in cases for entry in case[key]):
            names[entry["reason"]][entry["name"]] += 1
        entries = []
        for reason, found in names.items():
            who = ", ".join(f"{name} ({plural(number, 'case')})" for name, number in found.items())
            entries.append(f"{who}: {reason}")
        if entries:
            yield f"{words}: {'; '.join(entries)}."
    measured = {f"{group}: {case['case']}, {case['size']}" for case in cases}
    skipped = {e["case"]: e["reason"] for s in record["sessions"] for e in s["not_measured"]}
    left_out = [f"{t}: {r}" for t, r in skipped.items() if t.startswith(f"{group}:") and t not in measured]
    if left_out:
        yield f"Not measured: {'; '.join(left_out)}."


def suite_groups(record: Record) -> list[str]:
    """In the order in which they were measured, those without a single result included."""
    names = [case["group"] for case in record["cases"]]
    names += [entry["case"].split(":")[0] for session in record["sessions"] for entry in session["not_measured"]]
    return list(dict.fromkeys(names))


def training_step(record: Record) -> Iterator[str]:
    """Time and memory of every variant against the reference's; on a GPU img/s too."""
    gpu = bool(record["environment"]["gpus"])
    head = ["variant", "times faster", "kept for backward", "peak", "gradients off by"]
    rows = []
    for row in record["rows"]:
        numbers = (row[name] for name in ("times_faster", "kept_of_reference", "peak_of_reference"))
        line = [row["variant"], *(f"{number:.2f}" for number in numbers), relative(row["gradient_error"])]
        line += [significant(row[name]) for name in ("images_per_second", "tflops")] * gpu
        rows.append(line + [_percent(row["mfu"])] * gpu)
    yield (
        f"{record['model']}, batch {record['batch_size']}; time, and memory beyond weights, moments and averages, "
        "against the first row:"
    )
    yield table(head + ["img/s", "TFLOP/s", "MFU"] * gpu, rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


CPU_SETTINGS = {
    "refresh 1": "every step refreshed",
    "refresh 6": "`refresh_every=6`",
    "refresh 6, guidance every 10, linear": "`--fast`",
}
"""Names of `benchmarks.cpu_sampling.SETTINGS` as users know them."""


def cpu_sampling(record: Record) -> Iterator[str]:
    """Times faster by setting and precision; every precision's forward pass; whole runs against what their steps add up
    to."""
    rows = record["sampling"]["settings"]
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = {row["engine"]: row for row in rows if row["setting"] == setting}
        faster = [f"{own[engine]['times_faster_than_published']:.1f}" if engine in own else None for engine in engines]
        evaluations = next(iter(own.values()))["network_evaluations"]
        lines.append([CPU_SETTINGS.get(setting, setting), *faster, evaluations])
    yield (
        f"{record['model']}, random weights, batch {record['batch_size']}, time per image against the fp32 reference "
        "run the published way, runs of 250 steps put together from the times of their steps:"
    )
    yield table(["", *(f"{engine}: times faster" for engine in engines), "network evaluations"], lines)
    rows = [[r["variant"], ratio(r["of_reference"]), relative(r["relative_error"])] for r in record["forward"]]
    yield table(["forward of a guidance pair", "of the reference's time", "error"], rows)
    yield (
        "Whole runs of fewer steps, against what the times of their steps add up to. With random weights and refreshes "
        "so far apart, errors compare precisions; they do not say what a shortcut costs:"
    )
    runs = []
    for row in record["runs"]:
        numbers = (ratio(row["seconds"] / row["composed_seconds"]), relative(row["relative_error"]))
        runs.append([f"{row['engine']}, {row['setting']}", row["num_steps"], *numbers])
    yield table(["run", "steps", "measured / put together", "error"], runs)


FORECAST_ROWS = (
    ("everything evaluated", "encoder, w 2", "everything", None),
    ("hold, K = 2 (the paper: no loss of FID)", "encoder, w 2", "hold", 2),
    ("hold, K = 6", "encoder, w 2", "hold", 6),
    ("linear, K = 6", "encoder, w 2", "linear", 6),
    ("linear, K = 6 and M = 10 (`--fast`)", "both", "K 6, M 10, linear", 6),
    ("linear, K = 10 and M = 10", "both", "K 10, M 10, linear", 10),
)
"""(label, group, series, place on the group's axis, None: any) of the settings that the table shows."""


def forecast(record: Record) -> Iterator[str]:
    """Some settings, and --fast at a high guidance scale."""

    def find(group: str, series: str, at: float | None) -> Record:
        found = [r for r in record["results"] if (r["group"], r["series"]) == (group, series) and at in (None, r["at"])]
        return found[0]

    rows = []
    for words, *key in FORECAST_ROWS:
        row = find(*key)
        errors = (f"{off:.4f}" if (off := row[name]) else "0" for name in ("error", "error_median"))
        scores = (f"{row['frechet']:.3f}", f"{row['accuracy']:.1%}", f"{row['tflop_per_image_xl2_256']:.1f}")
        rows.append([words, *errors, *scores])
    head = [f"digits, 250 steps, w 2 in (0.3, 1), {record['num_samples']} samples", "error of all samples"]
    head += ["median error", "pixel Fréchet distance", "class accuracy", "TFLOP at XL/2, 256 px"]
    yield table(head, rows)
    fast, hold = (find("guidance scale", series, 4) for series in ("--fast", "hold K 2"))
    numbers = [row[name] for row in (fast, hold) for name in ("error", "error_median")]
    yield (
        "Errors are relative L2 distances from the first row's samples: of all as one vector, and the median of each "
        "by itself. At guidance 4 `--fast` has errors of {:.4f} and {:.4f}, hold with K = 2 of {:.4f} and {:.4f}. The "
        "file holds all settings.".format(*numbers)
    )


def pareto(record: Record) -> Iterator[str]:
    """What to take for a budget, by each measure of the error, and what people run."""
    points = record["points"]

    def words(point: Record) -> str:
        fields = {name: value for name, value in point["settings"].items() if name != "guidance_interval"}
        return label(SamplingConfig(**fields))

    def row(point: Record) -> list[object]:
        numbers = [point[name] for name in ("tflop_xl2", *MEASURES, "frechet")]
        return [words(point), *numbers, f"{point['accuracy']:.1%}"]

    head = ["setting", "TFLOP per image", *MEASURES.values(), "Fréchet", "accuracy"]
    measures: dict[tuple[float, float, int], list[str]] = defaultdict(list)
    for entry in record["recommended"]:
        key = (entry["budget_tflop_xl2"], points[entry["point"]]["tflop_xl2"], entry["point"])
        measures[key].append(MEASURES[entry["by"]])
    truth = record["truth"]
    yield (
        f"Digits model, {record['samples']} samples, errors against {truth['what']}, whose Fréchet distance is "
        f"{truth['frechet']:.3f}: one below it is not a gain. Errors are relative L2 distances: of all samples as one "
        "vector, and the median and 90% quantile of each by itself. TFLOP per image at XL/2, 256 px. Recommended for a "
        "budget, by each:"
    )
    chosen = [[f"{key[0]:g}", ", ".join(measures[key]), *row(points[key[2]])] for key in sorted(measures)]
    yield table(["budget", "by", *head], chosen)
    yield "What people run, and the cheapest of all that errs no more by any of the three:"
    cheapest = {e["point"]: e["cheapest"] for e in record["better_than_named"] if e["cheapest"] is not None}
    better = {i: f"{words(points[j])}: {points[j]['tflop_xl2']:.3g} TFLOP" for i, j in cheapest.items()}
    named = [[p["name"], *row(p), better.get(i)] for i, p in enumerate(points) if "name" in p]
    yield table(["name", *head, "cheapest"], named)


def candidates(record: Record) -> Iterator[str]:
    """Errors by candidate and guidance setting, and Fréchet distances."""
    guidance = list(dict.fromkeys(row["guidance"] for row in record["errors"]))
    lines = []
    for name in dict.fromkeys(row["candidate"] for row in record["errors"]):
        own = {row["guidance"]: row for row in record["errors"] if row["candidate"] == name}
        errors = [" / ".join(f"{1000 * own[setting][m]:.3g}" for m in MEASURES) for setting in guidance]
        lines.append([name, max(row["tflop_xl2"] for row in own.values()), *errors])
    yield (
        f"Digits model, {record['samples']} samples, errors in thousandths against the solution of the ODE, by "
        "guidance: of all samples as one vector / median / 90% quantile of each by itself. TFLOP per image at XL/2, "
        "256 px, of the guidance that takes most:"
    )
    yield table(["setting", "TFLOP", *guidance], lines)
    yield (
        f"Pixel Fréchet distance of {record['frechet_samples']} samples to all real digits, guidance "
        f"{record['frechet_guidance']}, and its difference from the first row's with the same seeds; ± is the standard "
        "error over ten blocks of samples:"
    )
    distances = [
        [r["candidate"], r["tflop_xl2"], f"{r['frechet']:.4f} ± {r['frechet_sd']:.4f}", _difference(r)]
        for r in record["frechet"]
    ]
    yield table(["setting", "TFLOP", "Fréchet", "difference"], distances)


SHORT = (
    *("Euler 250, published", "Euler 250, K 2 held", "Euler 250, --fast", "Euler 250, even steps, --fast"),
    *(f"multistep 3, {steps}, K 2 quadratic" for steps in (55, 35)),
)
"""The candidates of the short table."""


def candidates_in_short(record: Record) -> Iterator[str]:
    """Errors of a few at the published guidance, and their Fréchet distances where they were measured."""
    guidance = record["frechet_guidance"]
    distances = {row["candidate"]: row for row in record["frechet"]}
    rows = [
        [r["candidate"], f"{r['tflop_xl2']:.1f}", *(r[m] for m in MEASURES), _difference(distances.get(r["candidate"]))]
        for r in record["errors"]
        if r["candidate"] in SHORT and r["guidance"] == guidance
    ]
    head = [f"digits, w {guidance}", "TFLOP at XL/2, 256 px", "error of all samples", "median error"]
    yield table([*head, "90% of errors below", "Fréchet distance off by"], rows)
    first = record["frechet"][0]
    yield (
        f"Errors of {record['samples']} samples against the ODE's solution. Fréchet distances of "
        f"{record['frechet_samples']} samples to all real digits, off that of a run that is nearly the solution, with "
        f"the same seeds (with others it would be {first['frechet']:.3f} ± {first['frechet_sd']:.3f})."
    )


def _difference(row: Record | None) -> str | None:
    if row is None or "difference" not in row:
        return None
    return f"{row['difference']:+.5f} ± {row['difference_sd']:.5f}"
