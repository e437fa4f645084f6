"""Checks of a pipeline's folder before any of it is loaded: it may come from other people."""

from pathlib import Path
from typing import Any

from ddt_fast.files import check_replaceable, read_json
from ddt_fast.model.weights import shard_names
from ddt_fast.weight_files import require_readable_folder

INDEX_NAME = "model_index.json"
PIPELINE_CLASS = "DDTPipeline"
PACKAGE = "ddt_fast.pipeline"
OWNED_NAMES = r"model_index\.json|transformer|vae|scheduler|README\.md|training\.json|metrics\.json"
_OWNED_WITHIN = r"(scheduler_)?config\.json|diffusion_pytorch_model.*\.(safetensors|index.*\.json)"

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
# As in model_index.json: [module, class], or two nulls for a missing part.
_NONE: list[Any] = [None, None]
_COMPONENTS = {
    "transformer": [[PACKAGE, "DDTTransformer2DModel"]],
    "scheduler": [[PACKAGE, "DDTScheduler"]],
    "vae": [["diffusers", "AutoencoderKL"], _NONE],
}


def check_pipeline(folder: Path) -> None:
    """ValueError unless the folder holds a DDTPipeline: components of its own classes, which are the only ones to be
    imported, and weights as safetensors."""
    index = read_json(folder / INDEX_NAME)
    if index.get("_class_name") != PIPELINE_CLASS:
        raise ValueError(f"{folder} holds a {index.get('_class_name')}; expected a {PIPELINE_CLASS}")
    for name, allowed in _COMPONENTS.items():
        if index.get(name) not in allowed:
            words = " or ".join("none" if part == _NONE else ".".join(part) for part in allowed)
            raise ValueError(f"{folder / INDEX_NAME}: {name} is {index.get(name)!r}; allowed: {words}")
        if index[name] == _NONE:
            continue
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} lacks its folder {name}")
        # diffusers would take a component's class from such a file.
        if code := sorted((folder / name).glob("*.py")):
            raise ValueError(f"{code[0]} is code, and was not executed; allowed: weights and configuration")
        if name != "scheduler":
            check_weights(folder / name)


def check_pipeline_replaceable(folder: Path) -> None:
    """ValueError if a pipeline written here would replace anything but a pipeline."""
    check_replaceable(folder, OWNED_NAMES)
    for name in _COMPONENTS:
        check_replaceable(folder / name, _OWNED_WITHIN)


def check_weights(folder: Path) -> None:
    """ValueError if a model's folder holds its weights only as pickles, or an index names anything but safetensors in
    it: pickles may hold code, and are not opened."""
    names = sorted(entry.name for entry in folder.iterdir())
    for index in folder.glob("*.index*.json"):
        shard_names(index)
    require_readable_folder(folder)
    pickled = [name for name in names if name.endswith(_PICKLES)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder} holds its weights as {pickled[0]}, a pickle, which may hold code and was not opened; expected "
            "safetensors"
        )
