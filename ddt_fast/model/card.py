"""Model cards: the README.md of a model or pipeline folder. It says what is known, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ddt_fast.checks import require_name, require_path
from ddt_fast.config import DDTConfig, Experiment
from ddt_fast.files import atomic_file, read_json, write_json
from ddt_fast.model.reference import DDT
from ddt_fast.model.weights import CONFIG_NAME, read_settings

CARD_NAME = "README.md"
_TRAINING_NAME, _METRICS_NAME, _RECIPE_NAME = "training.json", "metrics.json", "recipe.yaml"

# What a result depends on; where things lay and how often they were written are nobody else's business.
_RECIPE = (
    *("max_steps", "batch_size", "learning_rate", "warmup_steps", "adam_betas", "weight_decay", "max_grad_norm"),
    *("ema_decay", "label_dropout", "repa_weight", "repa_block", "repa_encoder", "dtype", "seed"),
)
_TAGS = ("ddt", "diffusion", "flow-matching", "class-conditional", "arxiv:2504.05741")
_SCORES = {
    "num_samples": "samples",
    "accuracy": "class accuracy",
    "accuracy_real": "class accuracy of real digits, held out",
    "frechet": "pixel Fréchet distance",
    "frechet_real": "pixel Fréchet distance, real half against half",
    "nearest": "distance to the nearest training image",
    "nearest_real": "distance of a real image to the nearest other",
}


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from, as far as it is known; a part that is not is empty.

    Attributes:
        training: training.json of its run, with the settings of training as `recipe`.
        metrics: metrics.json of `ddt_fast.evaluate`.
    """

    training: Mapping[str, Any]
    metrics: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write what is known into the folder, for `read_provenance`."""
        for name, content in ((_TRAINING_NAME, self.training), (_METRICS_NAME, self.metrics)):
            if content:
                write_json(folder / name, dict(content))


UNKNOWN = Provenance({}, {})


def recipe_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of training those that a result depends on."""
    recipe = {name: training[name] for name in _RECIPE if name in training}
    if not recipe.get("repa_weight"):
        return {name: value for name, value in recipe.items() if not name.startswith("repa_")}
    if not _is_hub_id(encoder := str(recipe.get("repa_encoder", ""))):
        recipe["repa_encoder"] = Path(encoder).name
    return recipe


def read_provenance(folder: Path) -> Provenance:
    """What a model or pipeline folder says of its training and scores; for the model/ of a run, what the run says.

    Raises:
        ValueError: damaged files.
    """
    places = [folder]
    if folder.name == "model" and (folder.parent / _RECIPE_NAME).is_file():
        places.insert(0, folder.parent)
    training, metrics, recipe = (_first(places, name) for name in (_TRAINING_NAME, _METRICS_NAME, _RECIPE_NAME))
    known = _read_objects(training, ("versions", "recipe", "scores"))
    for kind in known.get("scores") or {}:
        _require_object(f"{training}: scores: {kind}", known["scores"][kind])
    if recipe and training and "recipe" not in known:
        known["recipe"] = recipe_of(_read_recipe(recipe))
    found = _read_objects(metrics, ("metrics", "samples", "reference"))
    count = (found.get("samples") or {}).get("num_images")
    if not (count is None or isinstance(count, int)):
        raise ValueError(f"{metrics}: num_images is {count!r}; wanted a whole number")
    return Provenance(known, found)


def _read_objects(file: Path | None, names: tuple[str, ...]) -> dict[str, Any]:
    """What a JSON file holds, nothing where there is none; ValueError where a value of these names is no object."""
    content = read_json(file) if file else {}
    for name in names:
        if content.get(name) is not None:
            _require_object(f"{file}: {name}", content[name])
    return content


def _require_object(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}; wanted an object")


def write_model_card(folder: str | Path, *, license: str | None = None) -> Path:
    """Write README.md, the model card, into a model folder or a pipeline's; an older one is replaced.

    It says what config.json, training.json and metrics.json in the folder say. For the model/ of a training run, what
    the run's folder says as well; that is copied beside it, so that it goes where the model goes.

    Args:
        folder: written by `save_model` or `DDTPipeline.save_pretrained`.
        license: its identifier on the Hub, such as "mit"; None leaves it out.

    Returns:
        The file.

    Raises:
        ValueError: no model there, or damaged files.
        OSError: it cannot be written.
    """
    folder = require_path("folder", folder)
    require_name("license", license, "none, or its identifier on the Hub, such as mit")
    is_pipeline = (folder / "model_index.json").is_file()
    experiment = read_settings((folder / "transformer" if is_pipeline else folder) / CONFIG_NAME)
    provenance = read_provenance(folder)
    provenance.save(folder)
    with atomic_file(folder / CARD_NAME) as temporary:
        temporary.write_text(_card(experiment, provenance, is_pipeline, license))
    return folder / CARD_NAME


def _card(experiment: Experiment, provenance: Provenance, is_pipeline: bool, license: str | None) -> str:
    model, data = experiment.model, experiment.data
    front = {
        **({} if license is None else {"license": license}),
        "library_name": "ddt-fast",
        "pipeline_tag": "unconditional-image-generation",
        "tags": list(_TAGS),
    }
    size = f"{data.image_size}x{data.image_size}"
    sees = "pixels" if data.autoencoder is None else f"latents of {_named(data.autoencoder)}"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# DDT, {model.num_encoder_blocks} + {model.num_decoder_blocks} blocks of width {model.hidden_size}",
        "A Decoupled Diffusion Transformer ([arXiv 2504.05741](https://arxiv.org/abs/2504.05741)) that draws "
        f"{size} images of {model.num_classes} classes, in {sees}.",
        "## How to use it",
        f"```python\n{_USAGE}\n```" + ("" if is_pipeline else _USAGE_OF_MODEL),
        "## Model",
        _table({**asdict(model), "parameters": f"{_num_parameters(model):,}"}),
        "## Sampling",
        "How it samples unless told otherwise:",
        _table({name: value for name, value in asdict(experiment.sampling).items() if value not in (None, False)}),
    ]
    parts += _training(provenance.training) + _metrics(provenance)
    return "\n\n".join(parts) + "\n"


_USAGE = """\
from ddt_fast.pipeline import DDTPipeline

pipe = DDTPipeline.from_pretrained("FOLDER OR HUB ID")
pipe(class_labels=[0]).images[0].save("0.png")"""
_USAGE_OF_MODEL = """

The model alone is `ddt_fast.load_model("FOLDER OR HUB ID")`."""


def _training(training: Mapping[str, Any]) -> list[str]:
    if not training:
        return []
    versions, hardware = training.get("versions") or {}, training.get("hardware")
    facts = {
        "steps": training.get("steps"),
        "seconds": training.get("training_seconds"),
        "processes": training.get("processes"),
        "device": hardware.get("device") if isinstance(hardware, Mapping) else training.get("device"),
        "torch": versions.get("torch") or training.get("torch"),
        "commit of ddt-fast": training.get("commit"),
        "with uncommitted changes": "yes" if training.get("uncommitted_changes") else None,
    }
    parts = ["## Training", _table({name: value for name, value in facts.items() if value is not None})]
    recipe = {name: value for name, value in (training.get("recipe") or {}).items() if value is not None}
    return [*parts, "Settings:", _table(recipe)] if recipe else parts


def _metrics(provenance: Provenance) -> list[str]:
    parts = []
    for kind, scores in (provenance.training.get("scores") or {}).items():
        rows = {title: scores[name] for name, title in _SCORES.items() if name in scores}
        parts += [f"Samples drawn at the end of training, {_cell(kind)}:", _table(rows)]
    if values := provenance.metrics.get("metrics"):
        samples, reference = (provenance.metrics.get(role) or {} for role in ("samples", "reference"))
        against = f", against {_cell(Path(str(reference['source'])).name)}" if reference.get("source") else ""
        count = f"{samples['num_images']:,} samples" if samples.get("num_images") else "Samples"
        parts += [f"{count}{against}:", _table(values)]
    return ["## Scores", *parts] if parts else []


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    """In one line that Markdown takes as it is: values may be of other people's files."""
    if isinstance(value, (list, tuple)) and not any(isinstance(part, (list, tuple)) for part in value):
        return ", ".join(map(_cell, value))
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\|\[\]<`])", r"\\\1", " ".join(text.split()))


def _named(autoencoder: str) -> str:
    """A hub id as a link; of a local folder, which means nothing elsewhere, the last part."""
    if _is_hub_id(autoencoder):
        return f"[{autoencoder}](https://huggingface.co/{autoencoder})"
    return f"the autoencoder {_cell(Path(autoencoder).name)}"


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _num_parameters(model: DDTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DDT(model).parameters())


def _first(places: list[Path], name: str) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)


def _read_recipe(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no valid YAML: {error}") from error
    training = content.get("training") if isinstance(content, dict) else None
    training = training if isinstance(training, dict) else {}
    for name, value in training.items():
        if any(isinstance(part, (list, dict)) for part in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{file}: training.{name} is neither a value nor a list of values")
    return training
