"""Every setting of ddt-fast, in frozen dataclasses.

A wrong value raises ValueError at construction, with the name of the setting, the value and what is allowed: a
configuration that exists is valid.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, Self

from ddt_fast.checks import (
    require,
    require_choices_and_flags,
    require_int,
    require_kind,
    require_name,
    require_number,
    require_pair,
)

Solver = Literal["euler", "lms", "pec", "sde"]
Diffusion = Literal["constant", "sigma", "sigma_squared", "sine"]
StateForecast = Literal["hold", "linear", "quadratic"]
GuidanceForecast = Literal["hold", "linear"]
ChannelStats = tuple[tuple[float, ...], tuple[float, ...]]
"""Means and standard deviations of C channels."""

MAX_STEPS = 100_000
"""A plan lists every step, and a file that asks for a billion must not hang its reader."""


@dataclass(frozen=True)
class DDTConfig:
    """The shape of a DDT (arXiv 2504.05741).

    Args:
        in_channels: channels of the image or latent; 4 for stabilityai/sd-vae-ft-ema, 1 for the digits.
        patch_size: side p of a patch; a token holds in_channels * p * p numbers.
        hidden_size: width C of a token.
        num_heads: attention heads H; the head dimension C / H must be a multiple of 4 (2-D RoPE pairs in x and in y).
        num_blocks: transformer blocks; the first num_encoder_blocks form the condition encoder, the others (at least
            one) the velocity decoder.
        num_encoder_blocks: blocks of the condition encoder, at least one.
        num_classes: labels run from 0 to num_classes - 1; label num_classes is the null class of guidance.
    """

    in_channels: int
    patch_size: int
    hidden_size: int
    num_heads: int
    num_blocks: int
    num_encoder_blocks: int
    num_classes: int

    def __post_init__(self) -> None:
        for setting in fields(self):
            require_int(setting.name, getattr(self, setting.name), 1)
        width, heads, encoder, blocks = self.hidden_size, self.num_heads, self.num_encoder_blocks, self.num_blocks
        require(width % heads == 0, "num_heads", heads, f"a divisor of hidden_size ({width})")
        head_rule = "a head dimension that is a multiple of 4, for 2-D RoPE"
        require(self.head_dim % 4 == 0, "hidden_size / num_heads", self.head_dim, head_rule)
        encoder_rule = f"1 to {blocks - 1}, fewer than num_blocks ({blocks}), so that a decoder remains"
        require(encoder < blocks, "num_encoder_blocks", encoder, encoder_rule)

    @property
    def head_dim(self) -> int:
        """D = hidden_size / num_heads."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_size(self) -> int:
        """SwiGLU width F = int(2 * 4C / 3)."""
        return int(2 * 4 * self.hidden_size / 3)

    @property
    def num_decoder_blocks(self) -> int:
        """Blocks of the velocity decoder."""
        return self.num_blocks - self.num_encoder_blocks

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens N of a (height, width) image or latent; ValueError if patch_size does not divide it."""
        for name, size in (("height", height), ("width", width)):
            valid = isinstance(size, int) and size > 0 and size % self.patch_size == 0
            require(valid, name, size, f"a positive multiple of patch_size ({self.patch_size})")
        return (height // self.patch_size) * (width // self.patch_size)


@dataclass(frozen=True)
class Schedule:
    """Times and coefficients that `ddt_fast.tune_sampler` fitted to one model, in place of a solver's.

    Args:
        times: of the evaluations, ascending from 0; the last step ends at 1.
        velocities: for every step, coefficients of the last conditional velocities, newest first, 1 to 4.
        differences: for every step, those of the last guidance differences, 1 to 4, to be multiplied by w - 1; () for a
            step without guidance. A step with guidance evaluates a difference.
        guidance_interval: the interval whose bounds are among the times.
        model: `sampling.tuned.model_digests` of the model.
        size: height and width of the model's input.
    """

    times: tuple[float, ...]
    velocities: tuple[tuple[float, ...], ...]
    differences: tuple[tuple[float, ...], ...]
    guidance_interval: tuple[float, float]
    model: tuple[str, ...]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        read: dict[str, Any] = {name: _coefficients(name, (getattr(self, name),))[0] for name in ("times", "size")}
        read |= {name: _coefficients(name, getattr(self, name)) for name in ("velocities", "differences")}
        read["guidance_interval"] = _guidance_interval(self.guidance_interval)
        named = isinstance(self.model, (tuple, list)) and all(isinstance(digest, str) for digest in self.model)
        require(named, "model", self.model, "a list of digests")
        for name, value in (read | {"model": tuple(self.model)}).items():
            object.__setattr__(self, name, value)
        times, counts = self.times, list(accumulate(map(bool, self.differences)))
        if not times[:1] == (0,) or any(after <= t for t, after in pairwise((*times, 1))):
            raise ValueError("times do not ascend from 0 and stay below 1")
        if not len(self.velocities) == len(self.differences) == len(times):
            raise ValueError(f"velocities and differences are not for {len(times)} steps, the number of times")
        fits = all(1 <= len(row) <= min(i, 4) for i, row in enumerate(self.velocities, 1))
        if not fits or any(len(row) > min(i, 4) for i, row in zip(counts, self.differences, strict=True)):
            raise ValueError("a step has no coefficient, or more than 4, or more than there are values to combine")
        low, high = (struct.unpack("f", struct.pack("f", bound))[0] for bound in self.guidance_interval)
        guided = [bool(row) for row in self.differences]
        if guided != [low <= t < high for t in times] or not {low, high} <= {*times, 1}:
            raise ValueError("guidance_interval is not that of the steps that have differences")

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Self:
        """From what `dataclasses.asdict` or a JSON file has; ValueError if something is missing or unknown."""
        names = [setting.name for setting in fields(cls)]
        if set(entries) != {*names}:
            raise ValueError(
                f"the entries of a schedule are {', '.join(map(str, entries))}; expected {', '.join(names)}"
            )
        return cls(**entries)


def _coefficients(name: str, rows: object) -> tuple[tuple[Any, ...], ...]:
    """Rows of finite numbers, as tuples."""
    listed = isinstance(rows, (tuple, list)) and all(isinstance(row, (tuple, list)) for row in rows)
    if not listed or any(type(n) not in (int, float) or not abs(n) < 1e9 for row in rows for n in row):  # type: ignore[attr-defined]
        raise ValueError(f"{name} holds something else than lists of finite numbers")
    return tuple(map(tuple, rows))  # type: ignore[call-overload]


@dataclass(frozen=True)
class SamplingConfig:
    """How a sample is drawn. Times run from t = 0 (noise) to t = 1 (data).

    Args:
        num_steps: solver steps, up to 100,000.
        guidance_scale: w in v = v_uncond + w (v_cond - v_uncond); 1 needs no unconditional branch.
        guidance_interval: (low, high): guided where low < t < high, with "pec" from low itself; elsewhere the velocity
            is the conditional one.
        timeshift: times are t / (t + (1 - t) timeshift); above 1, more steps are near the noise.
        last_step: length of the final step before the shift; None is 1 / num_steps. "pec" ignores it.
        solver: "euler"; "lms", the linear multistep solver; "pec", a multistep solver that predicts, evaluates and
            corrects, with steps that end at the bounds of the guidance interval; "sde", Euler-Maruyama.
        order: velocities that "lms" combines, 1 to 4, and that "pec" predicts with, 1 to 3; other solvers ignore it.
        diffusion: w(t) of the "sde" solver: "constant" 1, "sigma" (1 - t), "sigma_squared" (1 - t)^2,
            "sine" sin(pi t)^2; other solvers ignore it.
        diffusion_scale: factor on w(t); 0 is the ODE.
        refresh_every: run the encoder at every K-th step, and reuse its state in between.
        refresh_steps: the steps at which the encoder runs, ascending from 0, in place of refresh_every. "dp" takes the
            num_refreshes best ones, found by the paper's statistical dynamic programme from a probe of the model.
        num_refreshes: the budget of refresh_steps "dp", 1 to num_steps; None otherwise.
        state_forecast: between refreshes, "hold" the last state, or extrapolate it in t through the last two
            ("linear") or three ("quadratic") states.
        guidance_every: evaluate the unconditional branch, with a fresh state, at every M-th guided step; in between,
            the guidance difference v_cond - v_uncond comes from guidance_forecast.
        guidance_forecast: "hold" the last difference, or extrapolate it in t through the last two ("linear"); "pec"
            extrapolates differences as it does velocities, and ignores it.
        cuda_graphs: replay the loop as CUDA graphs; default: on a GPU.
        schedule: times and coefficients fitted to one model, in place of those of solver "pec"; order, timeshift and
            last_step are not read.
    """

    num_steps: int = 250
    guidance_scale: float = 2.0
    guidance_interval: tuple[float, float] = (0.3, 1.0)
    timeshift: float = 1.0
    last_step: float | None = 0.04
    solver: Solver = "euler"
    order: int = 2
    diffusion: Diffusion = "sigma"
    diffusion_scale: float = 1.0
    refresh_every: int = 1
    refresh_steps: tuple[int, ...] | Literal["dp"] | None = None
    num_refreshes: int | None = None
    state_forecast: StateForecast = "hold"
    guidance_every: int = 1
    guidance_forecast: GuidanceForecast = "hold"
    cuda_graphs: bool | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "refresh_every", "guidance_every"):
            require_int(name, getattr(self, name), 1)
        require(self.num_steps <= MAX_STEPS, "num_steps", self.num_steps, f"a whole number, 1 to {MAX_STEPS}")
        require_choices_and_flags(self)
        for name in ("guidance_scale", "diffusion_scale"):
            require_number(name, getattr(self, name), 0)
        object.__setattr__(self, "guidance_interval", _guidance_interval(self.guidance_interval))
        require_number("timeshift", self.timeshift, 0, open_low=True)
        if self.last_step is not None:
            require_number("last_step", self.last_step, 0, 1, open_low=True)
            fits = self.num_steps == 1 or self.last_step < 1
            require(fits, "last_step", self.last_step, "below 1 when there is more than one step")
        most = 3 if self.solver == "pec" else 4
        possible = type(self.order) is int and 1 <= self.order <= most
        require(possible, "order", self.order, f"1 to {most} with solver {self.solver}")
        self._check_refreshes()
        if self.schedule is not None:
            self._check_schedule()

    def _check_schedule(self) -> None:
        schedule = Schedule.from_dict(self.schedule) if isinstance(self.schedule, dict) else self.schedule
        require_kind("schedule", schedule, Schedule)
        assert schedule is not None
        object.__setattr__(self, "schedule", schedule)
        has = {"solver": "pec", "num_steps": len(schedule.times), "refresh_every": 1, "guidance_every": 1}
        has |= {"refresh_steps": None, "guidance_interval": schedule.guidance_interval}
        for name, value in has.items():
            require(getattr(self, name) == value, name, getattr(self, name), f"{value} with this schedule")

    def _check_refreshes(self) -> None:
        steps, budget, count = self.refresh_steps, self.num_refreshes, self.num_steps
        if steps is not None:
            every = self.refresh_every
            require(every == 1, "refresh_every", every, "1 (its default) when refresh_steps is given")
        if steps == "dp":
            valid = type(budget) is int and 1 <= budget <= count
            require(valid, "num_refreshes", budget, f"1 to num_steps ({count}) with refresh_steps dp")
            return
        require(budget is None, "num_refreshes", budget, 'none, unless refresh_steps is "dp"')
        if steps is not None:
            valid = isinstance(steps, (tuple, list)) and all(type(step) is int for step in steps)
            valid = valid and list(steps) == sorted({0, *steps}) and steps[0] == 0 and steps[-1] < count
            require(valid, "refresh_steps", steps, f'"dp", or ascending step numbers, the first 0, below {count}')
            object.__setattr__(self, "refresh_steps", tuple(steps))

    @classmethod
    def saved(cls, entries: Mapping[str, Any]) -> Self:
        """The settings in a model's files; ValueError or TypeError for wrong ones. Earlier versions saved false for
        cuda_graphs, which was their default."""
        return cls(**{**entries, "cuda_graphs": entries.get("cuda_graphs") or None})

    def override(self, **given: Any) -> Self:
        """A copy with other settings, by name. None keeps a setting, and last_step 0 means 1 / num_steps; refresh_every
        and refresh_steps replace each other.

        Raises:
            ValueError: a value that is not allowed, or another num_steps for refresh_steps that stay.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("last_step") == 0:
            given["last_step"] = None
        if "refresh_steps" in given:
            given = {"refresh_every": 1, "num_refreshes": None, **given}
        elif "refresh_every" in given:
            given |= {"refresh_steps": None, "num_refreshes": None}
        elif self.refresh_steps not in (None, "dp") and given.get("num_steps", self.num_steps) != self.num_steps:
            steps = f"{self.num_steps} steps, not for {given['num_steps']}"
            raise ValueError(f"refresh_steps are for {steps}; give refresh_every or refresh_steps")
        return replace(self, **given)


def _guidance_interval(value: object) -> tuple[float, float]:
    allowed = "two numbers, 0 <= low < high <= 1"
    return require_pair("guidance_interval", value, lambda low, high: 0 <= low < high <= 1, allowed)


@dataclass(frozen=True)
class DataConfig:
    """The data to train on, and how samples become images.

    A model sees a latent z as (z - mean) / std * scaling_factor. Training writes these numbers, the size of a latent
    and the classes' names into the model's folder, as it finds them in the data; sampling undoes what they say.

    Args:
        dataset: "digits", scikit-learn's 8x8 grey digits, in pixel space; "latents", a folder of cached latents.
        image_size: side of the square image in pixels.
        autoencoder: diffusers AutoencoderKL (hub id or local folder) between pixels and latents; None for pixel space,
            or for latents that are sampled as they are.
        folder: the latents, a cache of `ddt_fast.cache_latents` or LightningDiT's shards.
        images: the image folder that the cache was made from, to compute REPA's features from; None takes the cached
            features.
        pixels_per_latent: side of the square of pixels that a latent's position stands for; training takes it from the
            data. None is 8 with an autoencoder, 1 without.
        scaling_factor: the factor on latents: of LightningDiT's shards, which do not record it, or, in a model's
            folder, of what it was trained on. None is the cache's, or the autoencoder's own.
        channel_stats: LightningDiT's latents_stats.pt, to normalise its latents; in a model's folder the numbers of
            that file, means and standard deviations.
        class_names: label i is class_names[i]; training takes them from the cache. None if they are not known.
        verify: compare the checksums of the cache's shards once before training (`ddt_fast.data.verification`).
    """

    dataset: Literal["digits", "latents"] = "digits"
    image_size: int = 8
    autoencoder: str | None = None
    folder: str | None = None
    images: str | None = None
    pixels_per_latent: int | None = None
    scaling_factor: float | None = None
    channel_stats: str | ChannelStats | None = None
    class_names: tuple[str, ...] | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        require_choices_and_flags(self)
        require_int("image_size", self.image_size, 1)
        require_name("autoencoder", self.autoencoder, "a hub id or a folder, or null for pixels")
        for name in ("folder", "images"):
            require_name(name, getattr(self, name), "a path, or null")
        if self.pixels_per_latent is not None:
            require_int("pixels_per_latent", self.pixels_per_latent, 1)
        if self.scaling_factor is not None:
            require_number("scaling_factor", self.scaling_factor, 0, open_low=True)
        if self.channel_stats is not None and not (isinstance(self.channel_stats, str) and self.channel_stats):
            object.__setattr__(self, "channel_stats", _channel_stats(self.channel_stats))
        if self.class_names is not None:
            names = self.class_names
            valid = isinstance(names, (tuple, list)) and all(isinstance(name, str) and name for name in names)
            require(valid, "class_names", names, "a list of names, or null")
            object.__setattr__(self, "class_names", tuple(names))
        if self.dataset == "digits":
            require(self.image_size == 8, "image_size", self.image_size, "8 for the digits")
            latents = ("pixels_per_latent", "scaling_factor", "channel_stats", "class_names")
            for name in ("autoencoder", "folder", "images", *latents):
                value = getattr(self, name)
                require(value is None, name, value, "null for the digits, which are pixels and come with the package")
        rule = f"a multiple of pixels_per_latent ({self._factor})"
        require(self.image_size % self._factor == 0, "image_size", self.image_size, rule)

    def without_places(self) -> Self:
        """The settings to save with a model: the paths of its training data mean nothing to others."""
        stats = None if isinstance(self.channel_stats, str) else self.channel_stats
        return replace(self, folder=None, images=None, channel_stats=stats, verify=True)

    def in_latents(self, in_channels: int) -> bool:
        """Whether samples of so many channels are latents: those of an autoencoder, or neither grey nor RGB pixels."""
        return self.autoencoder is not None or (
            self.dataset == "latents" and (self._factor > 1 or in_channels not in (1, 3))
        )

    @property
    def _factor(self) -> int:
        return self.pixels_per_latent or (1 if self.autoencoder is None else 8)

    def input_size(self, height: int | None, width: int | None, patch_size: int) -> tuple[int, int]:
        """Height and width of the model's input for images of this size in pixels, None for image_size; ValueError if
        they do not divide into patches."""
        multiple = self._factor * patch_size
        for name, size in (("height", height), ("width", width)):
            rule = f"a positive multiple of {multiple} pixels"
            require(size is None or (type(size) is int and size > 0 and size % multiple == 0), name, size, rule)
        return (height or self.image_size) // self._factor, (width or self.image_size) // self._factor

    @property
    def sample_size(self) -> int:
        """Side of the model's input: a latent is pixels_per_latent times smaller than its image."""
        return self.image_size // self._factor


def _channel_stats(given: object) -> ChannelStats:
    """Means and standard deviations, as JSON's lists or tuples, as tuples; ValueError for others."""
    rule = "a path, null, or means and standard deviations above 0 of the channels"
    pair = isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(part, Iterable) for part in given)
    require(pair, "channel_stats", given, rule)
    mean, std = (tuple(part) for part in given)  # type: ignore[attr-defined]
    numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in mean + std)
    require(numbers and len(mean) == len(std) > 0 and min(std) > 0, "channel_stats", given, rule)
    return mean, std


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained (DDT paper, section 4 and appendix; the defaults are the paper's, except for REPA).

    Args:
        max_steps: optimiser steps.
        batch_size: samples per step, over all processes.
        accumulation_steps: parts in which each process computes its share of a batch, one after the other.
        learning_rate: AdamW's learning rate, constant after the warm-up.
        warmup_steps: steps over which the learning rate rises from 0.
        adam_betas: AdamW's betas.
        weight_decay: AdamW's weight decay.
        max_grad_norm: larger gradients are scaled down to this norm; None clips nothing.
        ema_decay: decay per step of the averaged weights, which are saved, sampled from and scored; the first steps
            decay faster, (1 + step) / (10 + step), so that a short run forgets its initial weights.
        label_dropout: chance that a label is replaced with the null class.
        repa_weight: weight of REPA's loss (arXiv 2410.06940), 0.5 in the paper; 0 turns REPA off.
        repa_block: the encoder block whose output is aligned, counted from 1.
        repa_encoder: DINOv2 (hub id or local folder) that computes features from data.images.
        engine: "fused", the model on ddt_kernels; "reference", plain PyTorch.
        dtype: dtype of the forward and backward pass; weights, optimiser and EMA stay float32.
        gradient_checkpointing: keep only the blocks' inputs, and compute the rest again in the backward pass.
        compile: compile the model with torch.compile.
        parallel: over several processes, "ddp" keeps all weights on each; "fsdp" shards weights, optimiser and EMA.
        seed: seed of initialisation, data order, noise and dropout.
        init: a checkpoint to start from: a model folder, .safetensors or a released .ckpt; None starts from scratch.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of the latest checkpoints to keep; 0 keeps all.
        log_every: steps between lines of log.jsonl.
        sample_every: steps between grids of samples from the averaged weights, with one more at the end; 0 draws none.
        sample_images: images per grid.
        score_samples: samples to draw at the end, once without guidance and once with it, to score a digits model: 0,
            or 65 or more.
        tensorboard: also log for TensorBoard.
        wandb: Weights & Biases project to log to; None logs nothing there.
    """

    max_steps: int = 400_000
    batch_size: int = 256
    accumulation_steps: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    ema_decay: float = 0.9999
    label_dropout: float = 0.1
    repa_weight: float = 0.0
    repa_block: int = 8
    repa_encoder: str = "facebook/dinov2-base"
    engine: Literal["fused", "reference"] = "fused"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0
    init: str | None = None
    checkpoint_every: int = 10_000
    keep_checkpoints: int = 3
    log_every: int = 100
    sample_every: int = 10_000
    sample_images: int = 16
    score_samples: int = 0
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        require_choices_and_flags(self)
        positive = ("max_steps", "batch_size", "accumulation_steps", "repa_block", "checkpoint_every", "log_every")
        for name in (*positive, "sample_images"):
            require_int(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed", "keep_checkpoints", "sample_every", "score_samples"):
            require_int(name, getattr(self, name), 0)
        for name in ("repa_weight", "weight_decay"):
            require_number(name, getattr(self, name), 0)
        for name in ("ema_decay", "label_dropout"):
            require_number(name, getattr(self, name), 0, 1)
        require_number("learning_rate", self.learning_rate, 0, open_low=True)
        if self.max_grad_norm is not None:
            require_number("max_grad_norm", self.max_grad_norm, 0, open_low=True)
        require_name("init", self.init, "a checkpoint, or null")
        require_name("wandb", self.wandb, "the name of a project, or null")
        require(self.repa_encoder != "", "repa_encoder", self.repa_encoder, "a hub id or a folder")
        enough = self.score_samples == 0 or self.score_samples >= 65
        rule = "0, or 65 or more: the covariance of 64 pixels needs them"
        require(enough, "score_samples", self.score_samples, rule)
        valid, rule = (lambda first, second: 0 <= first < 1 and 0 <= second < 1), "two numbers from 0, below 1"
        object.__setattr__(self, "adam_betas", require_pair("adam_betas", self.adam_betas, valid, rule))
        parts, rule = self.accumulation_steps, f"a divisor of batch_size ({self.batch_size})"
        require(self.batch_size % parts == 0, "accumulation_steps", parts, rule)


@dataclass(frozen=True)
class Experiment:
    """All settings of a training run and of sampling from its model."""

    model: DDTConfig
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        model, digits, repa_weight = self.model, self.data.dataset == "digits", self.training.repa_weight
        model.num_tokens(self.data.sample_size, self.data.sample_size)
        if digits:
            require(model.in_channels == 1, "in_channels", model.in_channels, "1 for the digits")
            require(model.num_classes == 10, "num_classes", model.num_classes, "10 for the digits")
            require(repa_weight == 0, "repa_weight", repa_weight, "0 for the digits")
        if isinstance(stats := self.data.channel_stats, tuple):
            count = len(stats[0])
            rule = f"{count}, the channels of channel_stats"
            require(count == model.in_channels, "in_channels", model.in_channels, rule)
        count = len(self.data.class_names or ())
        rule = f"{count} or more, as many as class_names"
        require(count <= model.num_classes, "num_classes", model.num_classes, rule)
        if repa_weight:
            encoder, block = model.num_encoder_blocks, self.training.repa_block
            require(block <= encoder, "repa_block", block, f"1 to num_encoder_blocks ({encoder})")
        scored = self.training.score_samples
        require(scored == 0 or digits, "score_samples", scored, "0: only digits can be scored")
