"""Convert between a model folder and the original code's .ckpt: `python -m ddt_fast.convert SOURCE OUT`.

An OUT that ends in .ckpt is written for the original code; any other OUT is a model folder. Nothing in SOURCE is
executed.
"""

from collections.abc import Sequence
from pathlib import Path

from ddt_fast.checks import require, require_choice, require_path
from ddt_fast.command import CommandParser, run_command
from ddt_fast.model.settings import WeightChoice
from ddt_fast.presets import PRESETS


def build_parser() -> CommandParser:
    """The options of the command: the parameters of `convert_checkpoint`."""
    parser = CommandParser(prog="python -m ddt_fast.convert", description=__doc__)
    words = {"preset": f"settings of the weights: {', '.join(PRESETS)}; default: the first with their shapes"}
    parser.add_options(convert_checkpoint, positional=("source", "out"), words=words)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, convert, report."""
    parser = build_parser()
    with parser.naming_options():
        convert_checkpoint(**vars(parser.parse_args(arguments)))


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    weights: WeightChoice | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    skip: Sequence[str] = (),
) -> Path:
    """Convert a released Lightning .ckpt, or the latest checkpoint of a training run, into a model folder with a model
    card, or a model or run into a .ckpt for the original code, as `python -m ddt_fast.convert`. Nothing in a source is
    executed. What is read and written is printed.

    Args:
        source: a .ckpt, a training run (its latest checkpoint) or one of its checkpoints; or, to export, a model or
            pipeline folder, a .safetensors or a hub id.
        out: the folder to write; or, to export, a file that ends in .ckpt.
        weights: ema (the average), raw (the trained weights), or both, each in its place. Default: a model folder gets
            the average, a .ckpt every kind there is; a single kind is written in both places.
        preset: settings of the weights, one of `ddt_fast.presets.PRESETS`; default: the first with their shapes.
        config: settings from a file: config.json of a model folder, or recipe.yaml of a run.
        skip: packages whose objects in a .ckpt are skipped, not created.

    Returns:
        The path written.

    Raises:
        ValueError: the source is missing, damaged or holds more than tensors, settings do not fit, or `out` would
            replace something else.
        OSError: a file cannot be read or written.
    """
    given, out = require_path("source", source), require_path("out", out)
    if weights is not None:
        require_choice("weights", weights, WeightChoice)
    require(not isinstance(skip, str), "skip", skip, "a list of packages")
    if preset is not None and config is not None:
        raise ValueError("`preset` and `config` are both given; give one")
    file = None if config is None else require_path("config", config)
    from ddt_fast.work import convert as work

    work.convert(given, out, weights, work.Settings(preset, file), skip)
    return out


if __name__ == "__main__":
    run_command(main)
