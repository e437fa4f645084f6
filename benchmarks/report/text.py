"""How numbers and tables read in Markdown."""

from collections.abc import Iterable, Sequence


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
    """A relative error."""
    return f"{error:.1e}" if error else "0"
