"""Options that the commands `sample` and `sharing` share: the checkpoint, and the settings of sampling."""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from ddt_fast.command import CommandParser
from ddt_fast.config import Experiment, SamplingConfig
from ddt_fast.generation.settings import Engine
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT, experiment_of, resolve_checkpoint
from ddt_fast.presets import PRESETS


def add_checkpoint_options(parser: CommandParser) -> None:
    """Add the checkpoint, the device and the dtype."""
    add = parser.add_argument
    add("--checkpoint", type=str, help="folder, .safetensors, .ckpt or hub id; default: the digits in the package")
    add("--preset", type=str, help=f"settings for a checkpoint without config.json: {', '.join(PRESETS)}")
    parser.add_options(Engine, "device", "dtype")


def add_sampling_options(parser: CommandParser, without: Collection[str] = (), **words: str) -> None:
    """Add an option for every other field of `SamplingConfig`, described by `words` or its docstring; one that is not
    given is None, for the checkpoint's own setting."""
    words = {"last_step": "length of the final step before the shift; 0: as long as the others", **words}
    parser.add_options(SamplingConfig, without=without, words=words, default=None)


def chosen_checkpoint(options: Any) -> tuple[Path, Experiment]:
    """The local checkpoint that the options name, and its settings; ValueError if there is none."""
    checkpoint = resolve_checkpoint(EMBEDDED_CHECKPOINT if options.checkpoint is None else options.checkpoint)
    return checkpoint, experiment_of(checkpoint, options.preset)


def given_settings(options: Any) -> dict[str, Any]:
    """The options that are fields of `SamplingConfig`, for `SamplingConfig.override`; None, if not given."""
    return {setting.name: getattr(options, setting.name, None) for setting in fields(SamplingConfig)}
