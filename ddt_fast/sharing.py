"""Choose the encoder's refresh steps by the statistical dynamic programme, and show why: how similar the states of all
steps are, which steps that makes the best, and the predicted error against uniform refreshes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from tqdm import tqdm

from ddt_fast.checks import require_int, require_kind
from ddt_fast.command import CommandParser, run_command
from ddt_fast.config import Experiment, SamplingConfig
from ddt_fast.device import choose_device, choose_dtype
from ddt_fast.files import atomic_file, output_folder
from ddt_fast.model import FusedDDT
from ddt_fast.model.weights import EMBEDDED_CHECKPOINT, experiment_of, has_config, load_model, resolve_checkpoint
from ddt_fast.sampling.probe import Probe, probe_calls, probe_states
from ddt_fast.sampling.refresh import optimal_refresh_schedule, step_errors, uniform_refresh_steps
from ddt_fast.sampling_options import add_checkpoint_options, add_solver_options, chosen_checkpoint, given_settings
from ddt_fast.wording import plural

_OUTPUTS = ("similarity.png", "similarity.json")
_SHADES = " .:-=+*#%@"
_CHOSEN_COLOUR, _UNIFORM_COLOUR = "#c2410c", "#2563eb"


@dataclass(frozen=True)
class Study:
    """What the command found.

    Attributes:
        sampling: the settings of the run; refresh_steps are the chosen ones.
        probe: times and similarity.
        chosen, uniform: refresh steps, as many of each.
        chosen_errors, uniform_errors: (T,) predicted error of every step.
    """

    sampling: SamplingConfig
    probe: Probe
    chosen: tuple[int, ...]
    uniform: tuple[int, ...]
    chosen_errors: NDArray[np.float64]
    uniform_errors: NDArray[np.float64]

    @property
    def share_ratio(self) -> float:
        """The share of steps without an encoder run."""
        return 1 - len(self.chosen) / len(self.probe.times)


def build_parser() -> jsonargparse.ArgumentParser:
    """The options of the command; sampling settings that are not given are the checkpoint's own."""
    parser = CommandParser(prog="python -m ddt_fast.sharing", description=__doc__)
    add_checkpoint_options(parser)
    add_solver_options(parser)
    add = parser.add_argument
    add("--num-refreshes", type=int, help="encoder runs; default: the checkpoint's, else a sixth of the steps")
    add("--num-samples", type=int, default=8, help="samples of the probe run, seeds 0 and up, through all classes")
    add("--guidance-every", type=int, help="above 1 the unconditional branch shares no states, and is not compared")
    add("--output-dir", type=str, default="sharing", help="where similarity.png and similarity.json go")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, probe, search, report, write."""
    options = build_parser().parse_args(arguments)
    checkpoint, experiment = chosen_checkpoint(options)
    study_refreshes(
        checkpoint,
        options.output_dir,
        preset=options.preset,
        sampling=_sampling(options, experiment),
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
) -> Study:
    """Find the best refresh steps of the encoder, as `python -m ddt_fast.sharing`: probe the model, search, print a
    table, and write similarity.png and similarity.json.

    Args:
        checkpoint: model or pipeline folder, .safetensors, released .ckpt or hub id; default: the package's digits.
        output_dir: where the two files go.
        preset: settings for a checkpoint without config.json, one of `ddt_fast.presets.PRESETS`.
        sampling: settings of the run; None for the checkpoint's. Which steps refresh there is not read.
        num_refreshes: encoder runs; None for those of the settings, else a sixth of the steps.
        num_samples: of the probe run, seeds 0 and up, through all classes.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16", "float16"; "auto" is bfloat16 for latents where the device has units for it.

    Returns:
        The choice, and what it was made by.

    Raises:
        ValueError: settings that are not allowed, or states that are not finite.
        OSError: files that cannot be read or written.
    """
    place = choose_device(device)
    source = resolve_checkpoint(checkpoint)
    experiment = experiment_of(source, preset)
    own = experiment.sampling if sampling is None else sampling
    require_kind("sampling", own, SamplingConfig)
    default = own.num_refreshes or max(1, own.num_steps // 6)
    budget = default if num_refreshes is None else num_refreshes
    own = replace(own, refresh_every=1, refresh_steps="dp", num_refreshes=budget)
    require_int("--num-samples", num_samples, 1)
    weight_dtype = choose_dtype(dtype, place, latents=experiment.data.autoencoder is not None)
    folder = output_folder(output_dir)
    for name in _OUTPUTS:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder; a file of that name is to be written")
    reference = load_model(source, place, weight_dtype, None if has_config(source) else experiment.model)
    model = FusedDDT.from_reference(reference)
    size = experiment.data.sample_size

    started = time.perf_counter()
    calls = probe_calls(model, own, size, size, num_samples)
    with tqdm(total=calls, unit="step", dynamic_ncols=True) as bar:
        probe = probe_states(model, own, size, size, num_samples, progress=bar.update)
    probed = time.perf_counter()
    study = _study(own, probe)
    print(
        f"{source}: {plural(num_samples, 'sample')} of {plural(own.num_steps, 'step')} probed in "
        f"{probed - started:.1f} s, schedule found in {time.perf_counter() - probed:.1f} s"
    )
    print(_report(study))
    _write(study, source, num_samples, folder)
    print(f"wrote {' and '.join(_OUTPUTS)} to {folder}")
    return study


def _sampling(options: Any, experiment: Experiment) -> SamplingConfig:
    """The run's settings with refresh_steps "dp" and its budget, as the options say."""
    own = experiment.sampling
    given = given_settings(options)
    budget = given.pop("num_refreshes", own.num_refreshes or max(1, given.get("num_steps", own.num_steps) // 6))
    return replace(own, **given, refresh_every=1, refresh_steps="dp", num_refreshes=budget)


def _study(sampling: SamplingConfig, probe: Probe) -> Study:
    assert sampling.num_refreshes is not None
    chosen = optimal_refresh_schedule(probe, sampling.num_refreshes, sampling.state_forecast)
    uniform = uniform_refresh_steps(sampling.num_steps, sampling.num_refreshes)
    errors = [step_errors(probe, steps, sampling.state_forecast) for steps in (chosen, uniform)]
    return Study(replace(sampling, refresh_steps=chosen, num_refreshes=None), probe, chosen, uniform, *errors)


def _report(study: Study) -> str:
    mean_chosen, mean_uniform = study.chosen_errors.mean(), study.uniform_errors.mean()
    rows = [
        ("", "chosen", "uniform"),
        ("mean predicted error", f"{mean_chosen:.3g}", f"{mean_uniform:.3g}"),
        ("largest, at step", *(f"{e.max():.3g}, {e.argmax()}" for e in (study.chosen_errors, study.uniform_errors))),
        ("longest segment", *(str(max(_lengths(study, steps))) for steps in (study.chosen, study.uniform))),
    ]
    table = "\n".join(f"{name:<22}{chosen:>18}{uniform:>18}" for name, chosen, uniform in rows)
    return (
        f"{_text_view(study)}\n\n{len(study.chosen)} of {len(study.probe.times)} steps refresh, share ratio "
        f"{study.share_ratio:.2f}, {study.sampling.state_forecast} between\n"
        f"chosen:  {' '.join(map(str, study.chosen))}\nuniform: {' '.join(map(str, study.uniform))}\n\n{table}"
    )


def _lengths(study: Study, steps: tuple[int, ...]) -> list[int]:
    return np.diff([*steps, len(study.probe.times)]).tolist()


def _text_view(study: Study, cells: int = 32) -> str:
    """The similarity matrix in at most `cells` rows of shades, two characters a cell; + on the rim marks a refresh."""
    num_steps = len(study.probe.times)
    cells = min(cells, num_steps)
    # Cell c holds the steps from edges[c] up to edges[c + 1].
    edges = [cell * num_steps // cells for cell in range(cells + 1)]
    similarity = np.add.reduceat(np.add.reduceat(study.probe.similarity, edges[:-1], axis=0), edges[:-1], axis=1)
    similarity /= np.outer(np.diff(edges), np.diff(edges))
    # The angle between states, not its cosine, is what the eye should see grow evenly.
    angles = np.arccos(np.clip(similarity, -1, 1))
    largest = max(float(angles.max()), 1e-12)
    shades = ((1 - angles / largest) * (len(_SHADES) - 1)).round().astype(int)
    marks = ["+" if any(low <= s < high for s in study.chosen) else " " for low, high in pairwise(edges)]
    header = " " * 8 + "".join(mark * 2 if mark == " " else f"{mark} " for mark in marks)
    lines = [
        f"{edges[row]:>5} {marks[row]} " + "".join(_SHADES[shade] * 2 for shade in shades[row]) for row in range(cells)
    ]
    legend = f"similarity of the states of two steps, from {np.cos(largest):.3f} (blank) to 1 (@); + refresh steps"
    return "\n".join([legend, header, *lines])


def _write(study: Study, checkpoint: Path, num_samples: int, output_dir: Path) -> None:
    content = {
        "checkpoint": str(checkpoint),
        "num_samples": num_samples,
        "sampling": asdict(study.sampling),
        "share_ratio": study.share_ratio,
        "chosen": {"refresh_steps": study.chosen, "errors": study.chosen_errors.tolist()},
        "uniform": {"refresh_steps": study.uniform, "errors": study.uniform_errors.tolist()},
        "times": study.probe.times,
        "similarity": study.probe.similarity.tolist(),
    }
    with (
        atomic_file(output_dir / "similarity.png") as picture,
        atomic_file(output_dir / "similarity.json") as data,
    ):
        _plot(study).savefig(picture, dpi=150)
        data.write_text(json.dumps(content) + "\n")


def _plot(study: Study) -> Figure:
    """The similarity as a heat map with the segments of both schedules, above the predicted error of every step."""
    num_steps = len(study.probe.times)
    figure = Figure(figsize=(8, 10.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(7, 3), width_ratios=(1, 0.035))
    heat = figure.add_subplot(grid[0, 0])
    image = heat.imshow(
        study.probe.similarity,
        cmap="viridis",
        vmax=1,
        extent=(0, num_steps, num_steps, 0),
        aspect="auto",
        interpolation="nearest",
    )
    figure.colorbar(image, cax=figure.add_subplot(grid[0, 1]), label="mean cosine similarity of two steps' states")
    for steps, colour, style, label in (
        (study.uniform, _UNIFORM_COLOUR, ":", "uniform segments"),
        (study.chosen, _CHOSEN_COLOUR, "-", "chosen segments"),
    ):
        bounds = [*steps, num_steps]
        corners = [(x, y) for a, b in pairwise(bounds) for x, y in ((a, a), (b, a), (b, b))]
        heat.plot(*zip(*corners, strict=True), color=colour, linestyle=style, linewidth=1.3, label=label)
    heat.legend(loc="lower left")
    heat.set(ylabel="step", xlim=(0, num_steps), ylim=(num_steps, 0))
    forecast = study.sampling.state_forecast
    heat.set_title(
        f"{len(study.chosen)} of {num_steps} steps refresh the encoder (share ratio {study.share_ratio:.2f}), "
        f"{forecast} between"
    )
    heat.tick_params(labelbottom=False)

    below = figure.add_subplot(grid[1, 0], sharex=heat)
    for values, colour, label in (
        (study.uniform_errors, _UNIFORM_COLOUR, "uniform"),
        (study.chosen_errors, _CHOSEN_COLOUR, "chosen"),
    ):
        legend = f"{label}, mean {values.mean():.3g}"
        below.stairs(values, np.arange(num_steps + 1), color=colour, linewidth=1.2, label=legend)
    largest = max(float(study.chosen_errors.max()), float(study.uniform_errors.max()))
    below.set(xlabel="step", ylabel="predicted error of the state", ylim=(0, 1.2 * largest or 1.0))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.legend(loc="upper center", ncols=2)
    return figure


if __name__ == "__main__":
    run_command(main)
