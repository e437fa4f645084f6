"""Sample from a DDT: `python -m ddt_fast.sample` alone draws digits from the checkpoint in the package.

Under torchrun the processes share the work. A job that was stopped or killed continues when it is started again.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ddt_fast.checks import require_number
from ddt_fast.command import CommandParser, read_options, run_command
from ddt_fast.config import Experiment, SamplingConfig
from ddt_fast.evaluation.names import Features
from ddt_fast.generation.settings import Draws, Engine, Outputs, Scoring
from ddt_fast.ranks import process_ranks
from ddt_fast.sampling.budgets import FAST_SUMMARY, fast_settings, settings_within
from ddt_fast.sampling.tuned import Tuned, tuned_file
from ddt_fast.sampling_options import add_checkpoint_options, add_sampling_options, chosen_checkpoint, given_settings

if TYPE_CHECKING:
    from ddt_fast.generation.background import OnImages

# Settings that these ways to choose the steps leave open.
_BESIDE = {
    "budget": ("guidance_scale", "guidance_interval", "timeshift", "cuda_graphs"),
    "schedule": ("guidance_scale", "cuda_graphs"),
}
_SCORING = ("metrics", "inception_weights", "center_crop", "skip_unreadable")


def build_parser() -> CommandParser:
    """The options of the command; settings that are not given are the checkpoint's own."""
    parser = CommandParser(prog="python -m ddt_fast.sample", description=__doc__)
    add_checkpoint_options(parser)
    parser.add_options(Draws)
    add = parser.add_argument
    add_sampling_options(parser, without=("refresh_steps", "schedule"))
    add("--refresh-steps", type=str, nargs="+", help='run the encoder at these steps, the first 0; or "dp": the best')
    add("--fast", action="store_true", help=f"the recommended shortcut: {FAST_SUMMARY}; other options override it")
    words = "the steps nearest to the ODE's solution for so many TFLOP an image; says which and what to expect"
    add("--budget", type=float, metavar="TFLOP", help=words)
    words = "a file of ddt_fast.tune_sampler: times and coefficients fitted to this model, in place of a solver's"
    add("--schedule", type=str, metavar="FILE", help=words)
    parser.add_options(Engine, without=("device", "dtype"))
    add("--output-dir", type=str, default="samples", help="where samples.npz, images, grid.png, generation.json go")
    parser.add_options(Outputs)
    add("--evaluate", type=str, metavar="REFERENCE", help="score the samples against an npz or a folder of images")
    parser.add_options(Scoring, *_SCORING)
    kinds = "default: inception; pixels: images of up to 64x64"
    add("--evaluate-features", dest="features", choices=get_args(Features), help=kinds)
    return parser


def main(arguments: Sequence[str] | None = None, on_images: "OnImages | None" = None) -> None:
    """Parse, sample, write, report; `on_images` as for `generate`."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    with parser.naming_options():
        draws, engine = read_options(options, Draws), read_options(options, Engine)
        outputs, scoring = read_options(options, Outputs), _scoring(options)
        checkpoint, experiment = chosen_checkpoint(options)
        sampling = _sampling(options, experiment)
        _say_what_is_tuned(checkpoint, sampling)
        from ddt_fast.generation.job import generate
        from ddt_fast.threads import threads_for

        with threads_for(experiment.model, engine.device):
            generate(
                checkpoint,
                options.output_dir,
                preset=options.preset,
                sampling=sampling,
                draws=draws,
                engine=engine,
                outputs=outputs,
                scoring=scoring,
                on_images=on_images,
            )


def _scoring(options: Any) -> Scoring | None:
    """The scoring that the options ask for; ValueError for a wrong value, or for options without a reference."""
    given = {name: getattr(options, name) for name in (*_SCORING, "features")}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if options.evaluate is not None:
        return Scoring(options.evaluate, **given)
    if given:
        raise ValueError(f"`{next(iter(given))}` is for `evaluate`, which is not given")
    return None


def _sampling(options: Any, experiment: Experiment) -> SamplingConfig:
    """The sampling settings that the options ask for; ValueError for a wrong value."""
    given, sampling = given_settings(options) | {"schedule": None}, experiment.sampling
    given["refresh_steps"] = _steps(options.refresh_steps)
    given = {name: value for name, value in given.items() if value is not None}
    ways = [name for name in ("fast", "budget", "schedule") if getattr(options, name) not in (None, False)]
    if len(ways) > 1:
        raise ValueError(f"`{ways[0]}` and `{ways[1]}` both choose the steps; give one of them")
    for way, beside in _BESIDE.items():
        if way in ways and not {*given} <= {*beside}:
            other = next(name for name in given if name not in beside)
            raise ValueError(f"`{other}` and `{way}` are both given; `{way}` chooses it")
    if not {*given} <= {*_BESIDE["schedule"]}:
        sampling = replace(sampling, schedule=None)
    if options.fast:
        sampling = fast_settings(sampling)
    if options.budget is not None:
        require_number("budget", options.budget, 0, open_low=True)
        size = experiment.data.input_size(options.height, options.width, experiment.model.patch_size)
        sampling, words = settings_within(sampling.override(**given), experiment.model, *size, options.budget)
        process_ranks().say(f"budget of {options.budget:g} TFLOP: {words}")
    if options.schedule is not None:
        tuned = Tuned.read(options.schedule)
        sampling = tuned.settings(sampling)
        scale = given.get("guidance_scale", sampling.guidance_scale)
        process_ranks().say(f"schedule {options.schedule}: {tuned.expectation(scale)}")
    return sampling.override(**given)


def _say_what_is_tuned(checkpoint: Path, sampling: SamplingConfig) -> None:
    """Name the fitted steps for a run that could use them."""
    file = tuned_file(checkpoint, sampling.num_steps)
    if sampling.solver != "pec" or sampling.schedule is not None or not file.is_file():
        return
    with suppress(ValueError):
        if Tuned.read(file).schedule.guidance_interval == sampling.guidance_interval:
            process_ranks().say(f"found {file}: {sampling.num_steps} fitted steps; --schedule {file} takes them")


def _steps(words: list[str] | None) -> tuple[int, ...] | Literal["dp"] | None:
    if words is None:
        return None
    if words == ["dp"]:
        return "dp"
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"refresh_steps is {' '.join(words)}; allowed: step numbers, or dp")
    return tuple(int(word) for word in words)


if __name__ == "__main__":
    run_command(main)
