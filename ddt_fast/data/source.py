"""What training can read. A new data source is a class with the members of `DataSource`, a case in `open_source`, and a
name in `DataConfig.dataset`."""

import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.class_names import class_order
from ddt_fast.config import DataConfig, Experiment
from ddt_fast.data.digits import DigitsDataset
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.ranks import process_ranks
from ddt_fast.wording import plural


class DataSource(Protocol):
    """N labelled samples, read by index.

    Attributes:
        labels: (N,) int64.
        has_flips: whether there are mirrored samples.
        feature_shape: (N', F) of a sample's DINOv2 features; None without them.
        fingerprint: identifies the data: a run continues only with the same data.
    """

    labels: Tensor
    has_flips: bool
    feature_shape: tuple[int, int] | None

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def described(self, data: DataConfig) -> DataConfig:
        """The settings, completed by what a model of these samples must know of them: their size, what was done to
        them, the classes' names."""

    def draw(self, indices: NDArray[np.int64], flips: NDArray[np.bool_], seeds: NDArray[np.uint64]) -> Tensor:
        """(n, C, h, w) float32: the model's input for these samples, mirrored where flips is true; whatever is random
        depends only on seeds (n,)."""

    def features(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> Tensor:
        """(n, N', F) features of these samples; called only if feature_shape is not None."""


def open_source(experiment: Experiment) -> DigitsDataset | LatentDataset:
    """Open the data of an experiment; ValueError if they are missing, unusable or do not fit the model."""
    data, model, training = experiment.data, experiment.model, experiment.training
    if data.dataset == "digits":
        return DigitsDataset()
    if data.folder is None:
        raise ValueError("data.folder is null; name the folder of cached latents (ddt_fast.cache_latents makes one)")
    dataset = LatentDataset(
        Path(data.folder),
        scaling_factor=data.scaling_factor,
        channel_stats=data.channel_stats,
        features=training.repa_weight > 0 and data.images is None,
    )
    if (channels := dataset.shape[0]) != model.in_channels:
        where = f"the channels of the latents in {data.folder} (`model.in_channels` {channels})"
        raise ValueError(f"in_channels is {model.in_channels}; allowed: {channels}, {where}")
    classes = f"{data.folder} holds {plural(dataset.num_classes, 'class')}"
    if dataset.num_classes > model.num_classes:
        raise ValueError(f"{classes}, num_classes is {model.num_classes}; allowed: {dataset.num_classes} or more")
    doubts = []
    if dataset.num_classes < model.num_classes:
        doubts.append(
            f"{classes}, num_classes is {model.num_classes}: the other classes are never trained, but are sampled "
            "unless you choose classes"
        )
    names = dataset.settings.class_names if dataset.settings else ()
    if names != (ordered := class_order(names)):
        label = next(label for label, name in enumerate(names) if name != ordered[label])
        doubts.append(
            f"the classes of {data.folder} are numbers in the order of text: label {label} is folder {names[label]!r}, "
            f"not {ordered[label]!r}; the model keeps these names, and a new cache has the order of the numbers"
        )
    for doubt in doubts if process_ranks().rank == 0 else ():
        warnings.warn(doubt, stacklevel=2)
    return dataset
