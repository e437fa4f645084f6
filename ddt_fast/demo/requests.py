"""The models to choose from, and what a client asks of them: a `Request`, or a ValueError that says what is allowed."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddt_fast.config import SamplingConfig
from ddt_fast.device import choose_dtype
from ddt_fast.generation.seeds import assign_labels
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT, has_config
from ddt_fast.pipeline import DDTPipeline
from ddt_fast.sampling.plan import SamplingPlan
from ddt_fast.wording import utf8

Models = dict[str, DDTPipeline]
"""By their names in the page's list."""

EMBEDDED_NAME = "digits"
MAX_SEED = 2**53 - 1
"""Larger integers are not exact in a browser."""

_LONGEST_NAME = 100


@dataclass(frozen=True)
class Request:
    """Images to draw: image i has labels[i] and seeds[i], as in the sample command; `frames` is the number of moments
    in a trajectory."""

    model: str
    pipe: DDTPipeline
    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: SamplingConfig
    frames: int

    @property
    def plan(self) -> SamplingPlan:
        """The steps of the run."""
        return SamplingPlan.from_config(self.sampling)


def read_request(values: Sequence[Any], models: Models, fields: Mapping[str, Any]) -> Request:
    """Make a request from a client's values, in the order of the page's components, `fields`; ValueError if one is not
    allowed. Classes are a list of labels or names, empty for all; `frames`, the last, is only sent for trajectories."""
    name = values[0]
    if not isinstance(name, str) or name not in models:
        raise ValueError(f"model {reprlib.repr(name)} is not available; allowed: {', '.join(models)}")
    pipe = models[name]
    given = default_values(pipe) | dict(zip(fields, values, strict=False))
    numbers = {part: _read_number(given[part], field) for part, field in fields.items() if hasattr(field, "minimum")}
    count, seed, frames = (numbers.pop(part) for part in ("num_images", "seed", "frames"))
    if seed + count - 1 > MAX_SEED:
        raise ValueError(f"the last of {count} seeds from {seed} is too large; allowed: up to {MAX_SEED}")
    numbers["guidance_interval"] = numbers.pop("guidance_low"), numbers.pop("guidance_high")
    own = _own_sampling(pipe)
    choices = {part: given[part] for part in fields if hasattr(own, part)}
    sampling = replace(own, **choices | numbers)
    labels = assign_labels(count, pipe.class_names.num_classes, _read_classes(given["classes"], pipe))
    request = Request(name, pipe, tuple(labels.tolist()), tuple(range(seed, seed + count)), sampling, frames)
    _ = request.plan  # ValueError for settings that cannot be run
    return request


def _read_number(value: Any, field: Any) -> Any:
    """A float within the field's bounds, or an int if the field steps by 1 (a browser may send 3.0); ValueError for
    anything else, including NaN."""
    whole = field.step == 1
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and field.minimum <= value <= field.maximum
    if not valid or (whole and value != int(value)):
        seen, kind = "empty" if value is None else reprlib.repr(value), "a whole number, " * whole
        raise ValueError(f"{field.label} is {seen}; allowed: {kind}{field.minimum} to {field.maximum}")
    return int(value) if whole else float(value)


def _read_classes(chosen: Any, pipe: DDTPipeline) -> list[int]:
    entries = chosen if isinstance(chosen, list) else [chosen] if chosen else []
    if len(entries) > pipe.class_names.num_classes:
        raise ValueError(f"{len(entries)} classes are chosen; allowed: up to {pipe.class_names.num_classes}")
    labels = []
    for entry in entries:
        if isinstance(entry, str) and len(entry) > _LONGEST_NAME:
            raise ValueError(f"a class name has {len(entry)} characters; allowed: up to {_LONGEST_NAME}")
        is_label = isinstance(entry, str) and entry.strip().isdecimal()
        labels.append(pipe.class_names.label(int(entry) if is_label else entry))
    return labels


def default_values(pipe: DDTPipeline) -> dict[str, Any]:
    """The initial values of the page's fields, by name, with more images for pixels, which are fast to draw."""
    sampling = _own_sampling(pipe)
    low, high = sampling.guidance_interval
    own = {"num_images": 10 if pipe.vae is None else 4, "guidance_low": low, "guidance_high": high}
    return asdict(sampling) | own | {"classes": [], "seed": 0, "frames": 9}


def class_choices(pipe: DDTPipeline) -> list[tuple[str, str]]:
    """(text to show and to search, label) of every class."""
    names = {str(label): utf8(name) for label, name in pipe.id2label.items()}
    labels = [str(label) for label in range(pipe.class_names.num_classes)]
    return [(label if names.get(label, label) == label else f"{label} · {names[label]}", label) for label in labels]


def _own_sampling(pipe: DDTPipeline) -> SamplingConfig:
    """The pipeline's settings with evenly spaced refreshes and a solver's steps, for which the page has sliders."""
    unset: dict[str, Any] = {"refresh_steps": None, "num_refreshes": None, "cuda_graphs": None, "schedule": None}
    return replace(pipe.scheduler.sampling_config, **unset)


def load_models(checkpoints: Sequence[str], preset: str | None, device: torch.device, dtype: str) -> Models:
    """Load the checkpoints (folders, files or hub ids), and the package's digits.

    `preset` is for files without config.json, `dtype` as for `choose_dtype`. ValueError for a checkpoint that cannot be
    loaded or is given twice, OSError for files that cannot be read.
    """
    models: Models = {}
    for name in (*checkpoints, EMBEDDED_NAME):
        if name in models:
            raise ValueError(f"`checkpoint` names {name} twice; the {EMBEDDED_NAME} are always loaded")
        models[name] = _load(Path(EMBEDDED_CHECKPOINT if name == EMBEDDED_NAME else name), preset, device, dtype)
    return models


def _load(source: Path, preset: str | None, device: torch.device, dtype: str) -> DDTPipeline:
    if source.is_file():
        pipe = DDTPipeline.from_single_file(source, preset=None if has_config(source) else preset)
    else:
        pipe = DDTPipeline.from_pretrained(source)
    if pipe.lacks_vae:
        raise ValueError(f"{source} draws latents and has no autoencoder; expected a pipeline folder with vae/")
    # The autoencoder stays in float32, as in the sample command. Module's own `to`, because diffusers' warns at casts.
    torch.nn.Module.to(pipe.transformer, choose_dtype(dtype, device, latents=pipe.vae is not None))
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
