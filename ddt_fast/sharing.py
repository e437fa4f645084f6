"""Choose the encoder's refresh steps by the statistical dynamic programme, and show why: how similar the states of all
steps are, which refresh steps are best, and how their predicted error compares with uniform refreshes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddt_fast.checks import require_int
from ddt_fast.command import CommandParser, run_command
from ddt_fast.config import SamplingConfig
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.sampling_options import add_checkpoint_options, add_sampling_options, chosen_checkpoint, given_settings

if TYPE_CHECKING:
    from ddt_fast.work.sharing import Study


def build_parser() -> CommandParser:
    """The options of the command; settings that are not given are the checkpoint's own."""
    parser = CommandParser(prog="python -m ddt_fast.sharing", description=__doc__)
    add_checkpoint_options(parser)
    unread = ("refresh_every", "refresh_steps", "num_refreshes", "guidance_forecast", "cuda_graphs", "schedule")
    rare = "above 1, the unconditional branch shares no states and is not compared"
    add_sampling_options(parser, unread, guidance_every=rare)
    parser.add_options(study_refreshes, "num_refreshes", "num_samples", "output_dir")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and study."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    with parser.naming_options():
        checkpoint, experiment = chosen_checkpoint(options)
        own, asked = replace(experiment.sampling, schedule=None), options.num_refreshes
        given = given_settings(options) | {"refresh_every": 1, "num_refreshes": None}
        require_int("num_samples", options.num_samples, 1)
        from ddt_fast.threads import threads_for

        with threads_for(experiment.model, options.device):
            study_refreshes(
                checkpoint,
                options.output_dir,
                preset=options.preset,
                sampling=own.override(**given),
                num_refreshes=own.num_refreshes if asked is None else asked,
                num_samples=options.num_samples,
                device=options.device,
                dtype=options.dtype,
            )


def study_refreshes(
    checkpoint: str | Path = EMBEDDED_CHECKPOINT,
    output_dir: str | Path = "sharing",
    *,
    preset: str | None = None,
    sampling: SamplingConfig | None = None,
    num_refreshes: int | None = None,
    num_samples: int = 8,
    device: str = "auto",
    dtype: str = "auto",
) -> "Study":
    """Find the best refresh steps of the encoder, as `python -m ddt_fast.sharing`: probe the model, search, print a
    table, and write similarity.png and similarity.json.

    Args:
        checkpoint: model or pipeline folder, .safetensors, released .ckpt or hub id; default: the package's digits.
        output_dir: where similarity.png and similarity.json go.
        preset: settings for a checkpoint without config.json, one of `ddt_fast.presets.PRESETS`.
        sampling: settings of the run; None takes the checkpoint's. Their refresh steps are ignored.
        num_refreshes: encoder runs; default: the checkpoint's, else a sixth of the steps.
        num_samples: samples of the probe run, with seeds 0 and up, spread over all classes.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16", "float16"; "auto" is bfloat16 for latents if the device has units for it.

    Returns:
        The choice, and what it is based on.

    Raises:
        ValueError: a setting is not allowed, or states are not finite.
        OSError: a file cannot be read or written.
    """
    require_int("num_samples", num_samples, 1)
    from ddt_fast.work.sharing import study

    return study(checkpoint, output_dir, preset, sampling, num_refreshes, num_samples, device, dtype)


if __name__ == "__main__":
    run_command(main)
