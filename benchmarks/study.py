"""What the commands `forecast`, `pareto` and `candidates` share: options, and the results file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.report.files import ResultsFile
from ddt_fast.checks import require_int
from ddt_fast.command import CommandParser
from ddt_fast.files import atomic_file, output_folder

# By option: the default (a list where it takes several numbers), the least that is allowed, and its help.
Numbers = dict[str, tuple[int | list[int], int, str]]


def read_options(name: str, description: str | None, arguments: list[str] | None, numbers: Numbers) -> Any:
    """The options of `benchmarks.NAME`, as attributes; ValueError for a number that is not allowed."""
    parser = CommandParser(prog=f"python -m benchmarks.{name}", description=(description or "").splitlines()[0])
    parser.add_argument("--output-dir", default="benchmarks/results")
    parser.add_argument("--keep", help="folder in which samples are kept, for a command that was stopped to continue")
    for option, (default, _, words) in numbers.items():
        nargs = "+" if isinstance(default, list) else None
        parser.add_argument(option, type=int, default=default, help=words, nargs=nargs)
    options = parser.parse_args(arguments)
    for option, (_, least, _) in numbers.items():
        given = options[option[2:].replace("-", "_")]
        for number in given if isinstance(given, list) else [given]:
            require_int(option, number, least)
    return options


def run_study(name: str, options: Any, measure: Callable[[str | None], dict[str, Any]]) -> dict[str, Any]:
    """Write what `measure` returns for --keep to NAME.json, and draw its picture."""
    path = output_folder(options.output_dir) / f"{name}.json"
    record = {"environment": environment(), **measure(options.keep)}
    write_record(path, record)
    ResultsFile(path).draw()
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write an object as JSON, an item of a list a line, floats rounded to 5 significant digits."""
    lines = []
    for name, value in json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.5g}")).items():
        items = value if isinstance(value, list) else []
        text = "[\n  " + ",\n  ".join(map(json.dumps, items)) + "\n ]" if items else json.dumps(value)
        lines.append(f" {json.dumps(name)}: {text}")
    with atomic_file(path) as file:
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
