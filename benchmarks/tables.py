"""Records and tables as people read them: JSON with a row a line, and columns that line up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddt_fast.files import atomic_file

LINE = 600
"""Characters up to which a JSON value stays on one line."""


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write an object as JSON, floats rounded to 5 significant digits, what fits in a line on one line."""
    with atomic_file(path) as file:
        file.write_text(_text(_rounded(record), 0) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _text(value: Any, depth: int) -> str:
    line = json.dumps(value)
    if not isinstance(value, (dict, list)) or (depth and len(line) <= LINE):
        return line
    pad = "\n" + " " * (depth + 1)
    if isinstance(value, dict):
        inner = [f"{json.dumps(key)}: {_text(item, depth + 1)}" for key, item in value.items()]
    else:
        inner = [_text(item, depth + 1) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + pad + f",{pad}".join(inner) + "\n" + " " * depth + closing


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up; floats with 3 significant digits, None as "-"."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return significant(value) if isinstance(value, float) else str(value)


def significant(value: float) -> str:
    """Three significant digits, never in powers of ten from 0.0001 to a million."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
