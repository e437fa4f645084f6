"""Train a DDT: `python -m ddt_fast.train` alone trains the digits preset; see --help for the rest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import jsonargparse
import yaml

from ddt_fast.command import CommandParser, choose_device, run_command
from ddt_fast.config import PRESETS, Experiment
from ddt_fast.files import check_writable
from ddt_fast.training.loop import train


def build_parser(preset: str) -> jsonargparse.ArgumentParser:
    """Every setting of an Experiment as a dotted option; defaults are those of the preset.

    Raises:
        ValueError: unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} does not exist; allowed: {', '.join(PRESETS)}")
    experiment = PRESETS[preset]
    parser = CommandParser(prog="python -m ddt_fast.train", description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file of settings; options after it override it")
    parser.add_argument("--preset", default=preset, help=f"where settings start from: {', '.join(PRESETS)}")
    parser.add_argument("--output-dir", type=str, help=f"default: runs/{preset}")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run there")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_class_arguments(Experiment, fail_untyped=True)
    for field in fields(experiment):
        settings = getattr(experiment, field.name)
        parser.set_defaults({f"{field.name}.{name}": value for name, value in vars(settings).items()})
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train, report."""
    parser = build_parser(_find_preset(arguments))
    options = parser.instantiate(parser.parse_args(arguments))
    experiment = Experiment(options.model, options.data, options.training, options.sampling)
    device = choose_device(options.device)
    output_dir = Path(options.output_dir or f"runs/{options.preset}")
    check_writable(output_dir)
    if (output_dir / "recipe.yaml").exists() and not options.overwrite:
        raise ValueError(f"{output_dir} holds an earlier run; choose another --output-dir or add --overwrite")
    result = train(experiment, output_dir, device)
    print(f"model: {result.folder}\nsamples: {output_dir / 'samples.png'}")
    for kind, score in result.scores.items():
        print(f"{kind}: {score}")


def _find_preset(arguments: Sequence[str] | None) -> str:
    """The preset named on the command line, else in a --config file, else digits: it decides the defaults, so it must
    be known before the parser is built."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", action="append", default=[])
    try:
        options, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    preset = "digits"
    for file in options.config:
        try:
            settings = yaml.safe_load(Path(file).read_text())
        except FileNotFoundError as error:
            raise ValueError(f"config file {file} does not exist") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"config file {file} is not valid YAML: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"config file {file} holds {type(settings).__name__}; wanted settings as `name: value`")
        preset = settings.get("preset", preset)
    return str(options.preset or preset)


if __name__ == "__main__":
    run_command(main)
