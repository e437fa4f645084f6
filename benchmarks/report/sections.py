"""The sections of generated text, by name; each is what stands between markers of that name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from textwrap import TextWrapper

from benchmarks.report import floors, other_tables
from benchmarks.report.files import KINDS, Results, ResultsFile
from benchmarks.report.plots import figures
from benchmarks.report.suite_tables import NO_GPU, suite_section, summary_head, summary_rows
from benchmarks.tables import table

PROSE = TextWrapper(128, break_long_words=False, break_on_hyphens=False)
Section = Callable[[Results, str], str]
"""From results, and where the figures are, as a link sees them: Markdown."""


def _of_kind(kind: str, *parts: Callable[[ResultsFile], Iterator[str]]) -> Section:
    """All that `parts` say of every file of a kind; where there is none, how to make one."""

    def section(results: Results, _: str) -> str:
        texts = [text for file in results.of(kind) for part in parts for text in part(file)]
        return "\n\n".join(texts) or missing(kind)

    return section


def missing(kind: str) -> str:
    """Said of a file that does not exist."""
    return f"No `{kind}.json` yet; `{KINDS[kind][0]}` makes it."


def summary(results: Results, _: str) -> str:
    """A line a piece of work, for each kind of machine."""
    lacking = [missing(kind) for kind in ("suite", "training_step") if not results.of(kind)]
    first = [*([] if any(file.gpu for file in results.files) else [NO_GPU]), *lacking]
    parts = [" ".join(first)] if first else []
    for gpu in (True, False):
        files = [file for kind in ("training_step", "suite") for file in results.of(kind) if file.gpu == gpu]
        rows = []
        for file in files:
            line = other_tables.training_summary(file) if file.kind == "training_step" else None
            rows += [line] if line else summary_rows(file) if file.kind == "suite" else []
        if rows:
            parts.append(f"On a {'GPU' if gpu else 'CPU'}, as times of the baseline's, less is faster:")
            parts.append(table(summary_head(gpu), rows))
            parts += [file.provenance() for file in files]
    return "\n\n".join(parts)


def suite(results: Results, folder: str) -> str:
    """Every group's table, and the figures."""
    parts = [*suite_section(results), *(figure.link(folder) for figure in figures(results) if figure.of_suite)]
    return "\n\n".join(parts if results.of("suite") else [*parts, missing("suite")])


def floors_section(results: Results, folder: str) -> str:
    """What nothing can beat."""
    links = [figure.link(folder) for figure in figures(results) if not figure.of_suite]
    return "\n\n".join([floors.section(), *links])


SECTIONS: dict[str, Section] = {
    "summary": summary,
    "suite": suite,
    "CPU sampling": _of_kind("cpu_sampling", other_tables.cpu_sampling),
    "CPU sampling, details": _of_kind("cpu_sampling", other_tables.cpu_sampling_details),
    "training step": _of_kind("training_step", other_tables.training_step),
    "forecast": _of_kind("forecast", other_tables.forecast),
    "pareto": _of_kind("pareto", other_tables.pareto),
    "candidates": _of_kind("candidates", other_tables.candidates),
    "candidates, in short": _of_kind("candidates", other_tables.candidates_in_short),
    "scaling": _of_kind("scaling", other_tables.scaling),
    "floors": floors_section,
}


def texts(results: Results, folder: str) -> dict[str, str]:
    """Every section, its prose in lines as long as the READMEs' own; `folder`: where the figures are, for links."""
    return {name: _wrapped(section(results, folder)) for name, section in SECTIONS.items()}


def _wrapped(text: str) -> str:
    lines = (line if line[:1] in "|#!" else PROSE.fill(line) for line in text.split("\n"))
    return "\n".join(lines)


def whole(results: Results) -> str:
    """A page of everything, its figures beside it."""
    parts = [f"## {name[0].upper()}{name[1:]}\n\n{text}" for name, text in texts(results, "").items()]
    return "# Benchmarks of ddt-fast\n\n" + "\n\n".join(parts) + "\n"
