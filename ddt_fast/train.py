"""Train a DDT: `python -m ddt_fast.train` alone trains the digits preset."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ddt_fast.checks import require, require_kind, require_path
from ddt_fast.command import CommandParser, run_command
from ddt_fast.config import Experiment
from ddt_fast.files import output_folder, read_yaml
from ddt_fast.presets import PRESETS
from ddt_fast.ranks import process_ranks
from ddt_fast.wording import kind_of

if TYPE_CHECKING:
    from ddt_fast.training.loop import TrainingResult


def build_parser(preset: str) -> CommandParser:
    """Options for every setting of an Experiment, with a preset's defaults; ValueError if there is no such preset."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} does not exist; allowed: {', '.join(PRESETS)}")
    experiment = PRESETS[preset]
    parser = CommandParser(prog="python -m ddt_fast.train", description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file of settings; later options override it")
    parser.add_argument("--preset", default=preset, help=f"settings to start from: {', '.join(PRESETS)}")
    parser.add_argument("--output-dir", type=str, help=f"folder of the run; default: runs/{preset}")
    parser.add_options(train_model, "overwrite", "resume", "device")
    parser.add_class_arguments(Experiment, fail_untyped=True)
    for field in fields(experiment):
        settings = getattr(experiment, field.name)
        parser.set_defaults({f"{field.name}.{name}": value for name, value in vars(settings).items()})
    return parser


def train_model(
    experiment: Experiment,
    output_dir: str | Path,
    *,
    device: str = "auto",
    resume: str | None = None,
    overwrite: bool = False,
) -> "TrainingResult":
    """Train a DDT, as `python -m ddt_fast.train`: `training.loop.train`, which replaces an earlier run only on request.

    Args:
        experiment: every setting, such as `ddt_fast.presets.PRESETS["digits"]`, changed with dataclasses.replace.
        output_dir: the run's folder; `training.loop.train` lists what is written there.
        device: auto, cpu, cuda or cuda:N.
        resume: auto continues the run in the folder from its latest checkpoint, if any; or the folder of a checkpoint.
        overwrite: replace the results of an earlier run in the folder.

    Returns:
        The last step, the averaged model on the CPU, and its scores.

    Raises:
        ValueError: the folder holds an earlier run and neither resume nor overwrite is given, or training cannot use
            the data or the settings.
        OSError: outputs cannot be written.
    """
    require_kind("experiment", experiment, Experiment)
    folder = output_folder(output_dir)
    if resume is not None:
        require_path("resume", resume)
    if overwrite and resume is not None:
        raise ValueError("`overwrite` and `resume` are both given; give one")
    if (folder / "recipe.yaml").exists() and not overwrite and resume is None:
        raise ValueError(f"{folder} holds an earlier run; add `resume` auto or `overwrite`, or name another folder")
    from ddt_fast.device import choose_device
    from ddt_fast.training.loop import train

    return train(experiment, folder, choose_device(device), resume)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train, report."""
    preset = _find_preset(arguments)
    parser = build_parser(preset)
    try:
        options = parser.instantiate(parser.parse_args(arguments))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the settings cannot be read: {error}") from error
    require(isinstance(options.overwrite, bool), "overwrite", options.overwrite, "true or false")
    experiment = Experiment(options.model, options.data, options.training, options.sampling)
    name = f"runs/{preset}" if options.output_dir is None else options.output_dir
    from ddt_fast.threads import threads_for

    with parser.naming_options(), threads_for(experiment.model, options.device):
        result = train_model(
            experiment, name, device=options.device, resume=options.resume, overwrite=options.overwrite
        )
    output_dir = Path(name)
    if result.model is None:
        if result.step < experiment.training.max_steps and process_ranks().rank == 0:
            print(f"stopped after step {result.step} of {experiment.training.max_steps}; --resume auto continues")
        return
    print(f"model: {output_dir / 'model'}")
    if (output_dir / "samples.png").is_file():
        print(f"samples: {output_dir / 'samples.png'}")
    for kind, score in result.scores.items():
        print(f"{kind}: {score}")


def _find_preset(arguments: Sequence[str] | None) -> str:
    """The preset named on the command line or in a --config file, else digits. It sets the defaults, so it must be
    known before the parser is built. ValueError if two are named."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", action="append", default=[])
    try:
        options, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    named = {options.preset} - {None}
    for file in options.config:
        try:
            settings = read_yaml(Path(file))
        except OSError as error:
            raise ValueError(f"config file {file} cannot be read: {error.strerror}") from error
        parts = {"": settings}
        if isinstance(settings, dict):
            parts = {f" under {f.name}": settings[f.name] for f in fields(Experiment) if f.name in settings}
        for place, part in parts.items():
            if not isinstance(part, dict):
                kind = "nothing" if part is None else kind_of(part)
                raise ValueError(f"config file {file} holds {kind}{place}; expected settings as `name: value`")
        if "config" in settings:
            raise ValueError(f"config file {file} names another config file; name both on the command line")
        if "preset" in settings:
            named.add(str(settings["preset"]))
    if len(named) > 1:
        raise ValueError(f"presets {' and '.join(sorted(named))} are both named; name one")
    return named.pop() if named else "digits"


if __name__ == "__main__":
    run_command(main)
