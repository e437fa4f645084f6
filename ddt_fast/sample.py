"""Sample from a DDT: `python -m ddt_fast.sample` alone draws digits from the checkpoint in the package.

Under torchrun the processes share the work. A job that was stopped, in whatever way, goes on when started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, Literal, get_args

import jsonargparse

from ddt_fast.command import CommandParser, run_command
from ddt_fast.config import Experiment, GuidanceForecast, SamplingConfig
from ddt_fast.generation.background import OnImages
from ddt_fast.generation.generate import ALL_PNG, SHARD_IMAGES, SOME_PNG, generate
from ddt_fast.generation.scored import add_scoring_options
from ddt_fast.model.attention import ATTENTION_BACKENDS
from ddt_fast.sampling.fast import FAST_SUMMARY, fast_settings
from ddt_fast.sampling_options import add_checkpoint_options, add_solver_options, chosen_checkpoint, given_settings


def build_parser() -> jsonargparse.ArgumentParser:
    """The options of the command; sampling settings that are not given are the checkpoint's own."""
    parser = CommandParser(prog="python -m ddt_fast.sample", description=__doc__)
    add_checkpoint_options(parser)
    add_solver_options(parser)
    add = parser.add_argument
    add("--num-images", type=int, help="default: 100 digits, 16 otherwise, or one per seed")
    add("--classes", type=int, nargs="+", help="classes to go round; default: all")
    add("--seeds-per-class", type=int, help="that many images of every class, in place of --num-images")
    add("--class-seeds", type=int, nargs="+", help="draw every class with each of these seeds")
    add("--seeds", type=int, nargs="+", help="one per image, in their order; default: --first-seed and up")
    add("--first-seed", type=int, help="seed of the first image, the next image has the next seed; default: 0")
    add("--refresh-every", type=int, help="run the encoder at every K-th step")
    add("--refresh-steps", type=str, nargs="+", help='run the encoder at these steps, the first 0; or "dp": the best')
    add("--num-refreshes", type=int, help="how many, for --refresh-steps dp; found by a probe, then kept")
    add("--guidance-every", type=int, help="evaluate the unconditional branch at every M-th guided step")
    add("--guidance-forecast", choices=get_args(GuidanceForecast), help="the guidance difference between those")
    add("--fast", action="store_true", help=f"the recommended shortcut: {FAST_SUMMARY}; options given go before it")
    add("--cuda-graphs", action="store_true", help="replay the loop as CUDA graphs")
    add("--batch-size", type=int, default=100, help="images drawn at a time")
    add("--memory-budget", type=str, help="for what is kept between steps, e.g. 8GiB; makes batches fit")
    add("--attention", choices=ATTENTION_BACKENDS, default="auto", help="attention implementation")
    add("--compile", action="store_true", help="run the model through torch.compile: slow to start, then faster")
    add("--quantize", choices=["int8"], help="CPU: 8-bit weights and activations; the error is measured and printed")
    add("--reference", action="store_true", help="run the plain PyTorch model instead of the fused one")
    add("--output-dir", type=str, default="samples", help="where samples.npz, images, grid.png, generation.json go")
    add("--num-png", type=int, help=f"images kept as PNGs too; default: up to {ALL_PNG} all, of more {SOME_PNG}")
    add("--shard-size", type=int, help=f"images per shard; default: about {SHARD_IMAGES}, whole batches")
    add("--keep-shards", action="store_true", help="do not remove the shards when samples.npz is written")
    add("--overwrite", action="store_true", help="drop what an earlier job left in the output folder, begin anew")
    add_scoring_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None, on_images: OnImages | None = None) -> None:
    """Parse, sample, write, report.

    Args:
        arguments: of the command line; None: this process's.
        on_images: as `generate` takes it.
    """
    options = build_parser().parse_args(arguments)
    checkpoint, experiment = chosen_checkpoint(options)
    settings = {name: getattr(options, name) for name in signature(generate).parameters if hasattr(options, name)}
    generate(**settings | {"checkpoint": checkpoint, "sampling": _sampling(options, experiment)}, on_images=on_images)


def _sampling(options: Any, experiment: Experiment) -> SamplingConfig:
    """The sampling settings that the options name; ValueError for values that are not allowed."""
    given = given_settings(options)
    if "refresh_steps" in given:
        given = {"refresh_every": 1, "num_refreshes": None, **given, "refresh_steps": _steps(given["refresh_steps"])}
    elif "refresh_every" in given:
        given |= {"refresh_steps": None, "num_refreshes": None}
    sampling = experiment.sampling
    if options.fast:
        sampling = fast_settings(replace(sampling, num_steps=given.get("num_steps", sampling.num_steps)))
    return replace(sampling, **given)


def _steps(words: list[str]) -> tuple[int, ...] | Literal["dp"]:
    if words == ["dp"]:
        return "dp"
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--refresh-steps is {' '.join(words)}; allowed: step numbers, or dp")
    return tuple(int(word) for word in words)


if __name__ == "__main__":
    run_command(main)
