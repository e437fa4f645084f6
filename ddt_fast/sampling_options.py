"""What the commands that run a trained model share: which checkpoint, and how it is integrated."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import jsonargparse

from ddt_fast.config import Diffusion, Experiment, SamplingConfig, Solver, StateForecast
from ddt_fast.device import DTYPES
from ddt_fast.model.weights import EMBEDDED_CHECKPOINT, experiment_of, resolve_checkpoint
from ddt_fast.presets import PRESETS


def add_checkpoint_options(parser: jsonargparse.ArgumentParser) -> None:
    """The checkpoint, and where and in what to run it."""
    add = parser.add_argument
    add("--checkpoint", type=str, help="folder, .safetensors, .ckpt or hub id; default: the digits in the package")
    add("--preset", type=str, help=f"settings for a checkpoint without config.json: {', '.join(PRESETS)}")
    add("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 for latents, where there are units")


def add_solver_options(parser: jsonargparse.ArgumentParser) -> None:
    """Settings that are not given are the checkpoint's own."""
    add = parser.add_argument
    add("--num-steps", type=int, help="solver steps")
    add("--guidance-scale", type=float, help="1 is no guidance")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guided where LOW < t < HIGH")
    add("--timeshift", type=float, help="above 1: more steps near the noise")
    add("--last-step", type=float, help="length of the final step; 0: as long as the others")
    add("--solver", choices=get_args(Solver), help="ODE: euler, lms (linear multistep); SDE: sde")
    add("--order", type=int, help="of the lms solver, 1 to 4")
    add("--diffusion", choices=get_args(Diffusion), help="w(t) of the sde solver")
    add("--diffusion-scale", type=float, help="factor on w(t)")
    add("--state-forecast", choices=get_args(StateForecast), help="the encoder's state between refreshes")


def chosen_checkpoint(options: Any) -> tuple[Path, Experiment]:
    """The local checkpoint that the options name, and its settings; ValueError where there is none."""
    checkpoint = resolve_checkpoint(EMBEDDED_CHECKPOINT if options.checkpoint is None else options.checkpoint)
    return checkpoint, experiment_of(checkpoint, options.preset)


def given_settings(options: Any) -> dict[str, Any]:
    """The sampling settings that were given, by their names in `SamplingConfig`."""
    names = [setting.name for setting in fields(SamplingConfig)]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if given.get("last_step") == 0:
        given["last_step"] = None
    return given
