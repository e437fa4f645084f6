"""Models on disk: a folder of config.json and safetensors, a bare .safetensors file, or a released Lightning .ckpt
(`lightning`)."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ddt_fast.checks import require, require_choice, require_path
from ddt_fast.config import DataConfig, DDTConfig, Experiment, SamplingConfig
from ddt_fast.files import atomic_folder, read_json
from ddt_fast.model.lightning import LightningWeights, WeightSet, check_projector, own_storages, read_lightning
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    config_file,
    has_config,
    read_experiment,
    resolve_checkpoint,
)
from ddt_fast.presets import PRESETS
from ddt_fast.weight_files import read_safetensors
from ddt_fast.wording import plural

CLASS_TABLE = "y_embedder.embedding_table.weight"
"""The embeddings of the classes, and after them the null class's."""
RAW_NAME = "raw.safetensors"
PROJECTOR_NAME = "repa_projector.safetensors"
OWNED_NAMES = (
    r"config\.json|diffusion_pytorch_model\.safetensors|raw\.safetensors|repa_projector\.safetensors"
    r"|recipe\.yaml|training\.json|metrics\.json|README\.md|refresh_schedules\.json"
)


def save_model(
    model: DDT,
    folder: str | Path,
    data: DataConfig,
    sampling: SamplingConfig,
    raw: Mapping[str, Tensor] | None = None,
    projector: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model folder that `load_model` reads, whole or not at all; an older model in the folder is replaced.

    config.json holds the model's shape, and how its samples become images and are best drawn, so that sampling needs
    only the folder. Weights keep their dtype. For continued training, `raw` (the weights that the model is the average
    of) and REPA's `projector` go into files of their own; `read_weight_sets` reads them.

    Raises:
        ValueError: the folder holds anything but a model.
        OSError: the folder cannot be written.
    """
    entries = {"_class_name": "DDT", **asdict(model.config), "data": asdict(data), "sampling": asdict(sampling)}
    with atomic_folder(require_path("folder", folder), OWNED_NAMES) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(entries, indent=2) + "\n")
        files = {WEIGHTS_NAME: model.state_dict(), RAW_NAME: raw, PROJECTOR_NAME: projector}
        try:
            for name, tensors in files.items():
                if tensors:
                    save_file(own_storages(tensors), temporary / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written: {error}") from error


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: DDTConfig | None = None,
    weights: WeightSet = "ema",
) -> DDT:
    """Load a DDT for sampling: in eval mode, without gradients.

    Args:
        path: a folder written by `save_model`, the folder of a `DDTPipeline`, a .safetensors file, a released
            Lightning .ckpt, or the hub id of such a folder.
        device, dtype: the model's device and dtype.
        config: needed only for a bare weights file whose shapes no preset has, because they do not determine the patch
            size and the number of encoder blocks; must agree with the folder's config.json, if there is one.
        weights: "ema", the averaged weights, which every folder has; "raw", those to continue training from, if kept.

    Raises:
        ValueError: the file is missing or corrupt, a .ckpt holds more than tensors (nothing in it is run), or weights
            and configuration disagree.
    """
    require_float("dtype", dtype)
    require_choice("weights", weights, WeightSet)
    source = resolve_checkpoint(path)
    tensors = _read_sets(source).take(weights, source)
    if has_config(source):
        saved = read_experiment(source).model
        if config is not None and config != saved:
            file = config_file(source)
            raise ValueError(f"{file} says {saved}, config says {config}; leave config out or make them agree")
        config = saved
    if config is None:
        preset, config = settle_config(tensors, source)
        guessed = f"patch size {config.patch_size}, {config.num_encoder_blocks} encoder blocks"
        warnings.warn(f"{source.name} does not record {guessed}: taken from preset {preset} by its shape", stacklevel=2)
    model = build_model(config, tensors, source)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def require_float(name: str, dtype: object) -> None:
    """Require a dtype that weights may have."""
    allowed = torch.float32, torch.bfloat16, torch.float16, torch.float64
    valid = isinstance(dtype, torch.dtype) and dtype in allowed
    require(valid, name, dtype, ", ".join(map(str, allowed)))


def read_weight_sets(path: str | Path, config: DDTConfig | None = None, any_classes: bool = False) -> LightningWeights:
    """Read everything that training can continue from: averaged weights, raw weights and REPA's projector, as far as
    they exist, from a .ckpt, a folder, a .safetensors file (whose weights count as averaged) or a hub id. They are on
    the CPU, memory-mapped, in their own dtype. ValueError if the file is missing or corrupt, or weights or projector do
    not fit `config`, if given; with any_classes, their number of classes may be another."""
    source = resolve_checkpoint(path)
    sets = _read_sets(source)
    if config is not None:
        if any_classes:
            weights = sets.ema or sets.raw
            config = replace(config, num_classes=_settled_by_shapes(weights, source)["num_classes"])
        if has_config(source):
            _check_settings(asdict(read_experiment(source).model), asdict(config), source)
        for weights in filter(None, (sets.ema, sets.raw)):
            build_model(config, weights, source)
        if sets.projector:
            check_projector(sets.projector, config.hidden_size, source)
    return sets


def _read_sets(source: Path) -> LightningWeights:
    if source.suffix == ".ckpt":
        return read_lightning(source)
    if not source.is_dir():
        return LightningWeights(_read_safetensors(source), {}, {}, [])
    others = (source / RAW_NAME, source / PROJECTOR_NAME)
    raw, projector = (_read_safetensors(file) if file.is_file() else {} for file in others)
    return LightningWeights(read_folder(source), raw, projector, [])


def build_model(config: DDTConfig, weights: Mapping[str, Tensor], source: Path) -> DDT:
    """A DDT that holds these tensors, not copies; ValueError if they do not fit, with `source` as their origin."""
    _check_settings(_settled_by_shapes(weights, source), _settled(config), source)
    with torch.device("meta"):
        model = DDT(config)
    _check_tensors(model.state_dict(), weights, source)
    model.load_state_dict(weights, assign=True)
    return model


def read_folder(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """Read the weights of a folder, memory-mapped. diffusers splits large weights into several files, and adds the name
    of a variant to the file names. ValueError if weights are missing or damaged, or an index names anything but
    safetensors in the folder."""
    marked = "" if variant is None else f".{variant}"
    whole = WEIGHTS_NAME.replace(".safetensors", f"{marked}.safetensors")
    index = INDEX_NAME.replace(".json", f"{marked}.json")
    if not (folder / index).is_file():
        return _read_safetensors(folder / whole)
    parts = [_read_safetensors(folder / file) for file in shard_names(folder / index)]
    return {name: tensor for part in parts for name, tensor in part.items()}


def shard_names(index: Path) -> list[str]:
    """The files that an index of weights names; ValueError unless all are safetensors in its own folder."""
    places = read_json(index).get("weight_map")
    files = places.values() if isinstance(places, dict) else [None]
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} says that weights are in {file!r}; expected .safetensors files in its folder")
    return sorted(set(files))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        raise ValueError(f"checkpoint {file} ends in {file.suffix or 'nothing'}; allowed: .safetensors, .ckpt")
    return read_safetensors("checkpoint", file, "a whole .safetensors file")


def settle_config(
    weights: Mapping[str, Tensor], source: Path, presets: Mapping[str, Experiment] = PRESETS
) -> tuple[str, DDTConfig]:
    """The name of the first preset that agrees with the shapes of the weights, and its config with their number of
    classes. ValueError if no preset agrees, or the weights are not a DDT's; the message names `source` as their
    origin."""
    seen = _settled_by_shapes(weights, source)
    for name, preset in presets.items():
        if _settled(preset.model) | {"num_classes": seen["num_classes"]} == seen:
            return name, replace(preset.model, num_classes=seen["num_classes"])
    whose = f"preset {next(iter(presets))} does not have" if len(presets) == 1 else "no preset has"
    shape = f"{plural(seen['num_blocks'], 'block')} of width {seen['hidden_size']}"
    raise ValueError(
        f"checkpoint {source} has {shape}, head dimension {seen['hidden_size / num_heads']}, which {whose}: its patch "
        "size and number of encoder blocks are unknown; pass `config`"
    )


def _settled_by_shapes(weights: Mapping[str, Tensor], source: Path) -> dict[str, int]:
    """`_settled` for the model with these weights; ValueError if no DDT has them."""
    try:
        hidden_size, patch_features = weights["x_embedder.proj.weight"].shape
        return {
            "hidden_size": hidden_size,
            "hidden_size / num_heads": weights["blocks.0.attn.q_norm.weight"].shape[0],
            "num_blocks": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
            "in_channels * patch_size^2": patch_features,
            "num_classes": weights[CLASS_TABLE].shape[0] - 1,
        }
    except KeyError as error:
        raise ValueError(f"checkpoint {source} holds no tensor {error}; it is not a DDT") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"checkpoint {source} holds tensors whose names or shapes no DDT has: {error}") from error


def _settled(config: DDTConfig) -> dict[str, int]:
    """The settings, or products of settings, that the shapes of the weights determine."""
    return {
        "hidden_size": config.hidden_size,
        "hidden_size / num_heads": config.head_dim,
        "num_blocks": config.num_blocks,
        "in_channels * patch_size^2": config.in_channels * config.patch_size**2,
        "num_classes": config.num_classes,
    }


def _check_settings(seen: Mapping[str, int], config: Mapping[str, int], source: Path) -> None:
    differing = [name for name in seen if seen[name] != config[name]]
    _disagree(source, [f"{name} {seen[name]} in {source}, {config[name]} in the config" for name in differing])


def _check_tensors(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: Path) -> None:
    wrong = {
        "missing tensor": sorted(expected.keys() - weights.keys()),
        "unexpected tensor": sorted(weights.keys() - expected.keys()),
        "integer tensor": [f"{n}: {t.dtype}" for n, t in sorted(weights.items()) if not t.is_floating_point()],
        "wrongly shaped tensor": [
            f"{n}: {tuple(weights[n].shape)}, expected {tuple(expected[n].shape)}"
            for n in sorted(expected.keys() & weights.keys())
            if weights[n].shape != expected[n].shape
        ],
    }
    _disagree(source, [f"{plural(len(found), what)} (such as {found[0]})" for what, found in wrong.items() if found])


def _disagree(source: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"checkpoint {source} and its configuration disagree: {'; '.join(problems)}")
