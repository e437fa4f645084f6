"""Tables and figures from results files; the READMEs' numbers.

    python -m benchmarks.report                           every table, printed
    python -m benchmarks.report FILES --output-dir out    report.md and figures of these files
    python -m benchmarks.report --write-readme            the marked texts of the READMEs, and their figures
    python -m benchmarks.report --check                   exit code 2 where those are not what the files say

Without FILES: all of benchmarks/results/*.json.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.report.files import FOLDER, ROOT, Results, load
from benchmarks.report.marked import rewrite, stale
from benchmarks.report.plots import figures
from benchmarks.report.sections import texts, whole
from ddt_fast.command import CommandParser, run_command
from ddt_fast.files import atomic_file, output_folder

PAGES = ("README.md", "benchmarks/README.md")


def texts_of(page: Path, results: Results) -> dict[str, str]:
    """Every section as it stands in a page."""
    return texts(results, FOLDER.relative_to(page.parent).as_posix() + "/")


def write_readme(results: Results) -> None:
    """Bring the pages and their figures up to date."""
    for figure in figures(results):
        if not figure.is_current(FOLDER):
            figure.draw(FOLDER / figure.name)
    for name in PAGES:
        page = ROOT / name
        print(f"{name}: {'written' if rewrite(page, texts_of(page, results)) else 'nothing to change'}")


def check(results: Results) -> None:
    """ValueError where a page or a figure is not what the results say."""
    wrong = [f"{name} ({text})" for name in PAGES for text in stale(ROOT / name, texts_of(ROOT / name, results))]
    wrong += [figure.name for figure in figures(results) if not figure.is_current(FOLDER)]
    if wrong:
        raise ValueError(
            f"not what the results files say: {', '.join(wrong)}; run python -m benchmarks.report --write-readme"
        )


def main(arguments: list[str] | None = None) -> None:
    """Read, then print, write or check."""
    parser = CommandParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", help="results files; default: benchmarks/results/*.json")
    parser.add_argument("--output-dir", help="folder for report.md and the figures")
    parser.add_argument("--write-readme", action="store_true", help="fill README.md and benchmarks/README.md")
    parser.add_argument("--check", action="store_true", help="exit code 2 unless they are what the files say")
    options = parser.parse_args(arguments)
    if options.check and (options.write_readme or options.output_dir is not None):
        raise ValueError("--check writes nothing: it goes with no --write-readme and no --output-dir")
    results = load([Path(file) for file in options.files] or sorted(FOLDER.glob("*.json")))
    if options.check:
        check(results)
        print("the READMEs are what the results files say")
        return
    if options.write_readme:
        write_readme(results)
    if options.output_dir is not None:
        folder = output_folder(options.output_dir)
        for figure in figures(results):
            figure.draw(folder / figure.name)
        with atomic_file(folder / "report.md") as file:
            file.write_text(whole(results), encoding="utf-8")
        print(f"{folder / 'report.md'}: written")
    elif not options.write_readme:
        print(whole(results), end="")


if __name__ == "__main__":
    run_command(main)
