"""The work of `ddt_fast.convert`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ddt_fast.config import Experiment
from ddt_fast.data.latent_dataset import read_channel_stats
from ddt_fast.device import dtype_name
from ddt_fast.files import check_replaceable
from ddt_fast.model.card import write_model_card
from ddt_fast.model.lightning import LightningWeights, check_projector, read_lightning, write_lightning
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import (
    CONFIG_NAME,
    WeightChoice,
    experiment_of,
    has_config,
    read_settings,
    resolve_checkpoint,
)
from ddt_fast.model.weights import OWNED_NAMES, build_model, read_weight_sets, save_model, settle_config
from ddt_fast.presets import PRESETS
from ddt_fast.training.checkpoint import TRAINER, newest_checkpoint, read_checkpoint
from ddt_fast.wording import plural

_ORIGINAL_SCALE = 0.18215
"""The original code's autoencoder's, Stable Diffusion's."""


class Settings(NamedTuple):
    """Where to take the settings of a source that has none: a preset, or a file."""

    preset: str | None
    config: Path | None


def convert(given: Path, out: Path, weights: WeightChoice | None, settings: Settings, skip: Sequence[str]) -> None:
    """Convert `given` into `out`; arguments and errors are those of `ddt_fast.convert.convert_checkpoint`."""
    run = newest_checkpoint(given)
    source = run or resolve_checkpoint(given)
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is both `source` and `out`; name another `out`")
    if source.suffix != ".ckpt" and skip:
        raise ValueError("skip is for a source that is a .ckpt")
    if run is not None and settings != Settings(None, None):
        raise ValueError(f"`preset` and `config` are for a source without settings; {run} has its own")
    if source.suffix != ".ckpt" and out.suffix == ".ckpt":
        _export(source, out, weights, settings)
    elif source.suffix == ".ckpt" or run is not None:
        _import(source, out, weights or "ema", settings, skip)
    else:
        problem = f"neither {source} nor {out} is a .ckpt"
        raise ValueError(f"{problem}; `source` or `out` must be one, or `source` a training run")


def _import(source: Path, out: Path, which: WeightChoice, settings: Settings, skip: Sequence[str]) -> None:
    if out.suffix in (".ckpt", ".safetensors"):
        raise ValueError(f"out is {out}, which is named like a file; name a folder")
    check_replaceable(out, OWNED_NAMES)
    sets = _read(source, skip)
    experiment, model, raw = _choose(source, sets, which, settings)
    data = experiment.data
    if isinstance(data.channel_stats, str):  # in a recipe.yaml
        stats = read_channel_stats(Path(data.channel_stats), experiment.model.in_channels)
        data = replace(data, channel_stats=stats)
    save_model(model, out, data.without_places(), experiment.sampling, raw, sets.projector)
    write_model_card(out)
    parts = {"ema": "EMA weights", "raw": "raw weights", "both": "EMA weights, raw weights beside them"}[which]
    print(f"wrote {parts}{', REPA projector' if sets.projector else ''}: {out}")


def _export(source: Path, out: Path, weights: WeightChoice | None, settings: Settings) -> None:
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists; remove it or name another file")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies inside {source}; name another place")
    sets = _read(source)
    which = weights or ("both" if sets.raw else "ema")
    experiment, model, raw = _choose(source, sets, which, settings)
    write_lightning(out, model.state_dict(), raw, sets.projector)
    why = "" if sets.raw else "there are no raw weights: "
    note = "" if raw else f" ({why}denoiser.* are the same as ema_denoiser.*)"
    print(f"wrote {out} for the original code{note}")
    data = experiment.data
    if data.channel_stats is not None or data.scaling_factor not in (None, _ORIGINAL_SCALE):
        lost = f"scaling_factor {data.scaling_factor}" + ", channel_stats" * (data.channel_stats is not None)
        print(f"not in {out}, which has no place for it: how latents were normalised ({lost})")


def _read(source: Path, skip: Sequence[str] = ()) -> LightningWeights:
    """Read everything that the source holds, and print what that is and what is ignored."""
    if source.suffix == ".ckpt":
        sets = read_lightning(source, skip)
    elif _is_run(source):
        sets = read_checkpoint(source)
    else:
        sets = read_weight_sets(source)
    named = {"EMA weights": sets.ema, "raw weights": sets.raw, "REPA projector": sets.projector}
    for name, tensors in named.items():
        if tensors:
            count = sum(tensor.numel() for tensor in tensors.values())
            dtypes = ", ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors.values()}))
            print(f"{source}: {name}, {plural(len(tensors), 'tensor')}, {plural(count, 'parameter')}, {dtypes}")
    if sets.other:
        more = f" and {len(sets.other) - 8} more" if len(sets.other) > 8 else ""
        print(f"ignored: {', '.join(sets.other[:8])}{more}")
    return sets


def _choose(
    source: Path, sets: LightningWeights, which: WeightChoice, settings: Settings
) -> tuple[Experiment, DDT, dict[str, Tensor] | None]:
    """The settings, a model with the chosen weights (the average of both), and for both also the trained weights."""
    weights = sets.take("raw" if which == "raw" else "ema", source)
    raw = sets.take("raw", source) if which == "both" else None
    experiment = _settings(source, weights, settings)
    model = build_model(experiment.model, weights, source)
    if raw:
        build_model(experiment.model, raw, source)
    if sets.projector:
        check_projector(sets.projector, experiment.model.hidden_size, source)
    return experiment, model, raw


def _is_run(source: Path) -> bool:
    return (source / TRAINER).is_file()


def _settings(source: Path, weights: Mapping[str, Tensor], settings: Settings) -> Experiment:
    """The model's settings: from its folder, a file, the named preset, or the preset with its shapes, which is
    printed."""
    if _is_run(source):
        return read_settings(source / "model" / CONFIG_NAME)
    if has_config(source):
        if settings.config is not None:
            raise ValueError(f"config is for checkpoints without config.json; {source} has one")
        return experiment_of(source, settings.preset)
    if settings.config is not None:
        return _settings_in(settings.config)
    if settings.preset is not None:
        experiment = experiment_of(source, settings.preset)
        _, model = settle_config(weights, source, {settings.preset: experiment})
    else:
        name, model = settle_config(weights, source)
        experiment = PRESETS[name]
        same = [other for other, preset in PRESETS.items() if preset.model == experiment.model and other != name]
        print(
            f"settings: guessed from the shapes, preset {name} (image size {experiment.data.image_size}, "
            f"{model.num_encoder_blocks} of {model.num_blocks} blocks are the encoder, sampling)"
            + "".join(f"; if this is {other}, which has the same shapes, add --preset {other}" for other in same)
        )
    if model.num_classes != experiment.model.num_classes:
        print(f"settings: {plural(model.num_classes, 'class')}, from the shapes")
    return Experiment(model, experiment.data, sampling=experiment.sampling)


def _settings_in(file: Path) -> Experiment:
    """The settings in a file; a run's recipe.yaml holds them as they were given, its model/ what the data say too."""
    experiment, described = read_settings(file), file.parent / "model" / CONFIG_NAME
    if file.name == "recipe.yaml" and described.is_file():
        return replace(experiment, data=read_settings(described).data)
    return experiment
