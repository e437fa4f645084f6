"""The suite's results as Markdown: a table a group, and one line a piece of work.

On a CPU nothing but ratios is printed: times there stand for no machine but the one they were taken on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from benchmarks.report.files import CaseResult, Results, ResultsFile, Variant, plural
from benchmarks.tables import significant, table

NO_GPU = "**No GPU run exists yet:** nothing here was measured on a GPU."
ABOVE = (
    "Shares above 100%: caches serve a case so small, or its GEMMs have a better shape than the square one that the "
    "ceiling was measured with."
)

Column = tuple[str, Callable[[CaseResult, Variant], str]]


def group_section(file: ResultsFile, group: str) -> str:
    """A group's table, what is missing, and where it comes from."""
    cases = [case for case in file.cases if case.group == group]
    columns = _columns(cases, file.gpu)
    rows = []
    for case in cases:
        for i, variant in enumerate(case.variants):
            first = "" if i else f"{case.name.strip(' ,')}; {case.size}"
            rows.append([first, *(cell(case, variant) for _, cell in columns)])
    parts = [table(["case", *(head for head, _ in columns)], rows)] if rows else []
    if any((v.share or 0) > 1 for case in cases for v in case.variants):
        parts.append(ABOVE)
    parts += notes(file, group)
    parts.append(file.provenance(group))
    return "\n\n".join(parts)


def _columns(cases: Sequence[CaseResult], gpu: bool) -> list[Column]:
    """What there is to say of these cases."""
    columns: list[Column] = [("variant", lambda _, v: variant_name(v))]
    if gpu:
        columns.append(("ms", lambda _, v: significant(1e3 * v.median)))
        columns.append(
            ("middle half", lambda _, v: f"{significant(1e3 * v.lower)} to {significant(1e3 * v.upper)}"),
        )
        columns.append(("of the baseline's time", lambda _, v: ratio(v.ratio)))
        columns.append(("img/s", lambda _, v: _or_dash(v.images_per_second, significant)))
        columns.append(("TFLOP/s", lambda _, v: _or_dash(v.flops, lambda f: significant(f / v.median / 1e12))))
        columns.append(("TB/s", lambda _, v: _or_dash(v.bytes, lambda b: significant(b / v.median / 1e12))))
    else:
        columns.append(("of the baseline's time", lambda _, v: ratio(v.ratio)))
        columns.append(("middle half", _relative_spread))
    columns.append(("share of ceiling", lambda _, v: share(v)))
    columns.append(("error", lambda _, v: error(v.error)))
    columns.append(("note", lambda _, v: v.note))

    def useful(column: Column) -> bool:
        return any(column[1](case, v).strip("-") for case in cases for v in case.variants)

    return [column for column in columns if useful(column)]


def _relative_spread(case: CaseResult, variant: Variant) -> str:
    base = case.baseline
    return "-" if base is None else f"{ratio(variant.lower / base.median)} to {ratio(variant.upper / base.median)}"


def _or_dash(value: float | None, shown: Callable[[float], str]) -> str:
    return shown(value) if value else "-"


def variant_name(variant: Variant) -> str:
    """Ours in bold, the baseline marked."""
    name = f"**{variant.name}**" if variant.ours else variant.name
    return f"{name} (baseline)" if variant.baseline else name


def ratio(value: float | None) -> str:
    """Of two times: two decimals, or two digits where that says nothing."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def error(value: float) -> str:
    """A relative error."""
    return f"{value:.1e}" if value else "0"


def share(variant: Variant) -> str:
    """Of the ceiling that bounds the work."""
    return "-" if variant.share is None else f"{variant.share:.0%} {variant.bound_by}"


def notes(file: ResultsFile, group: str) -> Iterator[str]:
    """What a group has no time of, with the reasons."""
    for attribute, words in (("missing", "Missing"), ("wrong", "Wrong, so not timed")):
        names: dict[str, Counter[str]] = defaultdict(Counter)
        for case in file.cases:
            if case.group == group:
                for name, reason in getattr(case, attribute):
                    names[reason][name] += 1
        entries = []
        for reason, found in names.items():
            who = ", ".join(f"{name} ({plural(number, 'case')})" for name, number in found.items())
            entries.append(f"{who}: {reason}")
        if entries:
            yield f"{words}: {'; '.join(entries)}."
    skipped = [f"{title}: {reason}" for title, reason in file.not_measured if title.startswith(f"{group}:")]
    if skipped:
        yield f"Not measured: {'; '.join(skipped)}."


def suite_section(results: Results) -> Iterator[str]:
    """Every group of every suite."""
    if not any(file.gpu for file in results.files):
        yield NO_GPU
    for file in results.of("suite"):
        for group in file.groups:
            where = "on a GPU" if file.gpu else "on a CPU"
            yield f"### {group.capitalize()}, {where}\n\n{group_section(file, group)}"


SUMMARY_GROUPS = ("model", "sampling", "training", "data", "evaluation")
"""Those that stand for something a user does. Kernels alone do not."""


def summary_rows(file: ResultsFile) -> list[list[str]]:
    """A row for every amount of work that a case's own variants take: the fastest of ours, and the fastest of the
    others that does the baseline's work, against the baseline; on a GPU our img/s and share of the ceiling too."""
    rows = []
    for case in file.cases:
        base = case.baseline
        if case.group not in SUMMARY_GROUPS or base is None:
            continue
        peers = [v for v in case.variants if not v.ours and not v.baseline and v.flops == base.flops]
        peer = min(peers, key=lambda v: v.median, default=None)
        works = dict.fromkeys(v.flops for v in case.variants if v.ours)
        for i, work in enumerate(works):
            best = min((v for v in case.variants if v.ours and v.flops == work), key=lambda v: v.median)
            shown = [f"{case.group}: {case.name}, {case.size}", base.name] if i == 0 else ["", ""]
            row = [*shown, f"{ratio(best.ratio)}: {best.name}"]
            row.append(f"{ratio(peer.ratio)}: {peer.name}" if peer is not None and i == 0 else "")
            if file.gpu:
                row += [_or_dash(best.images_per_second, significant), share(best)]
            rows.append(row)
    return rows


def summary_head(gpu: bool) -> list[str]:
    """Of `summary_rows`."""
    head = ["work", "baseline", "ours, of the baseline's time", "fastest other, of the baseline's time"]
    return [*head, "img/s", "share of ceiling"] if gpu else head
