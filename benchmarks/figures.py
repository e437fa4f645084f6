"""Figures of results: made without a display, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddt_fast.files import atomic_file


@contextmanager
def figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], title: str, note: str = ""
) -> Iterator[list[Any]]:
    """Yield rows x columns matplotlib axes, row by row; on success their figure is written to `path`.

    Args:
        path: of the file; its suffix chooses the format.
        size: in inches, of 90 dots.
        title: above all.
        note: a PNG's Description; empty leaves it out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield list(axes.flat)
        drawn.suptitle(title)
        with atomic_file(path) as file:
            drawn.savefig(file, dpi=90, metadata={"Description": note} if note else None)
    finally:
        plt.close(drawn)
