"""Fit the sampler to a model: times and coefficients of a few steps that come nearer to the ODE's solution than solver
"pec" with as many. Kept only if noises that the fit has not seen gain at every guidance scale; `sample --schedule` uses
it.

Under torchrun the processes share the work.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddt_fast.checks import require, require_int, require_number
from ddt_fast.command import CommandParser, run_command
from ddt_fast.config import SamplingConfig
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.ranks import process_ranks
from ddt_fast.sampling.budgets import corrected_steps, settings_within
from ddt_fast.sampling.tuned import MAX_FITTED_STEPS
from ddt_fast.sampling_options import add_checkpoint_options, chosen_checkpoint

if TYPE_CHECKING:
    from ddt_fast.sampling.tuned import Tuned

_START = ("num_steps", "order", "guidance_interval", "timeshift")


def build_parser() -> CommandParser:
    """The options of the command; settings that are not given are the checkpoint's own."""
    parser = CommandParser(prog="python -m ddt_fast.tune_sampler", description=__doc__)
    add_checkpoint_options(parser)
    budget = "start from the steps that have the least error for so many TFLOP an image"
    parser.add_argument("--budget", type=float, metavar="TFLOP", help=budget)
    order = "velocities that the solver to start from predicts with, 1 to 3; default: 2 for up to 12 steps, else 3"
    words = {"num_steps": "steps of the run, in place of a budget", "order": order}
    parser.add_options(SamplingConfig, *_START, words=words, default=None)
    parser.add_options(fit_schedule, "guidance_scales", "num_samples", "batch_size", "output")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and fit; exit code 1 if the fit is not kept."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    with parser.naming_options():
        checkpoint, experiment = chosen_checkpoint(options)
        _check(options.guidance_scales, options.num_samples, options.batch_size)
        if (options.budget is None) == (options.num_steps is None):
            raise ValueError("give one of `budget` and `num_steps`")
        if options.budget is not None and options.order is not None:
            raise ValueError("`order` is for `num_steps`; a budget chooses its own")
        steps = 10 if options.num_steps is None else options.num_steps
        order = default_order(steps) if options.order is None else options.order
        start = corrected_steps(experiment.sampling, steps, order)
        start = start.override(guidance_interval=options.guidance_interval, timeshift=options.timeshift)
        if options.budget is not None:
            require_number("budget", options.budget, 0, open_low=True)
            size = experiment.data.sample_size
            middle = start.override(guidance_scale=sorted(options.guidance_scales)[len(options.guidance_scales) // 2])
            start, words = settings_within(middle, experiment.model, size, size, options.budget)
            if start.num_steps > MAX_FITTED_STEPS:
                found = f"affords this model {start.num_steps} steps; allowed: what affords up to {MAX_FITTED_STEPS}"
                raise ValueError(f"`budget` of {options.budget:g} TFLOP an image {found}; or name `num_steps`")
            process_ranks().say(f"budget of {options.budget:g} TFLOP: {words}")
        from ddt_fast.threads import threads_for

        with threads_for(experiment.model, options.device):
            kept = fit_schedule(
                checkpoint,
                start,
                preset=options.preset,
                guidance_scales=options.guidance_scales,
                num_samples=options.num_samples,
                batch_size=options.batch_size,
                output=options.output,
                device=options.device,
                dtype=options.dtype,
            )
    if kept is None:
        raise SystemExit(1)


def default_order(num_steps: int) -> int:
    """The order of solver "pec" that is safe with so many steps."""
    return 2 if num_steps <= 12 else 3


def fit_schedule(
    checkpoint: str | Path = EMBEDDED_CHECKPOINT,
    start: SamplingConfig | None = None,
    *,
    preset: str | None = None,
    guidance_scales: Sequence[float] = (1.5, 2.0, 4.0),
    num_samples: int = 384,
    batch_size: int = 64,
    output: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> "Tuned | None":
    """Fit times and coefficients of a run to a model, as `python -m ddt_fast.tune_sampler`: find the ODE's solutions by
    fine runs, fit, compare on other noises, and write the schedule if it is better there.

    Args:
        checkpoint: model or pipeline folder, .safetensors, released .ckpt or hub id; default: the package's digits.
        start: the run to start from, of solver "pec", such as `sampling.budgets.corrected_steps`; None is 10 steps of
            order 2 with the checkpoint's guidance interval. Its guidance scale is not read.
        preset: settings for a checkpoint without config.json, one of `ddt_fast.presets.PRESETS`.
        guidance_scales: the scales to fit to and to compare at, none of them 1.
        num_samples: samples to fit to, spread evenly over the scales; as many others are for the comparison.
        batch_size: samples computed at a time.
        output: the schedule's file; default: tuned_N_steps.json beside the checkpoint.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16; auto: bfloat16 for latents if the device has units for it.

    Returns:
        The schedule and its evidence; None if it is not better everywhere, and so not written.

    Raises:
        ValueError: a setting is not allowed, or the file exists and is not a schedule.
        OSError: a file cannot be read or written.
    """
    scales = _check(guidance_scales, num_samples, batch_size)
    from ddt_fast.work.tune_sampler import fit

    return fit(checkpoint, start, preset, scales, num_samples, batch_size, output, device, dtype)


def _check(guidance_scales: Sequence[float], num_samples: int, batch_size: int) -> tuple[float, ...]:
    listed = isinstance(guidance_scales, (tuple, list))
    require(listed, "guidance_scales", guidance_scales, "a list of numbers")
    scales = tuple(guidance_scales)
    for scale in scales:
        require_number("guidance_scales", scale, 0, 100)
        require(scale != 1, "guidance_scales", scale, "numbers other than 1, which is no guidance")
    require(len(set(scales)) == len(scales) > 0, "guidance_scales", scales, "different numbers")
    require_int("num_samples", num_samples, 8 * len(scales))
    require_int("batch_size", batch_size, 1)
    return scales


if __name__ == "__main__":
    run_command(main)
