"""Runs sampling plans, eagerly or as CUDA graphs: the same steps on the same buffers, with the same results.

A `Sampler` is a plan for a model, a batch size and an image size. Steps share buffers that are made once. What differs
between two steps of a kind is read from tables, by a step counter on the device (`tables`): one graph for each kind,
captured once, replays the whole run, and the host only says which kind comes next.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ddt_fast.checks import require, require_int, require_kind
from ddt_fast.config import SamplingConfig
from ddt_fast.model import DDT, FusedDDT
from ddt_fast.model.base import patchify
from ddt_fast.sampling.buffers import Buffers, check_memory
from ddt_fast.sampling.graphs import CapturedSteps
from ddt_fast.sampling.noise import normal
from ddt_fast.sampling.plan import SamplingPlan
from ddt_fast.sampling.refresh.schedules import resolve_refresh_steps
from ddt_fast.sampling.tables import StepKind, step_kinds, step_tables
from ddt_fast.sampling.tuned import check_schedule
from ddt_fast.wording import kind_of, one_line
from ddt_kernels import guided_step_

Progress = Callable[[int, Tensor], object]


class StopSampling(Exception):
    """Raised by `progress` to end a run after the current step; the samples are the current x."""


def sample(
    model: DDT | FusedDDT,
    noise: Tensor,
    labels: Tensor,
    config: SamplingConfig,
    *,
    generators: Sequence[torch.Generator] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw samples: integrate the model's velocity from noise (t = 0) to data (t = 1).

    For many batches of one shape, use one `Sampler`, which captures its CUDA graphs once.

    Args:
        model: the model, on the device and in the dtype to compute with.
        noise: (B, in_channels, height, width), standard normal.
        labels: (B,) int64, 0 to num_classes - 1.
        config: the sampling settings. refresh_steps "dp" costs a probe of the model at every call;
            `refresh.schedules.resolve_refresh_steps` keeps its result.
        generators: one per sample, all on the CPU or all on the model's device, for the "sde" solver; other solvers
            ignore them.
        progress: called after every step with the number of steps done and the current x (B, ..) float32. The next step
            reads and overwrites x: copy what you keep; what you write to x is used. It may raise `StopSampling`.

    Returns:
        Samples shaped like noise, float32, on the model's device: latents for a latent model, else [-1, 1] pixels.

    Raises:
        ValueError: noise or labels have the wrong shape, a label is out of range, there is not one generator per
            sample, or memory cannot hold what is kept between steps.
    """
    _check_noise(model, noise)
    sampler = Sampler(model, config, *noise.shape[:1], *noise.shape[2:])
    return sampler(noise, labels, generators=generators, progress=progress)


class Sampler:
    """Draws batches of one size and shape.

    Args:
        model: the model, on the device and in the dtype to compute with; its weights are read at every call.
        config: the sampling settings. CUDA graphs are the default for a model on CUDA; where they are asked for and
            cannot be had, or cannot be captured, this warns and runs eagerly.
        batch_size: the most samples per call.
        height, width: size of the model's input.
        memory_budget: bytes for what is kept between steps, decoder modulations and precomputed encoder modulations;
            None allows the device's memory.
        compile_model: compile the model in place (`FusedDDT.compile_parts`): the first calls are slow, later ones
            faster.

    Attributes:
        plan: the steps to run.
        engine: how they run, in a few words.
        capture_seconds: time to capture the graphs; 0 without graphs.

    Raises:
        ValueError: the size or the schedule does not fit the model, or the plan keeps more than memory holds.
    """

    def __init__(
        self,
        model: DDT | FusedDDT,
        config: SamplingConfig,
        batch_size: int,
        height: int,
        width: int,
        *,
        memory_budget: int | None = None,
        compile_model: bool = False,
    ) -> None:
        require_int("batch_size", batch_size, 1)
        whole = memory_budget is None or type(memory_budget) is int
        require(whole, "memory_budget", memory_budget, "a whole number of bytes, or None")
        require_kind("config", config, SamplingConfig)
        model.config.num_tokens(height, width)
        parameter = next(model.parameters())
        self.model, self.device, self.dtype = model, parameter.device, parameter.dtype
        if compile_model and not isinstance(model, FusedDDT):
            raise ValueError("compile_model needs a FusedDDT; pass FusedDDT.from_reference(model)")
        check_schedule(model, config, height, width)
        self.plan = SamplingPlan.from_config(resolve_refresh_steps(model, config, height, width))
        self.batch_size, self.image_size = batch_size, (height, width)
        check_memory(self.plan, model, batch_size, height, width, memory_budget)
        self.memory_budget = memory_budget
        self.kinds, self.tables = step_kinds(self.plan), step_tables(self.plan, self.device)
        self.buffers = self._make_buffers(batch_size)
        if on_gpu(self.device):
            self._warm_up()
        if compile_model and isinstance(model, FusedDDT):
            model.compile_parts()  # after the refresh steps, whose probe may have another batch size
        if config.cuda_graphs and not on_gpu(self.device):
            place = f"the model is on {self.device.type}, not on CUDA"
            warnings.warn(f"cuda_graphs is set, but {place}; sampling eagerly", stacklevel=3)
        captured = self._capture() if on_gpu(self.device) and config.cuda_graphs is not False else None
        # A compiled model and a captured graph have one shape: smaller batches are filled up.
        self.fixed_shape = captured is not None or compile_model
        self._execute: Callable[[StepKind], object] = captured or self._advance
        self.capture_seconds = captured.seconds if captured else 0.0
        self.engine = ("CUDA graphs" if captured else "eager") + (", torch.compile" if compile_model else "")

    @torch.no_grad()
    def __call__(
        self,
        noise: Tensor,
        labels: Tensor,
        *,
        generators: Sequence[torch.Generator] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """As `sample`, for up to batch_size samples of this sampler's size; ValueError for others."""
        self._check_inputs(noise, labels, generators)
        count = noise.shape[0]
        with torch.autocast(self.device.type, enabled=False):  # the model's dtype decides
            if not self.fixed_shape and count != self.buffers.batch_size:
                del self.buffers  # before the new ones take memory
                self.buffers = self._make_buffers(count)
            if missing := self.buffers.batch_size - count:
                # Repeat the first sample: zeros would not be ordinary input.
                noise = torch.cat([noise, noise[:1].expand(missing, -1, -1, -1)])
                labels = torch.cat([labels, labels[:1].expand(missing)])
            self.buffers.start(noise, labels)
            with suppress(StopSampling):
                for i, kind in enumerate(self.kinds):
                    self.buffers.prepare_conditions(i)
                    if self.buffers.noise is not None and generators is not None:
                        self._draw_noise(self.buffers.noise[:count], generators)
                    self._execute(kind)
                    if progress is not None:
                        progress(i + 1, self.buffers.x[:count])
        return self.buffers.x[:count].clone()

    @staticmethod
    def _draw_noise(noise: Tensor, generators: Sequence[torch.Generator]) -> None:
        drawn = normal(noise.shape[1:], generators)
        if noise.is_cuda and not drawn.is_cuda:
            # From page-locked memory, the device's queue makes the copy, and the host does not wait.
            drawn = drawn.pin_memory()
        noise.copy_(drawn, non_blocking=True)

    def _make_buffers(self, batch_size: int) -> Buffers:
        # A tensor made in inference mode could not be written outside it, by a later call.
        with torch.inference_mode(False):
            return Buffers(self.model, self.plan, self.tables, batch_size, *self.image_size, self.memory_budget)

    def _advance(self, kind: StepKind) -> None:
        """Run one step; nothing here waits for the device or depends on anything but the step's kind."""
        b, B = self.buffers, self.buffers.batch_size
        tokens = patchify(b.x.to(self.dtype), self.model.config)
        branches = {1: tokens}
        if 2 in (kind.encode, kind.decode):
            branches[2] = tokens.repeat(2, 1, 1)
        if kind.encode:
            state = self._state(branches[kind.encode], slice(kind.encode * B))
            self.model.decoder_modulations(state, out=b.modulations[kind.slot, : kind.encode * B])
        if kind.forecast:
            kept, forecast = b.modulations[:, : kind.decode * B], (self.tables.slot_weights, b.step)
            velocity = self.model.decode_tokens(branches[kind.decode], kept, b.rotary, forecast)
        else:
            velocity = self.model.decode_tokens(
                branches[kind.decode], b.modulations[kind.slot, : kind.decode * B], b.rotary
            )
        uncond = velocity[B:] if kind.decode == 2 else None
        if kind.fresh_uncond:
            state = self._state(tokens, slice(B, 2 * B))
            uncond = self.model.decode_tokens(tokens, self.model.decoder_modulations(state), b.rotary)
        guided_step_(
            b.x,
            _single(velocity[:B]),
            None if uncond is None else _single(uncond),
            self.tables.coefficients,
            b.step,
            b.velocities,
            b.differences if kind.guided else None,
            b.noise,
            patch_size=self.model.config.patch_size,
        )
        b.step.add_(1)

    def _state(self, tokens: Tensor, rows: slice) -> Tensor:
        """The encoder's state at this step, for these rows of the labels (first conditional, then unconditional)."""
        return self.model.encode_tokens(tokens, *self.buffers.encoder_inputs(rows), self.buffers.rotary)

    @torch.no_grad()
    def _warm_up(self) -> None:
        """Run a step of every kind: a GPU's kernels are chosen by time, which compiled and captured code cannot do."""
        with torch.autocast(self.device.type, enabled=False):
            for kind in dict.fromkeys(self.kinds):
                self.buffers.rewind()
                self._advance(kind)
        self.buffers.rewind()

    @torch.no_grad()
    def _capture(self) -> CapturedSteps | None:
        """The steps as CUDA graphs; None, with a warning, where they cannot be captured."""
        try:
            return CapturedSteps(self._advance, self.kinds, self.buffers.rewind, self.device)
        except Exception as error:  # of CUDA, or of any operation that a graph cannot hold
            reason = one_line(error)
        warnings.warn(f"CUDA graphs cannot be captured ({reason}); sampling eagerly", stacklevel=4)
        self.buffers.rewind()
        return None

    def _check_inputs(self, noise: Tensor, labels: Tensor, generators: Sequence[torch.Generator] | None) -> None:
        _check_noise(self.model, noise)
        count, classes = len(noise), self.model.config.num_classes
        if count > self.batch_size or tuple(noise.shape[2:]) != self.image_size:
            height, width = self.image_size
            shape = f"up to {self.batch_size} samples of {height}x{width}, this sampler's shape"
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {shape}")
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels are {kind_of(labels)}; expected a tensor, ({count},) torch.int64")
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}; expected ({count},) torch.int64")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}; allowed: 0 to {classes - 1}")
        given = 0 if generators is None else len(generators)
        if self.buffers.noise is not None and given != count:
            raise ValueError(f"the sde solver has {given} generators for {count} samples; expected one each")


def on_gpu(device: torch.device) -> bool:
    """Whether steps can be captured there."""
    return device.type == "cuda"


def _single(velocity: Tensor) -> Tensor:
    return velocity.float() if velocity.dtype == torch.float64 else velocity


def _check_noise(model: DDT | FusedDDT, noise: Tensor) -> None:
    shape = f"(B, {model.config.in_channels}, height, width)"
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        given = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise is {given}; expected a tensor of floats, {shape}")
    if noise.ndim != 4 or noise.shape[0] < 1 or noise.shape[1] != model.config.in_channels:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {shape}, B 1 or more")
    model.config.num_tokens(*noise.shape[2:])
