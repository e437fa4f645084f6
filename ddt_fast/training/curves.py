"""Plot the curves of one or more training runs: loss, REPA loss, gradient norm, learning rate, img/s."""

from collections.abc import Sequence
from pathlib import Path

from ddt_fast.command import CommandParser, run_command
from ddt_fast.files import check_no_folder
from ddt_fast.training.plots import plot_runs


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m ddt_fast.training.curves", description=__doc__)
    add = parser.add_argument
    add("folders", type=str, nargs="+", metavar="RUN_FOLDER", help="folder with a log.jsonl; several are overlaid")
    add("--output", type=str, help="the PNG; default: curves.png in the run's folder, or here for several runs")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, plot, report."""
    options = build_parser().parse_args(arguments)
    folders = [Path(folder) for folder in dict.fromkeys(options.folders)]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    output = Path(options.output or (folders[0] if len(folders) == 1 else Path()) / "curves.png")
    check_no_folder(output)
    plot_runs({name: folder / "log.jsonl" for name, folder in zip(names, folders, strict=True)}, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    run_command(main)
