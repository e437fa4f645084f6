"""Where a checkpoint is, and the settings that lie beside its weights. Nothing here reads weights or imports torch."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import yaml

from ddt_fast.checks import require_path
from ddt_fast.config import DataConfig, DDTConfig, Experiment, SamplingConfig
from ddt_fast.presets import PRESETS

EMBEDDED_CHECKPOINT = Path(__file__).parent.parent / "assets" / "digits"
"""The model that comes with the package."""

WeightChoice = Literal["ema", "raw", "both"]
"""The averaged weights, the trained ones, or both."""

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
_FETCHED = [
    *(f"{folder}{name}" for folder in ("", "transformer/") for name in (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME)),
    *(f"{folder}diffusion_pytorch_model-*.safetensors" for folder in ("", "transformer/")),
    *("model_index.json", "vae/config.json", "vae/*.safetensors"),  # of a pipeline, whose samples they decode
]


def resolve_checkpoint(path: str | Path) -> Path:
    """The local folder or file of a checkpoint; for a pipeline's folder, its transformer. A name like "user/model" that
    does not exist here is fetched from the Hub. ValueError if there is no such checkpoint."""
    local = require_path("checkpoint", path)
    if local.is_dir():
        return _model_folder(local)
    if local.exists():
        return local
    from ddt_fast.hub import fetch, is_hub_id  # slow to import, and local checkpoints need no Hub

    if not is_hub_id(str(path)) or local.suffix in (".ckpt", ".safetensors"):
        raise ValueError(f"checkpoint {path} does not exist; allowed: a folder, a .safetensors or a .ckpt file")
    return _model_folder(fetch(str(path), _FETCHED))


def _model_folder(folder: Path) -> Path:
    for place in (folder, folder / "transformer"):
        if any((place / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
            return place
    hint = f"; name {folder / 'model'}" if (folder / "model" / WEIGHTS_NAME).is_file() else ""
    raise ValueError(f"checkpoint {folder}: the folder holds no {WEIGHTS_NAME}{hint}")


def has_config(checkpoint: Path) -> bool:
    """Whether a local checkpoint comes with settings: a config.json in the folder, or beside a .safetensors."""
    return checkpoint.suffix != ".ckpt" and config_file(checkpoint).is_file()


def config_file(checkpoint: Path) -> Path:
    """The path of a local checkpoint's config.json, in the folder or beside the file; it may be missing."""
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / CONFIG_NAME


def experiment_of(checkpoint: Path, preset: str | None) -> Experiment:
    """The settings beside a local checkpoint's weights, else the preset's; ValueError for both or neither."""
    if has_config(checkpoint):
        saved = read_experiment(checkpoint)
        if preset is not None:
            raise ValueError(f"preset is for checkpoints without {CONFIG_NAME}; {checkpoint} has one")
        return saved
    if not isinstance(preset, str) or preset not in PRESETS:
        missing = f"{checkpoint} has no {CONFIG_NAME}, and `preset` is not given"
        problem = f"preset {preset!r} does not exist" if preset else missing
        raise ValueError(f"{problem}; allowed: {', '.join(PRESETS)}")
    return PRESETS[preset]


def read_experiment(path: str | Path) -> Experiment:
    """Read model, data and sampling settings from the config.json in (or beside) a checkpoint. A pipeline's folder has
    its own autoencoder. ValueError if config.json is missing or corrupt."""
    file = config_file(resolve_checkpoint(path))
    experiment, pipeline = read_settings(file), file.absolute().parent.parent
    model, data, vae = experiment.model, experiment.data, pipeline / "vae"
    if not (data.in_latents(model.in_channels) and (pipeline / "model_index.json").is_file() and vae.is_dir()):
        return experiment
    return replace(experiment, data=replace(data, autoencoder=str(vae)))


def read_settings(file: Path) -> Experiment:
    """Read model, data and sampling settings from a config.json, or from a training run's recipe.yaml or trainer.json.
    ValueError if the file is missing or corrupt."""
    try:
        text = file.read_text()
        entries = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        entries = entries.get("settings", entries)
        parts = entries.get("model", entries)
        model = DDTConfig(**{setting.name: parts[setting.name] for setting in fields(DDTConfig)})
        data = DataConfig(**entries.get("data", {}))
        sampling = SamplingConfig.saved(entries.get("sampling", {}))
        return Experiment(model, data, sampling=sampling)
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist") from error
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from error
    except (TypeError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is not a valid configuration: {error}") from error
