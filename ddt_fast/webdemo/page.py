"""The page: settings on the left, and three tabs that draw with them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from ddt_fast.webdemo import drawing, texts
from ddt_fast.webdemo.controls import Controls
from ddt_fast.webdemo.downloads import captions, image_names, write_pngs, write_zip
from ddt_fast.webdemo.drawing import Comparison, Drawn, Trajectory
from ddt_fast.webdemo.models import DemoModel, Images
from ddt_fast.webdemo.requests import FIELDS, Limits, Request, read_request, whole
from ddt_fast.webdemo.running import Progress, Report, in_background

T = TypeVar("T")

CONCURRENT = 4
"""Requests at work or waiting for their model; more wait in the queue."""

FRAMES_RANGE = (2, 12)
TRAJECTORY_IMAGES = 4
"""A trajectory shows so many images at most, one a row."""

_SIDES = ("fresh", "kept", "difference")
_PICTURES = ["ddt-pictures"]
_SMALL = 64
"""Images below this side are enlarged without smoothing."""


def build_page(models: Sequence[DemoModel], limits: Limits) -> gr.Blocks:
    """The page for these models, the first of which is chosen."""
    handlers = _Handlers(models, limits)
    with gr.Blocks(title=texts.TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        _html(texts.HEADER, "ddt-header")
        with gr.Row():
            with gr.Column(scale=1, min_width=340):
                controls = Controls(models)
            with gr.Column(scale=2, min_width=480), gr.Tabs():
                inputs = [controls.fields[name] for name in FIELDS]
                with gr.Tab("Generate", id="generate"):
                    run, stop = _buttons("Generate", "generate")
                    status = _html(texts.IDLE, "generate-status")
                    gallery = _gallery("images", columns=5)
                    archive = gr.DownloadButton("Download all (zip)", visible=False, size="sm", elem_id="download")
                    _connect(run, stop, handlers.generate, inputs, status, [gallery, archive])
                with gr.Tab("Compare", id="compare"):
                    run, stop = _buttons("Compare refresh 1 with refresh K", "compare")
                    status = _html(texts.IDLE, "compare-status")
                    titles, galleries = [], []
                    with gr.Row():
                        for name in _SIDES:
                            with gr.Column(min_width=120):
                                titles.append(_html("", f"{name}-title"))
                                galleries.append(_gallery(name, columns=3))
                    table = _html("", "compare-table")
                    _connect(run, stop, handlers.compare, inputs, status, [table, *titles, *galleries])
                with gr.Tab("Trajectory", id="trajectory"):
                    run, stop = _buttons(f"Follow up to {TRAJECTORY_IMAGES} images", "trajectory")
                    frames = gr.Slider(*FRAMES_RANGE, value=9, step=1, label="Moments", buttons=[], elem_id="frames")
                    status = _html(texts.IDLE, "trajectory-status")
                    strips = []
                    for name, words in (("states", texts.STATES), ("predictions", texts.PREDICTIONS)):
                        _html(texts.title(*words), f"{name}-title")
                        strips.append(_gallery(name, columns=9))
                    _connect(run, stop, handlers.trajectory, [*inputs, frames], status, strips)
    return page


def _buttons(label: str, name: str) -> tuple[Any, Any]:
    with gr.Row():
        run = gr.Button(label, variant="primary", scale=4, elem_id=f"{name}-run")
        stop = gr.Button("Stop", scale=1, min_width=80, elem_id=f"{name}-stop")
    return run, stop


def _html(value: str, name: str) -> Any:
    return gr.HTML(value, elem_id=name, apply_default_css=False)


def _gallery(name: str, columns: int) -> Any:
    return gr.Gallery(
        show_label=False,
        columns=columns,
        height="auto",
        format="png",
        object_fit="contain",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_id=name,
        elem_classes=_PICTURES,
    )


def _connect(
    run: Any, stop: Any, handler: Callable[..., Any], inputs: list[Any], status: Any, outputs: list[Any]
) -> None:
    event = run.click(
        handler,
        inputs=inputs,
        outputs=[status, *outputs],
        show_progress="hidden",
        concurrency_limit=CONCURRENT,
        concurrency_id="draw",
        api_name=handler.__name__,
    )
    stop.click(
        lambda: texts.STOPPED,
        outputs=status,
        cancels=event,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )


class _Handlers:
    """The page's buttons: each handler yields its status line, and at last its pictures."""

    def __init__(self, models: Sequence[DemoModel], limits: Limits) -> None:
        self._models = {model.name: model for model in models}
        self._limits = limits

    def generate(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        def show(result: Drawn, folder: Path) -> tuple[Any, ...]:
            paths = write_pngs(result.images, image_names(result), folder)
            archive = gr.DownloadButton(value=str(write_zip(result, paths, folder)), visible=True)
            return texts.drawn(result), _pictures(result.images, paths, captions(result)), archive

        yield from self._serve(values, 2, drawing.draw, show)

    def compare(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        def show(result: Comparison, folder: Path) -> tuple[Any, ...]:
            pictures = []
            for i, images in enumerate((result.fresh.images, result.kept.images, result.difference)):
                names = [f"{_SIDES[i]}_{name}" for name in image_names(result.kept)]
                pictures.append(_pictures(images, write_pngs(images, names, folder)))
            return texts.compared(result), texts.comparison(result), *texts.side_titles(result), *pictures

        yield from self._serve(values, 7, drawing.compare, show)

    def trajectory(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        *values_of_request, frames = values

        def work(request: Request, report: Report) -> Trajectory:
            moments = whole("moments", frames, *FRAMES_RANGE)
            return drawing.trajectory(request, moments, report)

        def show(result: Trajectory, folder: Path) -> tuple[Any, ...]:
            strips = []
            for kind, pictures in (("state", result.states), ("prediction", result.predictions)):
                # One image a row: (F, N, ...) → (N, F, ...).
                images = pictures.swapaxes(0, 1).reshape(-1, *pictures.shape[2:])
                rows, marks = [], []
                for name in image_names(result.drawn):
                    rows += [f"{name.removesuffix('.png')}_{kind}_{step:04d}.png" for step in result.steps]
                    marks += [f"t {t:.2f}" for t in result.times]
                paths = write_pngs(images, rows, folder)
                strips.append(_pictures(images, paths, marks, columns=len(result.steps)))
            return texts.trajectory(result), *strips

        yield from self._serve(values_of_request, 2, work, show, TRAJECTORY_IMAGES)

    def _serve(
        self,
        values: Sequence[Any],
        num_outputs: int,
        work: Callable[[Request, Report], T],
        show: Callable[[T, Path], tuple[Any, ...]],
        most: int | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """Read the request, of which `most` images at most are drawn, do the work, show it; whatever goes wrong is said
        in the status line."""
        unchanged = [gr.skip()] * num_outputs
        try:
            request = read_request(dict(zip(FIELDS, values, strict=True)), self._models, self._limits)
            request = request if most is None else request.first(most)
            for update in in_background(request.model, lambda report: work(request, report)):
                if isinstance(update, Progress):
                    yield texts.progress(update, len(request.labels)), *unchanged
                else:
                    # gradio copies the files before it asks for the next value.
                    with tempfile.TemporaryDirectory() as folder:
                        yield show(update.result, Path(folder))
        except ValueError as error:
            yield texts.error(str(error)), *unchanged


def _pictures(images: Images, paths: list[Path], captions: Sequence[str] = (), **changes: Any) -> Any:
    """A gallery's new content, and the style that suits the images' size."""
    classes = [*_PICTURES, *(["ddt-pixels"] if images.shape[1] < _SMALL else [])]
    value: list[Any] = [str(path) for path in paths]
    if captions:
        value = list(zip(value, captions, strict=True))
    return gr.Gallery(value=value, elem_classes=classes, **changes)
