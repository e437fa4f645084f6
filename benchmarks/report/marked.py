"""Pages with generated text between markers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ddt_fast.files import atomic_file

END = "<!-- end of results -->"
MARKED = re.compile(r"<!-- results: (?P<name>[^>]*?) -->\n(?P<text>.*?)" + re.escape(END), re.DOTALL)


def fill(page: str, sections: Mapping[str, str], place: str) -> str:
    """The page with every marked text replaced by the section of its name; filling it again changes nothing.

    Args:
        place: of the page, for messages.

    Raises:
        ValueError: a name that no section has, or a marker without its counterpart.
    """
    found = list(MARKED.finditer(page))
    openings, endings = page.count("<!-- results:"), page.count(END)
    if not len(found) == openings == endings or any("<!-- results:" in match["text"] for match in found):
        raise ValueError(
            f"{place} has {openings} markers '<!-- results: NAME -->' and {endings} '{END}'; each needs its counterpart"
        )

    def replaced(match: re.Match[str]) -> str:
        if match["name"] not in sections:
            raise ValueError(f"{place} wants results called {match['name']!r}; allowed: {', '.join(sections)}")
        return f"<!-- results: {match['name']} -->\n{sections[match['name']]}\n{END}"

    return MARKED.sub(replaced, page)


def outside(page: str) -> str:
    """What is written by hand: the page without its marked texts."""
    return MARKED.sub("", page)


def stale(path: Path, sections: Mapping[str, str]) -> list[str]:
    """Names of the marked texts that are not what the sections say."""
    page = path.read_text(encoding="utf-8")
    fill(page, sections, str(path))
    return [match["name"] for match in MARKED.finditer(page) if match["text"] != f"{sections[match['name']]}\n"]


def rewrite(path: Path, sections: Mapping[str, str]) -> bool:
    """Fill the page at `path`; whether that changed it."""
    page = path.read_text(encoding="utf-8")
    filled = fill(page, sections, str(path))
    if filled != page:
        with atomic_file(path) as file:
            file.write_text(filled, encoding="utf-8")
    return filled != page
