"""Tables and figures from results files, every number in the pages: `python -m benchmarks.report [FILES]`.

A block stands between `<!-- results: NAME -->` and `<!-- end of results -->`, in any of PAGES. A figure is a picture
beside its file.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import TextWrapper

from benchmarks.report import floors, tables
from benchmarks.report.files import FOLDER, KINDS, ROOT, ResultsFile
from ddt_fast.command import CommandParser, run_command
from ddt_fast.files import atomic_file, output_folder

PAGES = ("README.md", "benchmarks/README.md", "docs/sampling.md", "kernels/README.md")
END = "<!-- end of results -->"
BLOCK = re.compile(r"<!-- results: (?P<name>[^>]*?) -->\n(?P<text>.*?)" + re.escape(END), re.DOTALL)
PROSE = TextWrapper(128, break_long_words=False, break_on_hyphens=False)
NO_GPU = "**No GPU run exists yet:** nothing here was measured on a GPU."

Files = list[ResultsFile]


def of_kind(kind: str, paragraphs: Callable[[tables.Record], Iterator[str]]) -> Callable[[Files], Iterator[str]]:
    """A block from every file of a kind; where there is none, it says how to make one."""

    def block(files: Files) -> Iterator[str]:
        chosen = [file for file in files if file.kind == kind]
        for file in chosen:
            yield from paragraphs(file.record)
            yield file.provenance()
        if not chosen:
            yield missing(kind)

    return block


def missing(kind: str) -> str:
    return f"No `{kind}.json` yet; `{KINDS[kind][0]}` makes it."


def suite(files: Files) -> Iterator[str]:
    if not any(file.gpu for file in files):
        yield NO_GPU
    suites = [file for file in files if file.kind == "suite"]
    if not suites:
        yield missing("suite")
    for file in suites:
        for group in tables.suite_groups(file.record):
            yield f"### {group.capitalize()}, on a {'GPU' if file.gpu else 'CPU'}"
            yield from tables.suite_group(file.record, group)
            yield file.provenance(group)


def headline(files: Files) -> Iterator[str]:
    """Nothing where there is no file: it takes a GPU."""
    for file in files:
        if file.kind == "headline":
            yield from tables.headline(file.record)
            yield file.provenance()


BLOCKS: dict[str, Callable[[Files], Iterator[str]]] = {
    "suite": suite,
    "CPU sampling": of_kind("cpu_sampling", tables.cpu_sampling),
    "headline": headline,
    "training step": of_kind("training_step", tables.training_step),
    "host time": of_kind("host_time", tables.host_time),
    "forecast": of_kind("forecast", tables.forecast),
    "pareto": of_kind("pareto", tables.pareto),
    "candidates": of_kind("candidates", tables.candidates),
    "candidates, in short": of_kind("candidates", tables.candidates_in_short),
    "floors": lambda files: floors.paragraphs(),
}


def block_text(name: str, files: Files) -> str:
    """A block's text, its prose in lines as long as the pages' own; ValueError where a file lacks what it needs, or has
    it in another shape."""
    try:
        paragraphs = [p if p[:1] in "|#!" else PROSE.fill(p) for p in BLOCKS[name](files)]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"block {name!r} cannot be made of {names}: {type(error).__name__}: {error}") from error
    return "\n\n".join(paragraphs)


def updated(page: Path, files: Files) -> tuple[str, list[str]]:
    """A page with its blocks as the files say, and the names of those that were not; ValueError for a marker without
    its counterpart, or an unknown name."""
    content, stale = page.read_text(encoding="utf-8"), []
    openings, endings = content.count("<!-- results:"), content.count(END)
    found = list(BLOCK.finditer(content))
    if not len(found) == openings == endings or any("<!-- results:" in match["text"] for match in found):
        raise ValueError(
            f"{page} has {openings} markers '<!-- results: NAME -->' and {endings} '{END}'; each needs its counterpart"
        )

    def fill(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in BLOCKS:
            raise ValueError(f"{page} asks for results called {name!r}; allowed: {', '.join(BLOCKS)}")
        text = block_text(name, files) + "\n"
        if text != block["text"]:
            stale.append(name)
        return f"<!-- results: {name} -->\n{text}{END}"

    return BLOCK.sub(fill, content), stale


def pages() -> list[Path]:
    return [ROOT / name for name in PAGES if (ROOT / name).is_file()]


def write_readme(files: Files) -> None:
    for file in files:
        if not file.picture_is_current():
            file.draw()
    for page in pages():
        content, stale = updated(page, files)
        if stale:
            with atomic_file(page) as temporary:
                temporary.write_text(content, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'written' if stale else 'nothing to change'}")


def check(files: Files) -> None:
    """ValueError where a page or a figure is not what the results say."""
    wrong = [f"{page.relative_to(ROOT)} ({name})" for page in pages() for name in updated(page, files)[1]]
    wrong += [file.picture.name for file in files if not file.picture_is_current()]
    if wrong:
        raise ValueError(
            f"not what the results files say: {', '.join(wrong)}; run python -m benchmarks.report --write-readme"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", help="results files; default: benchmarks/results/*.json")
    parser.add_argument("--output-dir", help="folder for report.md and the figures")
    parser.add_argument("--write-readme", action="store_true", help=f"fill the blocks of {', '.join(PAGES)}")
    parser.add_argument("--check", action="store_true", help="exit code 2 unless they are what the files say")
    options = parser.parse_args(arguments)
    if options.check and (options.write_readme or options.output_dir is not None):
        raise ValueError("--check writes nothing: it cannot be combined with --write-readme or --output-dir")
    if options.write_readme and options.output_dir is not None:
        raise ValueError("--write-readme and --output-dir are both given; give one")
    files = [ResultsFile(path) for path in map(Path, options.files or sorted(FOLDER.glob("*.json")))]
    if options.check:
        check(files)
        print("the pages are what the results files say")
    elif options.write_readme:
        write_readme(files)
    else:
        parts = [f"## {name[0].upper()}{name[1:]}\n\n{block_text(name, files)}" for name in BLOCKS]
        text = "\n\n".join(["# Benchmarks of ddt-fast", *parts]) + "\n"
        if options.output_dir is None:
            print(text, end="")
            return
        folder = output_folder(options.output_dir)
        for file in files:
            file.draw(folder)
        with atomic_file(folder / "report.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"{folder / 'report.md'}: written")


if __name__ == "__main__":
    run_command(main)
