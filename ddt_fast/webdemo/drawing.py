"""What the page's three tabs draw: images, refresh 1 compared with refresh K, and the way from noise to image."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddt_fast.config import SamplingConfig
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.webdemo.models import Images
from ddt_fast.webdemo.requests import Request
from ddt_fast.webdemo.running import Report

OnStep = Callable[[int, Tensor], object]
"""Called after a step as on_step(steps done, x)."""

_TIMED_SECONDS, _TIMED_RUNS = 1.0, 5
"""A comparison repeats a run until so many seconds are spent, and so often at most: the clock tells little of a short
run."""


@dataclass(frozen=True)
class Drawn:
    """Images and what they took.

    Attributes:
        request: what was asked for.
        samples: (N, in_channels, h, w) float32 on the CPU, what the model draws.
        images: (N, H, W, 3) uint8.
        seconds: of sampling alone, without decoding.
    """

    request: Request
    samples: Tensor
    images: Images
    seconds: float

    @property
    def images_per_second(self) -> float:
        return len(self.images) / self.seconds


@dataclass(frozen=True)
class Comparison:
    """The same images with every state fresh and with states kept.

    Attributes:
        fresh, kept: the two runs.
        relative_l2: of the samples, |kept - fresh| / |fresh|.
        difference: (N, H, W, 3) uint8, the distance of pixels times `gain`.
        gain: such that the largest distance is white; 1 where there is none.
    """

    fresh: Drawn
    kept: Drawn
    relative_l2: float
    difference: Images
    gain: float

    @property
    def speedup(self) -> float:
        return self.fresh.seconds / self.kept.seconds


@dataclass(frozen=True)
class Trajectory:
    """A run, seen at some of its steps.

    Attributes:
        drawn: its end.
        steps: (F,) steps done at each frame; the first 0, the last all.
        times: (F,) t of each frame.
        states: (F, N, H, W, 3) uint8, x_t.
        predictions: (F, N, H, W, 3) uint8, where the next step points: x_t + (1 - t) dx/dt, with dx/dt the step that
            the solver takes from there; the last frame is the sample.
    """

    drawn: Drawn
    steps: tuple[int, ...]
    times: tuple[float, ...]
    states: Images
    predictions: Images


def draw(request: Request, report: Report) -> Drawn:
    """Draw what is asked for."""
    samples, seconds = _sample(request, report, "drawing")
    report("decoding", 0, 0)
    return Drawn(request, samples, request.model.pixels(samples), seconds)


def compare(request: Request, report: Report) -> Comparison:
    """Draw with the encoder at every step, and as asked for. Both have a short run first that is not timed, for what
    is set up or tuned once; short runs are repeated, and their best time is taken.

    Raises:
        ValueError: the request refreshes at every step, too.
    """
    every = request.sampling.refresh_every
    if every == 1:
        raise ValueError("refresh K is 1, which is what it would be compared with; allowed: 2 or more")
    fresh_request = request.with_sampling(refresh_every=1, state_forecast="hold")
    fresh = _timed(fresh_request, report, "refresh 1")
    kept = _timed(request, report, f"refresh {every}")
    distance = np.abs(kept.images.astype(np.int16) - fresh.images).astype(np.float32)
    largest = float(distance.max())
    gain = 255 / largest if largest else 1.0
    error = torch.linalg.vector_norm(kept.samples - fresh.samples) / torch.linalg.vector_norm(fresh.samples)
    return Comparison(fresh, kept, float(error), (distance * gain).round().astype(np.uint8), gain)


def trajectory(request: Request, frames: int, report: Report) -> Trajectory:
    """Draw, and keep `frames` evenly spaced moments of the run, or all where there are fewer steps."""
    total = request.sampling.num_steps
    shown = sorted({round(frame * total / (frames - 1)) for frame in range(frames)})
    times = [step.t for step in request.plan.steps] + [1.0]
    kept: dict[int, Tensor] = {}
    needed = {step + offset for step in shown for offset in (0, 1)}

    def keep(done: int, x: Tensor) -> None:
        if done in needed:
            kept[done] = x.cpu()

    samples, seconds = _sample(request, report, "drawing", keep)
    kept[0], _ = seeded_noise(request.seeds, samples.shape[1:])
    states, predictions = [], []
    for i, step in enumerate(shown):
        report("decoding", i, len(shown))
        x = kept[step] if step < total else samples
        end = samples
        if step < total:
            following = kept[step + 1] if step + 1 < total else samples
            end = x + (following - x) * (1 - times[step]) / (times[step + 1] - times[step])
        states.append(request.model.pixels(x))
        predictions.append(request.model.pixels(end))
    drawn = Drawn(request, samples, states[-1], seconds)
    frame_times = tuple(times[step] for step in shown)
    return Trajectory(drawn, tuple(shown), frame_times, np.stack(states), np.stack(predictions))


def _timed(request: Request, report: Report, text: str) -> Drawn:
    short = request.with_sampling(num_steps=2, last_step=None, guidance_interval=(0.0, 1.0))
    _sample(short, report, f"{text}, warming up")
    spent, best = 0.0, float("inf")
    for run in range(_TIMED_RUNS):
        samples, seconds = _sample(request, report, text if run == 0 else f"{text}, run {run + 1} of {_TIMED_RUNS}")
        spent, best = spent + seconds, min(best, seconds)
        if spent >= _TIMED_SECONDS:
            break
    report("decoding", 0, 0)
    return Drawn(request, samples, request.model.pixels(samples), best)


def _sample(request: Request, report: Report, text: str, on_step: OnStep | None = None) -> tuple[Tensor, float]:
    """(N, in_channels, h, w) float32 samples on the CPU, and the seconds that they took."""
    total = request.sampling.num_steps

    def after_step(_pipe: Any, index: int, _t: Tensor, tensors: dict[str, Tensor]) -> None:
        report(text, index + 1, total)
        if on_step is not None:
            on_step(index + 1, tensors["latents"])

    started = time.perf_counter()
    result: Any = request.model.pipe(
        request.labels,
        generator=[torch.Generator().manual_seed(seed) for seed in request.seeds],
        output_type="latent",
        callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=[] if on_step is None else ["latents"],
        **_arguments(request.sampling),
    )
    samples = result.images.cpu()  # waits for the device
    return samples, time.perf_counter() - started


def _arguments(sampling: SamplingConfig) -> dict[str, Any]:
    """The settings as the pipeline's call takes them."""
    settings = asdict(sampling)
    settings["num_inference_steps"] = settings.pop("num_steps")
    settings["last_step"] = settings["last_step"] or 0
    return settings
