"""Released checkpoints: Lightning .ckpt files, read without running anything in them, written for the original code.

Their state_dict holds `denoiser.*` (the trained weights) and `ema_denoiser.*` (their average), under the model's own
names, and `diffusion_trainer.proj.0.*` (REPA's projector). Source: the DDT authors' LightningModel. It has no buffers,
loads without strictness and samples with the average; Lightning 2.5 needs the other entries that are written here.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ddt_fast.files import atomic_file
from ddt_fast.weight_files import read_pickle, refusal, require_file

WeightSet = Literal["ema", "raw"]

_PREFIXES = {"ema": "ema_denoiser.", "raw": "denoiser.", "projector": "diffusion_trainer.proj.0."}
# Parts of names that torch.compile, DDP, FSDP and activation checkpointing insert.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PROJECTOR_NAMES = [f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]

# The usual content of hyperparameters and callbacks, which is passed over.
_PASSED_OVER = re.compile(
    r"(argparse|collections|copyreg|datetime|decimal|enum|fractions|pathlib|typing|uuid)\..*"
    r"|(jsonargparse|lightning|lightning_fabric|numpy|omegaconf|pytorch_lightning)\..*"
    r"|functools\.partial|builtins\.(bool|bytes|dict|float|frozenset|int|list|object|range|slice|str|tuple|type)"
)
_DICTS = re.compile(r"collections\.defaultdict|.*\.AttributeDict")


@dataclass(frozen=True)
class LightningWeights:
    """The weights in a checkpoint of a DDT.

    Args:
        ema: the averaged weights by the model's own names, to sample from and to continue averaging from.
        raw: the trained weights, to continue training from.
        projector: REPA's projector, by the names "0.weight", "0.bias", ... "4.bias" of an nn.Sequential with SiLUs.
        other: names of everything else in the file.

    Each may be empty, but not both ema and raw. Copy tensors before changing them in place: they may share memory with
    each other (equal weights are stored once) or with the file.
    """

    ema: dict[str, Tensor]
    raw: dict[str, Tensor]
    projector: dict[str, Tensor]
    other: list[str]

    def take(self, which: WeightSet, file: Path) -> dict[str, Tensor]:
        """The averaged or the raw weights; ValueError if `file`, which they come from, has none."""
        found: dict[str, Tensor] = getattr(self, which)
        if not found:
            other = "raw" if which == "ema" else "ema"
            raise ValueError(f"checkpoint {file} holds no {which} weights; take its {other} weights")
        return found


def read_lightning(path: str | Path, skip: Iterable[str] = ()) -> LightningWeights:
    """Read a Lightning .ckpt. No code in it runs: only tensors are rebuilt, memory-mapped, in their own dtype;
    everything else is passed over.

    skip: packages or "package.name" of further objects to pass over, if the file is refused because of them.

    Raises:
        ValueError: the file is missing or corrupt, holds objects that no checkpoint needs (none is created), or is not
            a DDT.
        OSError: the file cannot be read.
    """
    file = Path(path)
    content = _unpickle(file, list(skip))
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {file} is not a Lightning checkpoint: it holds no state_dict")
    sets: dict[str, dict[str, Tensor]] = {kind: {} for kind in _PREFIXES}
    other = [str(key) for key in content if key != "state_dict"]
    for name, tensor in state.items():
        plain = ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)
        kind = next((kind for kind, prefix in _PREFIXES.items() if plain.startswith(prefix)), None)
        if kind is None or not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            other.append(str(name))
            continue
        own = plain.removeprefix(_PREFIXES[kind])
        if own in sets[kind]:
            raise ValueError(f"checkpoint {file} holds {plain} twice, once as {name}")
        sets[kind][own] = tensor.detach()
    if not sets["ema"] and not sets["raw"]:
        raise ValueError(f"checkpoint {file} holds no ema_denoiser.* and no denoiser.* tensors; it is not a DDT")
    return LightningWeights(**sets, other=other)


def write_lightning(
    path: Path, ema: dict[str, Tensor], raw: dict[str, Tensor] | None = None, projector: dict[str, Tensor] | None = None
) -> None:
    """Write a .ckpt that the original code loads for sampling and training, whole or not at all; an older one is
    replaced. OSError if the file cannot be written.

    Weights have the model's own names, in any dtype. Training resumes at step 0 with a new optimiser, from the averaged
    weights if the trained ones (`raw`) are not given, and with a new REPA projector if that is not.
    """
    ema = own_storages(ema)
    sets = {"raw": own_storages(raw) if raw else ema, "ema": ema, "projector": own_storages(projector or {})}
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.5.0.post0",
        "state_dict": {_PREFIXES[kind] + name: tensor for kind, part in sets.items() for name, tensor in part.items()},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch's error is about the archive; its context says why it could not be written.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} could not be written: {reason}") from error


def own_storages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as files hold them: contiguous, on the CPU, each with a storage of its own and of its size."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        result[name] = tensor
    return result


def check_projector(projector: dict[str, Tensor], hidden_size: int, file: Path) -> tuple[int, ...]:
    """The widths (hidden_size, ..., features) of a REPA projector; ValueError unless it is a chain of three linear
    layers from the model's width."""
    if projector.keys() != set(_PROJECTOR_NAMES):
        wrong = sorted(projector.keys() ^ set(_PROJECTOR_NAMES))
        what = "lacks" if wrong[0] in _PROJECTOR_NAMES else "also has"
        raise ValueError(f"the REPA projector in {file} {what} {wrong[0]}; expected {', '.join(_PROJECTOR_NAMES)}")
    widths = [hidden_size]
    for name, bias in zip(_PROJECTOR_NAMES[::2], _PROJECTOR_NAMES[1::2], strict=True):
        shape = tuple(projector[name].shape)
        if len(shape) != 2 or shape[1] != widths[-1] or tuple(projector[bias].shape) != shape[:1]:
            seen = f"{name} is {shape}, {bias} {tuple(projector[bias].shape)}"
            raise ValueError(f"the REPA projector in {file} does not fit: {seen}; expected an input of {widths[-1]}")
        widths.append(shape[0])
    return tuple(widths)


class _PassedOver:
    """Stands in for an object that is not needed; it accepts anything and does nothing."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


class _PassedOverDict:
    """Stands in for a class of dictionaries: torch's unpickler fills only plain ones."""

    def __new__(cls, *_: Any) -> Any:
        return {}


def _unpickle(file: Path, skip: list[str]) -> Any:
    expected = "a Lightning .ckpt"
    require_file("checkpoint", file, expected)
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(str(file)))
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the unpickler raise anything
        raise refusal("checkpoint", file, error, expected) from error
    refused = [name for name in names if not _may_pass_over(name, skip)]
    if refused:
        raise ValueError(_refusal(file, refused))
    # Nothing with these names is imported or called: torch makes the stand-ins instead.
    stand_ins: list[Any] = [(_PassedOverDict if _DICTS.fullmatch(name) else _PassedOver, name) for name in names]
    return read_pickle("checkpoint", file, expected, allowed=safe_globals(stand_ins))


def _may_pass_over(name: str, skip: list[str]) -> bool:
    asked = any(name == part or name.startswith(f"{part}.") for part in skip)
    return bool(_PASSED_OVER.fullmatch(name)) or (asked and not _is_python(name))


def _is_python(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _refusal(file: Path, names: list[str]) -> str:
    dangerous = [name for name in names if _is_python(name)]
    named = dangerous or names
    listed = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    seen = f"checkpoint {file} holds more than tensors, and was not executed: it would call or make {listed}"
    if dangerous:
        return f"{seen}; no checkpoint of a model needs that: do not trust this file"
    packages = " ".join(sorted({name.partition(".")[0] for name in names}))
    return (
        f"{seen}; to read only the weights and pass over those objects, without running them: "
        f"python -m ddt_fast.convert {file} OUT --skip {packages}"
    )
