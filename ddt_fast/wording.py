"""Words that messages share."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """A number of things: "1 image", "50,000 images", "0 classes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"
