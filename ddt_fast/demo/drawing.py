"""What the page's tabs do with a request: draw it, write its images to a folder, and return what to show."""

import json
import threading
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.linalg import vector_norm

from ddt_fast.data.image_file import Images
from ddt_fast.demo.requests import Request
from ddt_fast.generation.images import to_uint8
from ddt_fast.generation.npz import write_npz
from ddt_fast.sampling.noise import seeded_noise
from ddt_fast.wording import plural

TRAJECTORY_IMAGES = 4
"""The most images of a trajectory, one per row."""

_TIMED_SECONDS, _TIMED_RUNS = 1.0, 5
"""A comparison repeats a run for this long, and at most this often: one short run says little about speed."""


class Stopped(Exception):
    """Raised to end a run that nobody waits for."""


class Report:
    """The progress of a run: the run calls it, the page reads it, and sets `stop` to end the run."""

    def __init__(self) -> None:
        self.text, self.done, self.total = "waiting for the model", 0, 0
        self.started = time.perf_counter()
        self.stop = threading.Event()

    def __call__(self, text: str, done: int, total: int) -> None:
        if self.stop.is_set():
            raise Stopped
        if done == 0:
            self.started = time.perf_counter()
        self.text, self.done, self.total = text, done, total


def generate(request: Request, report: Report, folder: Path) -> tuple[Any, ...]:
    """Draw images; return a status line, a gallery, and a zip of the images with samples.npz and settings.json."""
    samples, seconds = _sample(request, report, "drawing")
    images, names = _pixels(request, samples), _file_names(request)
    known = request.pipe.class_names
    classes = [known.short(label) if label in known.id2label else f"class {label}" for label in request.labels]
    captions = [f"{name} · seed {seed}" for name, seed in zip(classes, request.seeds, strict=True)]
    gallery = _gallery(images, names, folder, captions)
    labels, seeds = np.array(request.labels), np.array(request.seeds)
    write_npz(folder / "samples.npz", images.shape, [images], labels=labels, seeds=seeds)
    settings = {"model": request.model, "labels": request.labels, "seeds": request.seeds} | asdict(request.sampling)
    (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    archive = folder / f"{Path(request.model).name}_seed_{request.seeds[0]}.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in [*names, "samples.npz", "settings.json"]:
            file.write(folder / name, name)
    head = f"{plural(len(names), 'image')} in {seconds:.3g} s · **{len(names) / seconds:.3g} img/s**"
    costs = " · ".join(f"{name}: {cost}" for name, cost in _costs(request).items())
    return f"{head}\n{costs}", gallery, gr.update(value=str(archive), visible=True)


def compare(request: Request, report: Report, folder: Path) -> tuple[Any, ...]:
    """Compare the encoder at every step with the request; return a status line, a table, and galleries of both and of
    their difference, scaled so that the largest is white. ValueError if the request also refreshes at every step."""
    every, forecast = request.sampling.refresh_every, request.sampling.state_forecast
    if every == 1:
        raise ValueError("refresh K is 1, the same as the other side; allowed: 2 or more")
    always = replace(request, sampling=replace(request.sampling, refresh_every=1, state_forecast="hold"))
    fresh, fresh_seconds = _timed(always, report, "refresh 1")
    kept, kept_seconds = _timed(request, report, f"refresh {every}")
    sides = {"fresh": _pixels(request, fresh), "kept": _pixels(request, kept)}
    distance = np.abs(sides["kept"].astype(np.float32) - sides["fresh"])
    gain = 255 / float(distance.max()) if distance.any() else 1.0
    sides["difference"] = (distance * gain).round().astype(np.uint8)
    labels = ["Refresh 1", f"Refresh {every}", f"Difference, times {gain:.2g}" if distance.any() else "No difference"]
    galleries = [
        _gallery(images, [f"{side}_{name}" for name in _file_names(request)], folder, label=label)
        for (side, images), label in zip(sides.items(), labels, strict=True)
    ]
    speedup = f"**{fresh_seconds / kept_seconds:.2f}**"
    error = f"**{float(vector_norm(kept - fresh) / vector_norm(fresh)):.2g}**"
    count = len(request.seeds)
    rows = [
        ("", "encoder at every step", f"every {every} steps, state {'held' if forecast == 'hold' else forecast}"),
        ("---", "--:", "--:"),
        ("time", f"{fresh_seconds:.3g} s", f"{kept_seconds:.3g} s"),
        ("speed", f"{count / fresh_seconds:.3g} img/s", f"{count / kept_seconds:.3g} img/s"),
        *((name, cost, _costs(request)[name]) for name, cost in _costs(always).items()),
        ("times as fast", "1", speedup),
        ("relative L2 difference", "0", error),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    head = f"Refresh {every} is {speedup} times as fast as refresh 1; samples differ by {error} (relative L2)"
    return f"{head}\n{plural(count, 'image')} with the same seeds; times are for sampling only", table, *galleries


def trajectory(request: Request, report: Report, folder: Path) -> tuple[Any, ...]:
    """Follow the first images; return a status line and galleries with an image per row: x_t, and where the next step
    points, x_t + (1 - t) dx/dt, with dx/dt from the solver's step. Both end at the sample."""
    few, total = slice(TRAJECTORY_IMAGES), request.sampling.num_steps
    request = replace(request, labels=request.labels[few], seeds=request.seeds[few])
    shown = sorted({round(i * total / (request.frames - 1)) for i in range(request.frames)})
    x: dict[int, Tensor] = {}
    samples, _ = _sample(request, report, "drawing", x)
    x[0], _ = seeded_noise(request.seeds, samples.shape[1:])
    times = [step.t for step in request.plan.steps] + [1.0]
    states: list[Images] = []
    predictions: list[Images] = []
    for step in shown:
        report("decoding", len(states), len(shown))
        end, t = x[step], times[step]
        if step < total:
            end = x[step] + (x[step + 1] - x[step]) * (1 - t) / (times[step + 1] - t)
        states.append(_pixels(request, x[step]))
        predictions.append(_pixels(request, end))
    strips = []
    for kind, frames in (("state", states), ("prediction", predictions)):
        rows = np.stack(frames, axis=1)  # (N, frames, H, W, 3)
        names = [f"{name[:-4]}_{kind}_{step:04d}.png" for name in _file_names(request) for step in shown]
        captions = [f"t {times[step]:.2f}" for step in shown] * len(rows)
        strips.append(_gallery(np.concatenate(rows), names, folder, captions, columns=len(shown)))
    noise = "; with the sde solver the heading includes the step's noise" * (request.sampling.solver == "sde")
    moments = f"{len(shown)} of {total + 1} moments of the run"
    return f"{moments}\nfrom noise, t = 0, to the image, t = 1{noise}", *strips


def _timed(request: Request, report: Report, text: str) -> tuple[Tensor, float]:
    """As `_sample`, with the best time of a few runs, after a short one to warm up."""
    short = replace(request.sampling, num_steps=2, last_step=None, guidance_interval=(0.0, 1.0))
    _sample(replace(request, sampling=short), report, f"{text}, warming up")
    times: list[float] = []
    while sum(times) < _TIMED_SECONDS and len(times) < _TIMED_RUNS:
        samples, seconds = _sample(request, report, f"{text}, run {len(times) + 1}")
        times.append(seconds)
    return samples, min(times)


def _sample(
    request: Request, report: Report, text: str, states: dict[int, Tensor] | None = None
) -> tuple[Tensor, float]:
    """The model's samples (N, in_channels, h, w) float32 on the CPU, and the seconds that they took; x after every step
    goes into `states`."""
    total = request.sampling.num_steps

    def after_step(_pipe: Any, index: int, _t: Tensor, tensors: dict[str, Tensor]) -> None:
        report(text, index + 1, total)
        if states is not None:
            states[index + 1] = tensors["latents"].cpu()

    report(text, 0, total)
    started = time.perf_counter()
    result: Any = request.pipe(
        request.labels,
        sampling=request.sampling,
        generator=[torch.Generator().manual_seed(seed) for seed in request.seeds],
        output_type="latent",
        callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=[] if states is None else ["latents"],
    )
    samples = result.images.cpu()  # waits for the device
    return samples, time.perf_counter() - started


def _pixels(request: Request, samples: Tensor) -> Images:
    return to_uint8(request.pipe.pixels(samples))


def _file_names(request: Request) -> list[str]:
    """One name per image, as from the sample command."""
    draws = enumerate(zip(request.labels, request.seeds, strict=True))
    return [f"{i:05d}_class_{label}_seed_{seed}.png" for i, (label, seed) in draws]


def _gallery(images: Images, names: list[str], folder: Path, captions: Sequence[str] = (), **changes: Any) -> Any:
    """The new content of a gallery: PNGs with the true pixels; the page enlarges small images without smoothing."""
    paths = [folder / name for name in names]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    value: Any = list(zip(paths, captions, strict=True)) if captions else paths
    return gr.update(value=value, elem_classes=["pixels"] if images.shape[1] < 64 else [], **changes)


def _costs(request: Request) -> dict[str, str]:
    plan, side = request.plan, request.pipe.data.sample_size
    flops = plan.flops(request.pipe.transformer.ddt_config, side, side)
    amount = f"{flops / 1e9:.3g} GFLOP" if flops < 1e12 else f"{flops / 1e12:.3g} TFLOP"
    evaluations, encoder = str(plan.network_evaluations), str(plan.encoder_evaluations)
    return {"network evaluations": evaluations, "encoder runs": encoder, "FLOP per image": amount}
