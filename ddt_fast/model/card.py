"""Model cards: the README.md of a model or pipeline folder, which says only what is known."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ddt_fast.checks import require_name, require_path
from ddt_fast.config import DataConfig, DDTConfig, Experiment
from ddt_fast.files import atomic_file, read_json, read_yaml, write_json
from ddt_fast.hub import is_hub_id
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import CONFIG_NAME, read_settings
from ddt_fast.wording import kind_of, utf8

CARD_NAME = "README.md"

# What a result depends on; paths and intervals of writing do not matter to others.
_RECIPE = (
    *("max_steps", "batch_size", "learning_rate", "warmup_steps", "adam_betas", "weight_decay", "max_grad_norm"),
    *("ema_decay", "label_dropout", "repa_weight", "repa_block", "repa_encoder", "dtype", "seed"),
)
_SCORES = {
    "num_samples": "samples",
    "accuracy": "class accuracy",
    "accuracy_real": "class accuracy of real digits, held out",
    "frechet": "pixel Fréchet distance",
    "frechet_real": "pixel Fréchet distance, real half against half",
    "nearest": "distance to the nearest training image",
    "nearest_real": "distance of a real image to the nearest other",
}
_TASK = "unconditional-image-generation"

_TEMPLATE = """\
---
{{ card_data }}
---

# DDT, {{ config.num_encoder_blocks }} + {{ config.num_decoder_blocks }} blocks of width {{ config.hidden_size }}

{{ size }}x{{ size }} images of {{ config.num_classes }} classes{{ names }}, in {{ space }}.

## How to use it

```python
from ddt_fast.pipeline import DDTPipeline

pipe = DDTPipeline.from_pretrained("FOLDER OR HUB ID")
pipe(class_labels=[0]).images[0].save("0.png")
```
{% if not is_pipeline %}
The model alone is `ddt_fast.load_model("FOLDER OR HUB ID")`.
{% endif %}
## Model

{{ table(model) }}

## Sampling

The default settings:

{{ table(sampling) }}
{% if training %}
## Training

{{ table(training) }}
{% if recipe %}
Settings:

{{ table(recipe) }}
{% endif %}{% endif %}{% if scores %}
## Scores
{% for title, values in scores.items() %}
{{ title }}:

{{ table(values) }}
{% endfor %}{% endif %}"""


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from: training.json of its run, with the training settings as `recipe`, and metrics.json of
    `ddt_fast.evaluate`; unknown parts are empty."""

    training: Mapping[str, Any]
    metrics: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write the known parts into the folder, for `read_provenance`."""
        for name, content in (("training.json", self.training), ("metrics.json", self.metrics)):
            if content:
                write_json(folder / name, dict(content))


UNKNOWN = Provenance({}, {})


def read_provenance(folder: Path) -> Provenance:
    """Read what a model or pipeline folder says about its training and scores; for a run's model/, what the run says.
    ValueError if files are damaged."""
    places = [folder]
    if folder.name == "model" and (folder.parent / "recipe.yaml").is_file():
        places.insert(0, folder.parent)

    def find(name: str) -> Path | None:
        return next((place / name for place in places if (place / name).is_file()), None)

    training, metrics, recipe = find("training.json"), find("metrics.json"), find("recipe.yaml")
    known = read_json(training) if training else {}
    _require_objects(training, known, ("versions", "recipe", "scores"))
    _require_objects(training, known.get("scores") or {}, known.get("scores") or ())
    if recipe and training and "recipe" not in known:
        known["recipe"] = _read_recipe(recipe)
    found = read_json(metrics) if metrics else {}
    _require_objects(metrics, found, ("metrics", "samples", "reference"))
    count = (found.get("samples") or {}).get("num_images")
    if not (count is None or isinstance(count, int)):
        raise ValueError(f"{metrics}: num_images is {count!r}; expected a whole number")
    return Provenance(known, found)


def _require_objects(file: Path | None, content: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(content.get(name), dict | None):
            raise ValueError(f"{file}: {name} is {kind_of(content[name])}; expected an object")


def _read_recipe(file: Path) -> dict[str, Any]:
    """The training settings that a result depends on."""
    content = read_yaml(file)
    training = content.get("training") if isinstance(content, dict) else None
    recipe = {name: training[name] for name in _RECIPE if name in training} if isinstance(training, dict) else {}
    for name, value in recipe.items():
        if any(isinstance(part, list | dict) for part in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{file}: training.{name} is nested; expected a value or a list of values")
    if not recipe.get("repa_weight"):
        return {name: value for name, value in recipe.items() if not name.startswith("repa_")}
    if not _on_hub(encoder := str(recipe.get("repa_encoder", ""))):
        recipe["repa_encoder"] = Path(encoder).name
    return recipe


def write_model_card(folder: str | Path, *, license: str | None = None) -> Path:
    """Write README.md, the model card, into a model or pipeline folder, and return its path; an older card is replaced.

    The card says what config.json, training.json and metrics.json in the folder say. For the model/ of a training run,
    these come from the run's folder and are copied beside the card, so that they go where the model goes.

    Args:
        folder: a folder written by `save_model` or `DDTPipeline.save_pretrained`.
        license: the license's identifier on the Hub, such as "mit"; None leaves it out.

    Raises:
        ValueError: the folder holds no model, or files are damaged.
        OSError: the card cannot be written.
    """
    folder = require_path("folder", folder)
    require_license(license)
    is_pipeline = (folder / "model_index.json").is_file()
    experiment = read_settings((folder / "transformer" if is_pipeline else folder) / CONFIG_NAME)
    provenance = read_provenance(folder)
    provenance.save(folder)
    card = _card(experiment, provenance, is_pipeline, license)
    with atomic_file(folder / CARD_NAME) as temporary:
        card.save(temporary)
    return folder / CARD_NAME


def require_license(license: object) -> None:
    """Require None, or the identifier of a license."""
    require_name("license", license, "none, or its identifier on the Hub, such as mit")


def _card(experiment: Experiment, provenance: Provenance, is_pipeline: bool, license: str | None) -> ModelCard:
    model, data, training = experiment.model, experiment.data, provenance.training
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DDT(model).parameters())
    reference = _reference(provenance.metrics)
    results = [  # as the Hub's front matter has them: numbers against a named reference
        EvalResult(_TASK, "image-folder", reference, metric_type=_cell(metric), metric_value=value)
        for metric, value in (provenance.metrics.get("metrics") or {}).items()
        if reference and isinstance(value, int | float)
    ]
    card_data = ModelCardData(
        license=license,
        library_name="ddt-fast",
        pipeline_tag=_TASK,
        tags=["ddt", "diffusion", "flow-matching", "class-conditional", "arxiv:2504.05741"],
        model_name="DDT" if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        card_data,
        template_str=_TEMPLATE,
        table=_table,
        is_pipeline=is_pipeline,
        config=model,
        model={**asdict(model), "parameters": f"{count:,}"},
        size=data.image_size,
        space=_space(model, data),
        names=_class_list(data.class_names),
        sampling={name: value for name, value in asdict(experiment.sampling).items() if value not in (None, False)},
        training=_training_facts(training) if training else {},
        recipe={name: value for name, value in (training.get("recipe") or {}).items() if value is not None},
        scores=_scores(provenance),
    )


def _space(model: DDTConfig, data: DataConfig) -> str:
    if data.autoencoder is not None:
        return f"latents of {_named(data.autoencoder)}"
    return "latents" if data.in_latents(model.in_channels) else "pixels"


def _class_list(names: Sequence[str] | None) -> str:
    """The first classes' names, in parentheses, if there are any."""
    more = f" and {len(names) - 10} more" if names and len(names) > 10 else ""
    return f" ({', '.join(map(_cell, names[:10]))}{more})" if names else ""


def _training_facts(training: Mapping[str, Any]) -> dict[str, Any]:
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
    return {name: value for name, value in facts.items() if value is not None}


def _scores(provenance: Provenance) -> dict[str, Mapping[str, Any]]:
    """Tables of scores, by title."""
    tables: dict[str, Mapping[str, Any]] = {}
    for kind, scores in (provenance.training.get("scores") or {}).items():
        rows = {title: scores[name] for name, title in _SCORES.items() if name in (scores or {})}
        tables[f"Samples drawn at the end of training, {_cell(kind)}"] = rows
    if values := provenance.metrics.get("metrics"):
        count, reference = (provenance.metrics.get("samples") or {}).get("num_images"), _reference(provenance.metrics)
        title = f"{count:,} samples" if count else "Samples"
        tables[title + (f", against {reference}" if reference else "")] = values
    return tables


def _reference(metrics: Mapping[str, Any]) -> str:
    """The reference of the scores, without its folder; "" if unknown."""
    return _cell(Path(str((metrics.get("reference") or {}).get("source") or "")).name)


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    """One line, escaped for Markdown: values may come from other people's files."""
    if isinstance(value, (list, tuple)) and not any(isinstance(part, (list, tuple)) for part in value):
        return ", ".join(map(_cell, value))
    text = f"{value:.6g}" if isinstance(value, float) else utf8(str(value))
    return re.sub(r"([\\|\[\]<`])", r"\\\1", " ".join(text.split()))


def _named(autoencoder: str) -> str:
    """A link to a hub id; of a local folder, whose path means nothing elsewhere, the last part."""
    if _on_hub(autoencoder):
        return f"[{autoencoder}](https://huggingface.co/{autoencoder})"
    return f"the autoencoder {_cell(Path(autoencoder).name)}"


def _on_hub(name: str) -> bool:
    return is_hub_id(name) and not Path(name).exists()
