"""The models that the demo offers: loaded once, each drawn from by one request at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt_fast.autoencoder import decode_latents
from ddt_fast.config import SamplingConfig
from ddt_fast.device import choose_dtype
from ddt_fast.generation.images import to_uint8
from ddt_fast.model.weights import has_config
from ddt_fast.pipeline import DDTPipeline
from ddt_fast.sampling_options import EMBEDDED_CHECKPOINT

EMBEDDED_NAME = "digits"

Images = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class DemoModel:
    """A pipeline to draw from.

    Attributes:
        name: in the page's list.
        pipe: on its device, in its dtype.
        lock: held by the request that draws; a pipeline has one set of buffers.
    """

    name: str
    pipe: DDTPipeline
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def sampling(self) -> SamplingConfig:
        """The model's own settings, with evenly spaced refreshes, which are what the page has a slider for."""
        return replace(self.pipe.scheduler.sampling_config, refresh_steps=None, num_refreshes=None, cuda_graphs=False)

    @property
    def num_classes(self) -> int:
        return self.pipe.class_names.num_classes

    def class_name(self, label: int) -> str:
        """The usual name of a class, or "class 7" where it has none."""
        return self.pipe.id2label.get(label, f"class {label}").split(",")[0]

    def class_choices(self) -> list[tuple[str, str]]:
        """(what the page shows, the label as text) of every class; what is shown has all names, so that each of them
        can be searched."""
        names = self.pipe.id2label
        shown = [f"{label} · {names[label]}" if label in names else f"{label}" for label in range(self.num_classes)]
        return [
            (str(label) if names.get(label) == str(label) else text, str(label)) for label, text in enumerate(shown)
        ]

    def pixels(self, samples: Tensor) -> Images:
        """What the model draws, (N, in_channels, h, w), as (N, H, W, 3) images."""
        vae = self.pipe.vae
        if vae is not None:
            samples = decode_latents(vae, samples)
        return to_uint8(samples)


def load_models(checkpoints: Sequence[str], preset: str | None, device: torch.device, dtype: str) -> list[DemoModel]:
    """The models of the checkpoints, after them the digits that come with the package.

    Args:
        checkpoints: folders, files or hub ids.
        preset: settings for files without a config.json.
        device: where to put them.
        dtype: as `choose_dtype`.

    Raises:
        ValueError: a checkpoint that cannot be loaded, or that is given twice.
        OSError: files that cannot be read.
    """
    for name in checkpoints:
        if checkpoints.count(name) > 1 or name == EMBEDDED_NAME:
            raise ValueError(f"--checkpoint names {name} twice; the {EMBEDDED_NAME} are always there")
    sources: dict[str, str | Path] = {name: name for name in checkpoints}
    sources[EMBEDDED_NAME] = EMBEDDED_CHECKPOINT
    return [DemoModel(name, _load(source, preset, device, dtype)) for name, source in sources.items()]


def _load(source: str | Path, preset: str | None, device: torch.device, dtype: str) -> DDTPipeline:
    if Path(source).is_file():
        pipe = DDTPipeline.from_single_file(source, preset=None if has_config(Path(source)) else preset)
    else:
        pipe = DDTPipeline.from_pretrained(source)
    if pipe.vae is None and pipe.data.autoencoder is not None:
        raise ValueError(f"{source} draws latents and has no autoencoder; wanted a pipeline's folder with vae/")
    # The autoencoder stays in float32, as in the sample command.
    # Module's own `to`: diffusers' warns at every cast.
    torch.nn.Module.to(pipe.transformer, choose_dtype(dtype, device, latents=pipe.vae is not None))
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
