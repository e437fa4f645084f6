"""Classes by name: find the label of a name, or the nearest names if it is unknown or ambiguous."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddt_fast.config import Experiment
from ddt_fast.wording import kind_of, utf8

IMAGENET_CLASSES = 1000
_IMAGENET_FILE = Path(__file__).parent / "assets" / "imagenet" / "classes.txt"
_FIRST_OBJECT = 398
"""ImageNet's classes are in the order of their WordNet ids: animals first, then everything else."""

ClassLabel = int | str


class ClassNames:
    """The names of a model's classes. ValueError if a label is out of range, or names are not a string.

    Args:
        num_classes: labels run from 0 to num_classes - 1.
        id2label: label → its names, separated by commas, the usual one first; some labels may be missing. Labels may
            be strings, as in JSON.

    Attributes:
        id2label: label → its names.
    """

    def __init__(self, num_classes: int, id2label: Mapping[int, str] | Mapping[str, str]) -> None:
        if not isinstance(id2label, Mapping):
            raise ValueError(f"id2label is {kind_of(id2label)}; expected a dict, label: names")
        for label, names in id2label.items():
            if not (str(label).isdecimal() and int(label) < num_classes):
                raise ValueError(f"id2label names class {label}; allowed: 0 to {num_classes - 1}")
            if not isinstance(names, str):
                raise ValueError(f"id2label names class {label} {names!r}; expected a string")
        self.num_classes = num_classes
        self.id2label = {int(label): id2label[label] for label in sorted(id2label, key=int)}  # type: ignore[index]
        self._labels: dict[str, list[int]] = {}
        for label, names in self.id2label.items():
            for name in _split(names):
                known = self._labels.setdefault(_folded(name), [])
                if label not in known:
                    known.append(label)

    def label(self, given: ClassLabel) -> int:
        """The label of a class given by name or label. Case and underscores do not matter, unless two classes differ
        only by case. ValueError if the class is out of range, unknown or ambiguous; the message names the nearest
        ones."""
        if isinstance(given, Integral) and not isinstance(given, bool):
            if not 0 <= given < self.num_classes:
                raise ValueError(f"class {given} does not exist; allowed: 0 to {self.num_classes - 1}")
            return int(given)
        if not isinstance(given, str):
            raise ValueError(f"class {given!r} is {kind_of(given)}; expected a label or a name")
        if not self.id2label:
            allowed = f"allowed: 0 to {self.num_classes - 1}"
            raise ValueError(f"class {given!r}: this model's classes have no names; {allowed}")
        # A folder's name may have commas of its own.
        whole = [label for label, names in self.id2label.items() if names == given]
        found = whole or self._labels.get(_folded(given), [])
        if len(found) > 1:
            exact = [label for label in found if given in _split(self.id2label[label])]
            found = exact if len(exact) == 1 else found
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"class {given!r} is ambiguous: {self._described(found, True)}; give the number")
        nearest = self.search(given, 5)
        hint = f"nearest: {self._described(nearest)}" if nearest else f"allowed: 0 to {self.num_classes - 1}, or a name"
        raise ValueError(f"class {given!r} is unknown; {hint}")

    def labels(self, given: ClassLabel | Iterable[ClassLabel] | Tensor) -> list[int]:
        """As `label`, for one or more classes."""
        if isinstance(given, Tensor):
            if given.dtype == torch.bool or given.is_floating_point() or given.ndim > 1 or given.is_meta:
                seen = f"{tuple(given.shape)} {given.dtype} on {given.device}"
                raise ValueError(f"classes are {seen}; expected (N,) whole numbers")
            given = given.reshape(-1).tolist()
        # An array may have no dimensions; the items of bytes are numbers, which nobody means as labels.
        several: list[Any] = [given]
        if isinstance(given, np.ndarray):
            several = list(given.reshape(-1))
        elif isinstance(given, Iterable) and not isinstance(given, (str, bytes, bytearray)):
            several = list(given)
        if not several:
            raise ValueError("no class is given; expected one or more")
        return [self.label(one) for one in several]

    def short(self, label: int) -> str:
        """The usual name of a class, or its label if it has no name, as text that any file can hold."""
        return utf8(_split(self.id2label.get(label, ""))[0] or str(label))

    def search(self, text: str, limit: int = 20) -> list[int]:
        """Find up to `limit` labels whose names contain the text or resemble it, best first."""
        folded = _folded(text)
        if not folded:
            return []
        contained = [name for name in self._labels if folded in name]
        # Names that begin with the text, or have it as a word, come before those that merely contain it.
        contained.sort(key=lambda name: (name != folded, not name.startswith(folded), f" {folded}" not in name))
        similar = difflib.get_close_matches(folded, self._labels, n=limit)
        labels = dict.fromkeys(label for name in contained + similar for label in self._labels[name])
        return list(labels)[:limit]

    def _described(self, labels: list[int], kinds: bool = False) -> str:
        """Labels with their names; with `kinds`, also whether each of ImageNet's is an animal or an object."""
        kinds = kinds and self.id2label == imagenet_id2label()
        suffix = {label: f" ({'animal' if label < _FIRST_OBJECT else 'object'})" if kinds else "" for label in labels}
        return ", ".join(f"{label} {self.id2label[label]!r}{suffix[label]}" for label in labels)


@cache
def imagenet_id2label() -> dict[int, str]:
    """Label → names of ImageNet's 1000 classes (ILSVRC 2012), the lemmas of their WordNet synsets."""
    return dict(enumerate(_synsets().values()))


@cache
def _synsets() -> dict[str, str]:
    """WordNet id → lemmas, in the order of ImageNet's labels."""
    return dict(line.split(maxsplit=1) for line in _IMAGENET_FILE.read_text().splitlines())


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class folders in the order of their labels: by name, or by number if all names are whole numbers."""
    ordered = sorted(names)
    numbers = all(name.isascii() and name.isdecimal() for name in ordered)
    return tuple(sorted(ordered, key=int) if numbers else ordered)


def default_id2label(dataset: str, num_classes: int, class_names: Sequence[str] | None = None) -> dict[int, str]:
    """The names that follow from the data: "0" to "9" for digits; the class folders', which ImageNet's names replace if
    they are its WordNet ids; if no names are known, ImageNet's for 1000 classes of latents, else none."""
    if dataset == "digits":
        return {label: str(label) for label in range(num_classes)}
    if class_names is None:
        return dict(imagenet_id2label()) if num_classes == IMAGENET_CLASSES else {}
    synsets = _synsets()
    if all(name in synsets for name in class_names):
        class_names = [synsets[name] for name in class_names]
    return dict(enumerate(class_names))


def class_names_of(experiment: Experiment) -> ClassNames:
    """The names of a model's classes, as far as its data say them."""
    count = experiment.model.num_classes
    return ClassNames(count, default_id2label(experiment.data.dataset, count, experiment.data.class_names))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _folded(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())
