"""The work of `ddt_fast.sharing`."""

import json
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from tqdm import tqdm

from ddt_fast.checks import require_kind
from ddt_fast.config import SamplingConfig
from ddt_fast.device import choose_device, choose_dtype
from ddt_fast.files import atomic_file, check_no_folder, output_folder
from ddt_fast.model import FusedDDT
from ddt_fast.model.settings import experiment_of, resolve_checkpoint
from ddt_fast.model.weights import load_model
from ddt_fast.sampling.refresh.probe import Probe, probe_calls, probe_states
from ddt_fast.sampling.refresh.search import optimal_refresh_schedule, step_errors, uniform_refresh_steps
from ddt_fast.wording import plural

_PICTURE, _DATA = "similarity.png", "similarity.json"
_SHADES = " .:-=+*#%@"


@dataclass(frozen=True)
class Study:
    """What the command found.

    Attributes:
        sampling: the settings of the run, with the chosen refresh_steps.
        probe: times and similarity.
        chosen, uniform: refresh steps, the same number of each.
        chosen_errors, uniform_errors: (T,) predicted error of every step.
    """

    sampling: SamplingConfig
    probe: Probe
    chosen: tuple[int, ...]
    uniform: tuple[int, ...]
    chosen_errors: NDArray[np.float64]
    uniform_errors: NDArray[np.float64]

    @property
    def num_steps(self) -> int:
        """Steps of the run, T."""
        return len(self.probe.times)

    @property
    def share_ratio(self) -> float:
        """Share of the steps without an encoder run."""
        return 1 - len(self.chosen) / self.num_steps

    @property
    def summary(self) -> str:
        """The share ratio and the forecast, in words."""
        return f"share ratio {self.share_ratio:.2f}, {self.sampling.state_forecast} between"


def study(
    checkpoint: str | Path,
    output_dir: str | Path,
    preset: str | None,
    sampling: SamplingConfig | None,
    num_refreshes: int | None,
    num_samples: int,
    device: str,
    dtype: str,
) -> Study:
    """Study the refreshes of a model; arguments and errors are those of `ddt_fast.sharing.study_refreshes`."""
    place, source = choose_device(device), resolve_checkpoint(checkpoint)
    experiment = experiment_of(source, preset)
    own = experiment.sampling if sampling is None else sampling
    require_kind("sampling", own, SamplingConfig)
    budget = own.num_refreshes or max(1, own.num_steps // 6) if num_refreshes is None else num_refreshes
    own = replace(own, schedule=None, refresh_every=1, refresh_steps="dp", num_refreshes=budget)
    weight_dtype = choose_dtype(dtype, place, latents=experiment.data.in_latents(experiment.model.in_channels))
    folder = output_folder(output_dir)
    check_no_folder(folder / _PICTURE, folder / _DATA)
    reference = load_model(source, place, weight_dtype, experiment.model)
    found = _study(FusedDDT.from_reference(reference), own, experiment.data.sample_size, num_samples, str(source))
    _write(found, source, num_samples, folder)
    print(_text_view(found), _table(found), sep="\n\n")
    print(f"wrote {_PICTURE} and {_DATA} to {folder}")
    return found


def _study(model: FusedDDT, sampling: SamplingConfig, size: int, num_samples: int, source: str) -> Study:
    started = time.perf_counter()
    calls = probe_calls(model, sampling, size, size, num_samples)
    with tqdm(total=calls, unit="step", dynamic_ncols=True) as bar:
        probe = probe_states(model, sampling, size, size, num_samples, progress=bar.update)
    probed = time.perf_counter()
    budget, forecast = sampling.num_refreshes, sampling.state_forecast
    assert budget is not None
    chosen = optimal_refresh_schedule(probe, budget, forecast)
    uniform = uniform_refresh_steps(sampling.num_steps, budget)
    errors = [step_errors(probe, steps, forecast) for steps in (chosen, uniform)]
    print(
        f"{source}: {plural(num_samples, 'sample')} of {plural(sampling.num_steps, 'step')} probed in "
        f"{probed - started:.1f} s, schedule found in {time.perf_counter() - probed:.1f} s"
    )
    return Study(replace(sampling, refresh_steps=chosen, num_refreshes=None), probe, chosen, uniform, *errors)


def _table(study: Study) -> str:
    columns = [("", "mean predicted error", "largest, at step", "longest segment")]
    for name in ("chosen", "uniform"):
        errors, steps = getattr(study, f"{name}_errors"), getattr(study, name)
        longest = max(np.diff([*steps, study.num_steps]))
        columns.append((name, f"{errors.mean():.3g}", f"{errors.max():.3g}, {errors.argmax()}", str(longest)))
    table = "\n".join(f"{row:<22}{chosen:>18}{uniform:>18}" for row, chosen, uniform in zip(*columns, strict=True))
    return (
        f"{len(study.chosen)} of {study.num_steps} steps refresh, {study.summary}\n"
        f"chosen:  {' '.join(map(str, study.chosen))}\nuniform: {' '.join(map(str, study.uniform))}\n\n{table}"
    )


def _text_view(study: Study) -> str:
    """The similarity matrix in up to 32 rows of shades, two characters per cell; + on the edge marks a refresh."""
    cells = min(32, study.num_steps)
    # Cell c holds the steps from edges[c] up to edges[c + 1].
    edges = [cell * study.num_steps // cells for cell in range(cells + 1)]
    similarity = np.add.reduceat(np.add.reduceat(study.probe.similarity, edges[:-1], axis=0), edges[:-1], axis=1)
    similarity /= np.outer(np.diff(edges), np.diff(edges))
    # Shades grow evenly with the angle between states, not with its cosine.
    angles = np.arccos(np.clip(similarity, -1, 1))
    largest = max(float(angles.max()), 1e-12)
    shades = ((1 - angles / largest) * (len(_SHADES) - 1)).round().astype(int)
    marks = ["+" if any(low <= s < high for s in study.chosen) else " " for low, high in pairwise(edges)]
    rows = [f"{edges[i]:>5} {marks[i]} " + "".join(_SHADES[shade] * 2 for shade in shades[i]) for i in range(cells)]
    legend = f"similarity of the states of two steps, from {np.cos(largest):.3f} (blank) to 1 (@); + refresh steps"
    return "\n".join([legend, " " * 8 + "".join(f"{mark} " for mark in marks), *rows])


def _write(study: Study, checkpoint: Path, num_samples: int, folder: Path) -> None:
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
    with atomic_file(folder / _PICTURE) as picture, atomic_file(folder / _DATA) as data:
        _plot(study).savefig(picture, dpi=150)
        data.write_text(json.dumps(content) + "\n")


def _plot(study: Study) -> Figure:
    """A heat map of the similarity with the segments of both schedules, above the predicted error of every step."""
    count = study.num_steps
    figure = Figure(figsize=(8, 10.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(7, 3), width_ratios=(1, 0.035))
    heat = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=heat)
    extent = (0, count, count, 0)
    image = heat.imshow(
        study.probe.similarity, cmap="viridis", vmax=1, extent=extent, aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, cax=figure.add_subplot(grid[0, 1]), label="mean cosine similarity of two steps' states")
    for name, steps, errors, colour, style in (
        ("uniform", study.uniform, study.uniform_errors, "#2563eb", ":"),
        ("chosen", study.chosen, study.chosen_errors, "#c2410c", "-"),
    ):
        corners = [(x, y) for a, b in pairwise([*steps, count]) for x, y in ((a, a), (b, a), (b, b))]
        heat.plot(*zip(*corners, strict=True), color=colour, linestyle=style, linewidth=1.3, label=f"{name} segments")
        label = f"{name}, mean {errors.mean():.3g}"
        below.stairs(errors, np.arange(count + 1), color=colour, linewidth=1.2, label=label)
    heat.legend(loc="lower left")
    heat.set(ylabel="step", xlim=(0, count), ylim=(count, 0))
    heat.set_title(f"{len(study.chosen)} of {count} steps refresh the encoder ({study.summary})")
    heat.tick_params(labelbottom=False)
    largest = max(float(study.chosen_errors.max()), float(study.uniform_errors.max()))
    below.set(xlabel="step", ylabel="predicted error of the state", ylim=(0, 1.2 * largest or 1.0))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.legend(loc="upper center", ncols=2)
    return figure
