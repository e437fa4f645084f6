"""Markdown from the record of a results file: a function for every kind of table, which yields its paragraphs."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ddt_fast.config import SamplingConfig
from ddt_fast.wording import plural

Record = dict[str, Any]

# The measures of `sampler_errors.sample_errors`, and what tables call them.
MEASURES = {"error": "error", "error_median": "median", "error_p90": "90%"}

ABOVE = (
    "Shares above 100%: caches serve a case so small, or its GEMMs have a better shape than the square one that the "
    "ceiling was measured with."
)


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose columns line up; the head's cells stand between " | ", floats have 3 significant digits,
    None is "-"."""
    cells = [head.split(" | "), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return significant(value) if isinstance(value, float) else str(value)


def significant(value: float) -> str:
    """Three significant digits, never in powers of ten from 0.0001 to a million."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def ratio(value: float | None) -> str | None:
    """Of two times: two decimals, or two digits below 0.1."""
    return None if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def relative(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def label(config: SamplingConfig) -> str:
    """Settings in a few words."""
    solver = {"euler": "Euler", "lms": f"multistep {config.order}", "pec": f"corrected {config.order}"}[config.solver]
    words = [solver, f"{config.num_steps} steps"]
    if config.refresh_every > 1:
        words.append(f"K {config.refresh_every} {config.state_forecast}")
    if config.guidance_every > 1:
        words.append(f"M {config.guidance_every} {config.guidance_forecast}")
    return ", ".join(words)


def suite_group(record: Record, group: str) -> Iterator[str]:
    """A group's table, without the columns in which no row has anything, and what is missing. On a CPU ratios only:
    times there say nothing of another machine."""
    cases = [case for case in record["cases"] if case["group"] == group]
    rows = [_suite_row(case, variant) for case in cases for variant in case["variants"]]
    hidden = () if record["environment"]["gpus"] else ("ms", "img/s", "TFLOP/s")
    if rows:
        kept = [name for name in rows[0] if name not in hidden and any(row[name] for row in rows)]
        yield table(" | ".join(kept), ([row[name] for name in kept] for row in rows))
    if any((v["share_of_ceiling"] or 0) > 1 for case in cases for v in case["variants"]):
        yield ABOVE
    yield from _not_timed(record, group, cases)


def _suite_row(case: Record, variant: Record) -> dict[str, object]:
    """A variant by column; the first of a case has the case's name."""
    seconds, first, flops = variant["seconds"], case["variants"][0], variant["flops"]
    quartiles = [seconds[f"{q}_quartile"] / first["seconds"]["median"] for q in ("lower", "upper")]
    name = f"**{variant['name']}**" if variant["ours"] else variant["name"]
    return {
        "case": "" if variant is not first else f"{case['case'].strip(' ,')}; {case['size']}",
        "variant": name + " (baseline)" * variant["baseline"],
        "ms": 1e3 * seconds["median"],
        "of the baseline's time": ratio(variant["ratio"]),
        "middle half": " to ".join(map(str, map(ratio, quartiles))) if first["baseline"] else "",
        "img/s": variant["images_per_second"],
        "TFLOP/s": flops and flops / seconds["median"] / 1e12,
        "share of ceiling": variant["bound_by"] and f"{variant['share_of_ceiling']:.0%} {variant['bound_by']}",
        "error": relative(variant["error"]),
        "note": variant["note"],
    }


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


def headline(record: Record) -> Iterator[str]:
    """Seconds per image and images per second by plan; on a CPU ratios only."""
    gpu = bool(record["environment"]["gpus"])
    rows: list[list[object]] = []
    every_step = [row for row in record["headline"] if row["plan"] == "refresh 1"]
    sizes = {(row["case"], row["engine"], row["batch_size"]): row for row in every_step}
    for row in record["headline"]:
        batch = row["batch_size"]
        base = sizes.get((row["case"], row["engine"], batch))
        times = [base and ratio(row["seconds_per_batch"] / base["seconds_per_batch"])]
        if gpu:
            times += [row["seconds_per_batch"] / batch, row["images_per_second"], row["tflops"]]
        off = row["whole_run"] and f"{row['whole_run']['difference']:+.1%}"
        cells = f"{row['case']}, B {batch}", row["engine"], row["plan"], row["tflop_per_image"]
        rows.append([*cells, *times, off])
    if rows:
        yield (
            f"Medians of every kind of step, multiplied by how often a plan of {record['num_steps']} steps has it "
            "(`--fast`: 21). The last column is by how much a whole run took longer, where one was timed:"
        )
        head = "case | engine | plan | TFLOP an image | of refresh 1's time"
        head += " | s per image | img/s | TFLOP/s" * gpu
        yield table(f"{head} | a whole run", rows)
    if record["missing"]:
        yield "Missing: " + "; ".join(f"{entry['case']}: {entry['reason']}" for entry in record["missing"]) + "."


def training_step(record: Record) -> Iterator[str]:
    gpu = bool(record["environment"]["gpus"])
    rows: list[list[object]] = []
    for row in record["rows"]:
        numbers = (row[name] for name in ("times_faster", "kept_of_reference", "peak_of_reference"))
        rows.append([row["variant"], *(f"{number:.2f}" for number in numbers), relative(row["gradient_error"])])
        if gpu:
            mfu = None if row["mfu"] is None else f"{row['mfu']:.0%}"
            rows[-1] += [row["images_per_second"], row["tflops"], mfu]
    yield (
        f"{record['model']}, batch {record['batch_size']}; time, and memory beyond weights, moments and averages, "
        "against the first row:"
    )
    head = "variant | times faster | kept for backward | peak | gradients off by"
    yield table(head + " | img/s | TFLOP/s | MFU" * gpu, rows)


def host_time(record: Record) -> Iterator[str]:
    """µs a call."""
    rows = []
    for row in record["host_time"]:
        launches = len(row["launches"])
        times = row["decided"], row["known"], row["known"] / launches
        rows.append([row["call"], launches, *(f"{time:.0f}" for time in times)])
    yield table("launcher | kernels | decided each time, µs | known signature, µs | of that a launch, µs", rows)


# Names of `benchmarks.cpu_sampling.SETTINGS` as users know them.
CPU_SETTINGS = {
    "refresh 1": "every step refreshed",
    "refresh 6": "`refresh_every=6`",
    "refresh 6, guidance every 10, linear": "`refresh_every=6`, `guidance_every=10`, linear",
}


def cpu_sampling(record: Record) -> Iterator[str]:
    """Times faster by setting and precision; every precision's forward pass; whole runs against what their steps add up
    to."""
    settings = record["sampling"]["settings"]
    faster = {(row["engine"], row["setting"]): f"{row['times_faster_than_published']:.1f}" for row in settings}
    engines = dict.fromkeys(row["engine"] for row in settings)
    evaluations = {row["setting"]: row["network_evaluations"] for row in settings}
    yield (
        f"{record['model']}, random weights, batch {record['batch_size']}, time per image against the fp32 reference "
        "run the published way, runs of 250 steps put together from the times of their steps:"
    )
    yield table(
        " | ".join(["", *(f"{engine}: times faster" for engine in engines), "network evaluations"]),
        (
            [CPU_SETTINGS.get(setting, setting), *(faster.get((engine, setting)) for engine in engines), number]
            for setting, number in evaluations.items()
        ),
    )
    yield table(
        "forward of a guidance pair | of the reference's time | error",
        ([r["variant"], ratio(r["of_reference"]), relative(r["relative_error"])] for r in record["forward"]),
    )
    yield (
        "Whole runs of fewer steps, against what the times of their steps add up to. With random weights and refreshes "
        "so far apart, errors compare precisions; they do not say what a shortcut costs:"
    )
    runs: list[list[object]] = []
    for row in record["runs"]:
        numbers = (ratio(row["seconds"] / row["composed_seconds"]), relative(row["relative_error"]))
        runs.append([f"{row['engine']}, {row['setting']}", row["num_steps"], *numbers])
    yield table("run | steps | measured / put together | error", runs)


# (label, group, series, place on the group's axis, None: any) of the settings that the table shows.
FORECAST_ROWS = (
    ("everything evaluated", "encoder, w 2", "everything", None),
    ("hold, K = 2 (the paper: no loss of FID)", "encoder, w 2", "hold", 2),
    ("hold, K = 6", "encoder, w 2", "hold", 6),
    ("linear, K = 6", "encoder, w 2", "linear", 6),
    ("linear, K = 6 and M = 10", "both", "K 6, M 10, linear", 6),
    ("linear, K = 10 and M = 10", "both", "K 10, M 10, linear", 10),
)


def forecast(record: Record) -> Iterator[str]:
    def find(group: str, series: str, at: float | None) -> Record:
        found = [r for r in record["results"] if (r["group"], r["series"]) == (group, series) and at in (None, r["at"])]
        return found[0]

    rows = []
    for words, *key in FORECAST_ROWS:
        row = find(*key)
        errors = (f"{off:.4f}" if (off := row[name]) else "0" for name in ("error", "error_median"))
        scores = (f"{row['frechet']:.3f}", f"{row['accuracy']:.1%}", f"{row['tflop_per_image_xl2_256']:.1f}")
        rows.append([words, *errors, *scores])
    head = f"digits, 250 steps, w 2 in (0.3, 1), {record['num_samples']} samples | error of all samples | median error"
    yield table(f"{head} | pixel Fréchet distance | class accuracy | TFLOP at XL/2, 256 px", rows)
    yield (
        "Errors are relative L2 distances from the first row's samples: of all as one vector, and the median of each "
        "by itself. The file holds all settings."
    )


BUDGETS = (3.0, 5.0, 7.5, 10.0, 15.0, 25.0, 50.0)  # TFLOP per image at XL/2, 256 px


def pareto(record: Record) -> Iterator[str]:
    points, truth = record["points"], record["truth"]
    named = [point for point in points if point["series"].startswith("published")]
    corrected = [point for point in points if point["series"].startswith("corrected")]
    others = [point for point in points if point not in named and point not in corrected]

    def row(point: Record | None) -> list[object]:
        if point is None:
            return [None] * 3
        fields = {name: value for name, value in point["settings"].items() if name != "guidance_interval"}
        return [label(SamplingConfig(**fields)), f"{point['tflop_xl2']:.1f}", _thousandths(point)]

    def best(of: list[Record], budget: float) -> Record | None:
        affordable = (point for point in of if point["tflop_xl2"] <= budget)
        return min(affordable, key=lambda point: point["error"], default=None)

    yield (
        f"Digits model, guidance {record['guidance_scale']:g} in (0.3, 1), {record['samples']} samples; errors in "
        f"thousandths against {truth['what']}: of all samples as one vector / median / 90% quantile of each by itself. "
        "TFLOP per image at XL/2, 256 px. For a budget, the least error of all that the solvers with and without "
        "correction reach, with everything evaluated or with shared states or differences:"
    )
    head = "TFLOP | error"
    yield table(
        f"budget | without correction | {head} | corrected | {head}",
        ([f"{budget:g}", *row(best(others, budget)), *row(best(corrected, budget))] for budget in BUDGETS),
    )
    yield (
        "Fitted to this model by `python -m ddt_fast.tune_sampler`, for guidance 1.5, 2 and 4 at once. A fit that is "
        "not better on other noises, in error of all and median and at all three, is not kept:"
    )
    yield table("start | TFLOP | error | fitted | minutes on this machine", map(_fitted, record["fitted"]))
    coarse = (f"{_thousandths(row)} with {row['num_steps']} steps" for row in record["bfloat16"])
    yield f"In bfloat16, corrected 3 has errors of {', '.join(coarse)}."
    yield "As published, and with less evaluated:"
    yield table(f"name | setting | {head} | Fréchet", ([p["series"], *row(p), f"{p['frechet']:.3f}"] for p in named))


def candidates(record: Record) -> Iterator[str]:
    errors: dict[str, list[str]] = defaultdict(list)
    costs: dict[str, float] = defaultdict(float)
    for row in record["errors"]:
        errors[row["candidate"]].append(_thousandths(row))
        costs[row["candidate"]] = max(costs[row["candidate"]], row["tflop_xl2"])
    guidance = dict.fromkeys(row["guidance"] for row in record["errors"])
    yield (
        f"Digits model, {record['samples']} samples, errors in thousandths against the solution of the ODE, by "
        "guidance: of all samples as one vector / median / 90% quantile of each by itself. TFLOP per image at XL/2, "
        "256 px, of the guidance that takes most:"
    )
    head = " | ".join(["setting | TFLOP", *guidance])
    yield table(head, ([name, costs[name], *own] for name, own in errors.items()))
    yield (
        f"Pixel Fréchet distance of {record['frechet_samples']} samples to all real digits, guidance "
        f"{record['frechet_guidance']}, and its difference from the first row's with the same seeds; ± is the standard "
        "error over ten blocks of samples:"
    )
    distances = (
        [r["candidate"], r["tflop_xl2"], f"{r['frechet']:.4f} ± {r['frechet_sd']:.4f}", _difference(r)]
        for r in record["frechet"]
    )
    yield table("setting | TFLOP | Fréchet | difference", distances)


# The candidates of the short table.
SHORT = (
    *("Euler 250, published", "Euler 250, K 2 held", "Euler 250, K 6, M 10 linear"),
    *("multistep 3, 35, K 2 quadratic", "corrected 3, 32", "corrected 3, 21", "corrected 2, 10"),
)


def candidates_in_short(record: Record) -> Iterator[str]:
    """Errors of a few at the published guidance, and their Fréchet distances where they were measured."""
    guidance, first = record["frechet_guidance"], record["frechet"][0]
    distances = {row["candidate"]: _difference(row) for row in record["frechet"]}
    rows = (
        [r["candidate"], f"{r['tflop_xl2']:.1f}", *(r[m] for m in MEASURES), distances.get(r["candidate"])]
        for r in record["errors"]
        if r["candidate"] in SHORT and r["guidance"] == guidance
    )
    head = f"digits, w {guidance} | TFLOP at XL/2, 256 px | error of all samples | median error"
    yield table(f"{head} | 90% of errors below | Fréchet distance off by", rows)
    yield (
        f"Errors of {record['samples']} samples against the ODE's solution. Fréchet distances of "
        f"{record['frechet_samples']} samples to all real digits, as the difference from a run that is nearly the "
        f"solution, with the same seeds (with others it would be {first['frechet']:.3f} ± {first['frechet_sd']:.3f})."
    )


def _fitted(row: Record) -> list[object]:
    after = _thousandths(row["fitted"]) if row["fitted"] else "not kept"
    start = f"corrected {row['order']}, {row['num_steps']} steps"
    return [start, f"{row['tflop_xl2']:.1f}", _thousandths(row["rule"]), after, f"{row['seconds'] / 60:.1f}"]


def _thousandths(errors: Record) -> str:
    return " / ".join(f"{1000 * errors[name]:.3g}" for name in MEASURES)


def _difference(row: Record) -> str | None:
    return f"{row['difference']:+.5f} ± {row['difference_sd']:.5f}" if "difference" in row else None
