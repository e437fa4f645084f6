"""Models on disk: a folder of config.json and safetensors, a bare .safetensors file, or a released Lightning .ckpt."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddt_fast.config import DataConfig, DDTConfig, Experiment, SamplingConfig
from ddt_fast.files import atomic_folder
from ddt_fast.model.reference import DDT
from ddt_fast.presets import PRESETS

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
OWNED_NAMES = (
    r"config\.json|diffusion_pytorch_model\.safetensors|recipe\.yaml|training\.json|README\.md|refresh_schedules\.json"
)
_EMA_PREFIX = "ema_denoiser."


def save_model(model: DDT, folder: str | Path, data: DataConfig, sampling: SamplingConfig) -> None:
    """Write a model folder that `load_model` reads, whole or not at all; an older model of that name is replaced.

    config.json holds the model's shape, and how its samples become images and are best drawn, so that a folder is all
    that sampling needs. Weights keep their dtype.

    Raises:
        ValueError: the folder holds anything but a model.
        OSError: it cannot be written.
    """
    entries = {"_class_name": "DDT", **asdict(model.config), "data": asdict(data), "sampling": asdict(sampling)}
    with atomic_folder(Path(folder), OWNED_NAMES) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(entries, indent=2) + "\n")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        try:
            save_file(weights, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written: {error}") from error


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: DDTConfig | None = None,
) -> DDT:
    """Load a DDT for sampling: in eval mode, without gradients.

    Args:
        path: a folder written by `save_model`, a .safetensors file, a released Lightning .ckpt (its EMA weights are
            taken), or a Hugging Face Hub id of such a folder.
        device, dtype: where to put it, and the dtype of its weights.
        config: needed only where a bare weights file leaves open what its tensor shapes do not settle (patch size,
            number of encoder blocks) and no preset has these shapes; must agree with the folder's config.json if given.

    Raises:
        ValueError: missing or corrupt file, or weights and configuration that disagree.
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; allowed: torch.float32, torch.bfloat16, torch.float16, torch.float64")
    source = resolve_checkpoint(path)
    weights_file = source / WEIGHTS_NAME if source.is_dir() else source
    config_file = (source if source.is_dir() else source.parent) / CONFIG_NAME
    weights = _read_weights(weights_file)
    if config_file.is_file() and weights_file.suffix == ".safetensors":
        saved = read_experiment(source).model
        if config is not None and config != saved:
            raise ValueError(f"{config_file} says {saved}, config says {config}; leave config out or make them agree")
        config = saved
    with torch.device("meta"):
        model = DDT(config or _config_from_weights(weights, weights_file))
    _check_fit({name: tensor.shape for name, tensor in model.state_dict().items()}, weights, weights_file)
    model.load_state_dict(weights, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def resolve_checkpoint(path: str | Path) -> Path:
    """The local folder or file of a checkpoint; a name like "user/model" that is none is fetched from the Hub.

    Raises:
        ValueError: nothing there.
    """
    local = Path(path)
    if local.is_dir() and not (local / WEIGHTS_NAME).is_file():
        raise ValueError(f"checkpoint {path}: the folder holds no {WEIGHTS_NAME}")
    if local.exists():
        return local
    if str(path).count("/") != 1 or local.suffix in (".ckpt", ".safetensors") or str(path).startswith((".", "/", "~")):
        raise ValueError(f"checkpoint {path} does not exist; wanted a folder, a .safetensors or a .ckpt file")
    try:
        return Path(snapshot_download(str(path), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {path} is no local path and could not be had from the Hub: {reason}") from error


def has_config(checkpoint: Path) -> bool:
    """Whether a local checkpoint has its settings with it: a config.json in the folder, or beside a .safetensors."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return checkpoint.suffix != ".ckpt" and (folder / CONFIG_NAME).is_file()


def experiment_of(checkpoint: Path, preset: str | None) -> Experiment:
    """The settings beside a local checkpoint's weights, else those of the preset; ValueError for both or neither."""
    if has_config(checkpoint):
        saved = read_experiment(checkpoint)
        if preset is not None:
            raise ValueError(f"--preset is for checkpoints without {CONFIG_NAME}; {checkpoint} has one")
        return saved
    if preset not in PRESETS:
        given = f"preset {preset!r} does not exist" if preset else f"{checkpoint} has no {CONFIG_NAME} and no --preset"
        raise ValueError(f"{given}; allowed: {', '.join(PRESETS)}")
    return PRESETS[preset]


def read_experiment(path: str | Path) -> Experiment:
    """Model, data and sampling settings from the config.json of (or beside) a checkpoint.

    Raises:
        ValueError: no or a corrupt config.json.
    """
    source = resolve_checkpoint(path)
    file = (source if source.is_dir() else source.parent) / CONFIG_NAME
    try:
        entries = json.loads(file.read_text())
        model = DDTConfig(**{setting.name: entries[setting.name] for setting in fields(DDTConfig)})
        data = DataConfig(**entries.get("data", {}))
        sampling = SamplingConfig(**entries.get("sampling", {}))
        return Experiment(model, data, sampling=sampling)
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist") from error
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a valid configuration: {error}") from error


def _read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file, under the model's own names."""
    if not file.is_file():
        raise ValueError(f"checkpoint {file} does not exist")
    if file.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"checkpoint {file} ends in {file.suffix or 'nothing'}; allowed: .safetensors, .ckpt")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors = dict(content["state_dict"])
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {file} is corrupt or no checkpoint: {reason}") from error
    weights = {
        name.removeprefix(_EMA_PREFIX): tensor
        for name, tensor in tensors.items()
        if isinstance(name, str) and name.startswith(_EMA_PREFIX) and isinstance(tensor, Tensor)
    }
    if not weights:
        raise ValueError(f"checkpoint {file} holds no {_EMA_PREFIX}* tensors; it is not a released DDT checkpoint")
    return weights


def _config_from_weights(weights: dict[str, Tensor], file: Path) -> DDTConfig:
    """What the shapes settle, completed from the preset that has them."""
    try:
        hidden_size, patch_features = weights["x_embedder.proj.weight"].shape
        head_dim = weights["blocks.0.attn.q_norm.weight"].shape[0]
        num_classes = weights["y_embedder.embedding_table.weight"].shape[0] - 1
        num_blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    except KeyError as error:
        raise ValueError(f"checkpoint {file} holds no tensor {error}; it is not a DDT") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"checkpoint {file} holds tensors of names or shapes that no DDT has: {error}") from error
    for preset in PRESETS.values():
        model = preset.model
        known = (model.hidden_size, model.head_dim, model.num_blocks, model.in_channels * model.patch_size**2)
        if known == (hidden_size, head_dim, num_blocks, patch_features):
            guessed = f"patch size {model.patch_size}, {model.num_encoder_blocks} encoder blocks"
            warnings.warn(f"{file.name} says nothing of {guessed}: taken from the preset of its shape", stacklevel=3)
            return replace(model, num_classes=num_classes)
    raise ValueError(
        f"checkpoint {file} has {num_blocks} blocks of width {hidden_size}, which no preset has: its patch size and "
        "number of encoder blocks are unknown; pass config"
    )


def _check_fit(wanted: dict[str, torch.Size], weights: dict[str, Tensor], file: Path) -> None:
    missing, unexpected = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    wrong = [name for name in wanted.keys() & weights.keys() if wanted[name] != weights[name].shape]
    problems = [
        f"{len(names)} {what} (such as {names[0]})"
        for what, names in (("tensors missing", missing), ("tensors unexpected", unexpected))
        if names
    ]
    counts = sorted(name for name in weights if not weights[name].is_floating_point())
    if counts:
        problems.append(f"{len(counts)} tensors without fractions (such as {counts[0]}: {weights[counts[0]].dtype})")
    if wrong:
        name = min(wrong)
        shapes = f"{tuple(weights[name].shape)}, wanted {tuple(wanted[name])}"
        problems.append(f"{len(wrong)} tensors of another shape (such as {name}: {shapes})")
    if problems:
        raise ValueError(f"checkpoint {file} and its configuration disagree: {'; '.join(problems)}")
