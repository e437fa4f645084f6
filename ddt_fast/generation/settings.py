"""The settings of `ddt_fast.generate`: what to draw, with which engine, what to write, how to score.

These are frozen dataclasses that refuse wrong values. The command's options are made from their fields, types and
docstrings; in these and in messages, `name` is a parameter, which the command shows as its option.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from ddt_fast.checks import require, require_int, require_name, whole_numbers
from ddt_fast.evaluation.names import METRICS, Features, Metric, check_features, check_metrics

ALL_PNG, SOME_PNG = 1000, 100
"""By default, jobs of up to ALL_PNG images also write all of them as PNGs, larger jobs SOME_PNG."""

SHARD_IMAGES = 256
"""Images in a shard, in whole batches: a minute of work or less, with even shares for eight processes."""


@dataclass(frozen=True)
class Draws:
    """What to draw: how many images, of which classes, from which seeds.

    Args:
        num_images: images to draw; default: 100 digits, 16 from other models, or one per seed.
        classes: classes to cycle through, labels or names; default: all.
        seeds_per_class: images per class, in place of `num_images`.
        class_seeds: draw every class with each of these seeds.
        seeds: one seed per image, in this order; default: `first_seed` and up.
        first_seed: seed of the first image; each next image has the next seed; default: 0.
        height: height of the images in pixels, a multiple of a patch; default: what the model was trained on.
        width: width of the images, likewise.
    """

    num_images: int | None = None
    classes: Sequence[str | int] | None = None
    seeds_per_class: int | None = None
    class_seeds: Sequence[int] | None = None
    seeds: Sequence[int] | None = None
    first_seed: int | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", _classes(self.classes))
        for name in ("class_seeds", "seeds"):
            numbers = whole_numbers(name, getattr(self, name))
            object.__setattr__(self, name, None if numbers is None else tuple(numbers))
        ways = ("seeds", "class_seeds", "seeds_per_class", "num_images")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1 and given != ["seeds", "num_images"]:
            raise ValueError(f"`{given[0]}` and `{given[1]}` are both given; give one")
        if (self.seeds or self.class_seeds) and self.first_seed is not None:
            raise ValueError(f"`{given[0]}` and `first_seed` are both given; give one")
        _require_at_least(self, num_images=1, seeds_per_class=1, height=1, width=1)
        first = self.first_seed
        require(first is None or type(first) is int, "first_seed", first, "a whole number")


@dataclass(frozen=True)
class Engine:
    """How to run the model: device, dtype, memory, implementation.

    Args:
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16; auto: bfloat16 for latents if the device has units for it.
        batch_size: images drawn at a time.
        memory_budget: memory for what is kept between steps, e.g. 8GiB; batches are made to fit.
        attention: attention implementation.
        compile: compile the model with torch.compile: slow to start, then faster.
        quantize: 8-bit weights and activations, on a CPU; the error is measured and printed.
        reference: run the plain PyTorch model instead of the fused one.
        autoencoder: AutoencoderKL that decodes latents, hub id or local folder; default: the model's own. Without any,
            latents are written as they are.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = 100
    memory_budget: str | None = None
    attention: str = "auto"
    compile: bool = False
    quantize: Literal["int8"] | None = None
    reference: bool = False
    autoencoder: str | None = None

    def __post_init__(self) -> None:
        _require_at_least(self, batch_size=1)
        require(self.quantize in (None, "int8"), "quantize", self.quantize, "int8")
        require_name("autoencoder", self.autoencoder, "a hub id or a folder")
        if self.memory_budget is not None:
            _parse_bytes(self.memory_budget)
        if self.reference and (self.quantize or self.compile or self.attention != "auto"):
            raise ValueError("`reference` is plain PyTorch; it excludes `quantize`, `compile` and `attention`")

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else _parse_bytes(self.memory_budget)


@dataclass(frozen=True)
class Outputs:
    """What to write beside samples.npz, and what to do with an earlier job.

    Args:
        num_png: images to write as PNGs too; default: all of up to 1000, else 100.
        shard_size: images per shard; default: about 256, in whole batches.
        keep_shards: keep the shards when samples.npz is written.
        overwrite: drop an earlier job in the output folder, and start again.
    """

    num_png: int | None = None
    shard_size: int | None = None
    keep_shards: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require_at_least(self, shard_size=1, num_png=0)

    def png_count(self, count: int) -> int:
        """How many of `count` images to write as PNGs."""
        return min(count, (ALL_PNG if count <= ALL_PNG else SOME_PNG) if self.num_png is None else self.num_png)


@dataclass(frozen=True)
class Scoring:
    """How to score the samples.

    Args:
        reference: an npz or a folder of images to score against.
        metrics: metrics to compute; default: all that can be computed.
        features: inception, or pixels for images of up to 64x64.
        inception_weights: file of the network's weights; default: from torch's cache, else downloaded.
        center_crop: side in pixels of the centre crop, for the images of a folder.
        skip_unreadable: leave out the reference's images that cannot be read, and list them; default: stop at the
            first, before any work is done.
    """

    reference: str | Path
    metrics: Sequence[Metric] | None = None
    features: Features = "inception"
    inception_weights: str | None = None
    center_crop: int | None = None
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        check_metrics(METRICS if self.metrics is None else self.metrics)
        check_features(self.features, self.inception_weights)
        if self.center_crop is not None:
            require_int("center_crop", self.center_crop, 1)


def _classes(given: object) -> tuple[str | int, ...] | None:
    """Labels and names; a number written as text is a label."""
    if given is None:
        return None
    allowed = "a list of labels or names, at least one"
    listed = isinstance(given, Iterable) and not isinstance(given, (str, bytes))
    require(listed, "classes", given, allowed)
    classes = [int(one) if isinstance(one, str) and one.isascii() and one.isdecimal() else one for one in given]  # type: ignore[attr-defined]
    valid = all(isinstance(one, (Integral, str)) and not isinstance(one, bool) for one in classes)
    require(bool(classes) and valid, "classes", given, allowed)
    return tuple(one if isinstance(one, str) else int(one) for one in classes)


def _require_at_least(settings: Any, **minimum: int) -> None:
    for name, low in minimum.items():
        if (value := getattr(settings, name)) is not None:
            require_int(name, value, low)


def _parse_bytes(text: object) -> int:
    """Bytes, from "8GiB", "500 MB" or a plain number."""
    pattern = r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?\s*"
    match = re.fullmatch(pattern, text, re.IGNORECASE) if isinstance(text, str) else None
    require(match is not None, "memory_budget", text, "a number and a unit, such as 8GiB or 500MB")
    number, prefix, binary = match.groups()  # type: ignore[union-attr]
    base = 1024 if binary else 1000
    return int(float(number) * base ** " kmgt".index(prefix.lower() or " "))
