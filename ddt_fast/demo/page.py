"""The page: settings on the left, three tabs that draw with them on the right."""

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from ddt_fast.config import Solver, StateForecast
from ddt_fast.demo.drawing import TRAJECTORY_IMAGES, Report, Stopped, compare, generate, trajectory
from ddt_fast.demo.requests import MAX_SEED, Models, class_choices, default_values, read_request

CONCURRENT = 4
"""Requests that draw or wait for their model; others wait in the queue."""

_HEADER = """# DDT · Decoupled Diffusion Transformer
An encoder turns image, time and class into a state, and a decoder moves the image; one state can serve K steps."""

_CSS = """
.gradio-container > main { max-width: 1240px !important; width: 100% !important; margin: 0 auto; }
.status { min-height: 4rem; font-variant-numeric: tabular-nums; }
.status progress { width: 100%; }
.grid-wrap { max-height: none !important; min-height: 5rem !important; padding-top: 1.6rem !important; }
.grid-container { grid: auto-flow auto / repeat(var(--grid-cols), minmax(0, 1fr)) !important; gap: 6px !important; }
.thumbnail-item, .thumbnail-item img { height: auto !important; aspect-ratio: auto !important; }
.caption-label { position: static !important; max-width: 100% !important; border: none !important; }
#compare-table table { width: 100%; }
#compare-table :is(th, td) { padding: 0.2rem 0.6rem; border-width: 0 0 1px; }
.pixels img { image-rendering: pixelated; }
"""


class Demo:
    """Draws for the page's clients, each model one request at a time in a thread of its own; the first is selected.

    Attributes:
        page: the page to launch.
        fields: the components that a client sends, in this order: the fields of `SamplingConfig` under their names.
        reports: reports of the requests that draw or wait for their model.
    """

    def __init__(self, models: Models, max_images: int, max_steps: int) -> None:
        self.models = models
        self.fields: dict[str, Any] = {}
        self.threads = {name: ThreadPoolExecutor(1, "draw") for name in models}
        self.reports: set[Report] = set()
        with gr.Blocks(title="DDT", analytics_enabled=False, delete_cache=(600, 3600)) as self.page:
            gr.Markdown(_HEADER)
            with gr.Row():
                with gr.Column(scale=1, min_width=340):
                    self._settings(max_images, max_steps)
                with gr.Column(scale=2, min_width=480), gr.Tabs():
                    self._tabs()

    def close(self) -> None:
        """End all runs and wait for them: a thread that is inside torch when Python exits crashes the process."""
        for report in list(self.reports):
            report.stop.set()
        for thread in self.threads.values():
            thread.shutdown()

    def answer(self, tab: Callable[..., Any], num_outputs: int, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the status line while the tab draws, and finally its result. When the client stops or vanishes, gradio
        closes the iterator, and the run ends at its next report."""
        unchanged, report = [gr.skip()] * num_outputs, Report()
        self.reports.add(report)
        try:
            request = read_request(values, self.models, self.fields)
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                shown = self.threads[request.model].submit(_result, tab, request, report, Path(folder))
                while wait([shown], timeout=0.1).not_done:
                    yield _progress(report, len(request.seeds)), *unchanged
                if (result := shown.result()) is not None:
                    yield result  # gradio copies the files before it continues
        except (ValueError, MemoryError, RuntimeError) as error:
            # A failed CPU allocation is a plain RuntimeError.
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            message = str(error) if isinstance(error, ValueError) else "out of memory; ask for fewer images"
            yield "", *unchanged
            message = escape(message[:1].upper() + message[1:300], quote=False)
            raise gr.Error(message, print_exception=False) from error
        finally:
            report.stop.set()
            self.reports.discard(report)

    def _settings(self, max_images: int, max_steps: int) -> None:
        name, pipe = next(iter(self.models.items()))
        values = default_values(pipe) | {"model": name}

        def add(kind: Any, field: str, label: str, **more: Any) -> None:
            self.fields[field] = kind(value=values[field], label=label, min_width=100, elem_id=field, **more)

        def number(field: str, label: str, low: float, high: float, step: float = 1, **more: Any) -> None:
            add(more.pop("kind", gr.Number), field, label, minimum=low, maximum=high, step=step, **more)

        add(gr.Dropdown, "model", "Model", choices=list(self.models))
        several = {"multiselect": True, "allow_custom_value": True, "info": "Type to search; empty: all in turn"}
        add(gr.Dropdown, "classes", "Classes", choices=class_choices(pipe), **several)
        with gr.Row():
            number("num_images", "Images", 1, max_images)
            number("num_steps", "Steps", 1, max_steps)
        number("guidance_scale", "CFG scale", 0, 20, 0.1, kind=gr.Slider, info="1: no guidance")
        with gr.Row():
            number("guidance_low", "Guided from t", 0, 1, 0.05)
            number("guidance_high", "Guided to t", 0, 1, 0.05)
        number("refresh_every", "Refresh K", 1, 50, kind=gr.Slider, info="The encoder runs every K steps")
        dice = gr.Button("Random", size="sm", render=False)
        number("seed", "Seed", 0, MAX_SEED, buttons=[dice])
        with gr.Accordion("Solver and more", open=False):
            add(gr.Dropdown, "state_forecast", "State between refreshes", choices=get_args(StateForecast))
            with gr.Row():
                add(gr.Dropdown, "solver", "Solver", choices=get_args(Solver))
                number("order", "Order", 1, 4)
            number("timeshift", "Timeshift", 0.1, 10, 0.1, info="Above 1: more steps near the noise")
        dice.click(None, outputs=self.fields["seed"], js="() => Math.floor(Math.random() * 2 ** 31)")
        changed = {name: field for name, field in self.fields.items() if name not in ("model", "seed")}

        def choose(name: str) -> list[Any]:
            """The classes and settings of another model."""
            values = default_values(self.models[name])
            values["classes"] = gr.Dropdown(choices=class_choices(self.models[name]), value=[])
            return [values[field] for field in changed]

        event = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.fields["model"].input(choose, self.fields["model"], list(changed.values()), **event)
        self._number = number

    def _tabs(self) -> None:
        with gr.Tab("Generate"):
            connect = self._buttons(generate, "Generate")
            archive = gr.DownloadButton("Download all (zip)", visible=False, size="sm", elem_id="download")
            connect([_gallery("images", 5, "Images"), archive])
        with gr.Tab("Compare"):
            connect = self._buttons(compare, "Compare refresh 1 with refresh K")
            with gr.Row():
                sides = [_gallery(name, 3) for name in ("fresh", "kept", "difference")]
            connect([gr.Markdown(elem_id="compare-table"), *sides])
        with gr.Tab("Trajectory"):
            connect = self._buttons(trajectory, f"Follow up to {TRAJECTORY_IMAGES} images")
            self._number("frames", "Moments", 2, 12, kind=gr.Slider)
            connect([_gallery("states", 9, "x at time t"), _gallery("predictions", 9, "Where it is heading")])

    def _buttons(self, tab: Callable[..., Any], label: str) -> Callable[[list[Any]], None]:
        """Add the start and stop buttons and a status line; return a function that connects them to the outputs."""
        name = tab.__name__
        with gr.Row():
            start = gr.Button(label, variant="primary", scale=4, elem_id=f"{name}-run")
            stop = gr.Button("Stop", scale=1, min_width=80, elem_id=f"{name}-stop")
        text = "Choose, then press the button."
        look = {"container": True, "line_breaks": True, "elem_classes": "status"}
        status = gr.Markdown(text, elem_id=f"{name}-status", **look)

        def connect(outputs: list[Any]) -> None:
            event = start.click(
                partial(self.answer, tab, len(outputs)),
                list(self.fields.values()),  # with `frames` once the last tab has added it
                [status, *outputs],
                preprocess=False,  # `read_request` checks whatever a client sends
                show_progress="minimal",
                show_progress_on=status,
                concurrency_limit=CONCURRENT,
                concurrency_id="draw",
                api_name=name,
            )
            # Listeners run in order: after the first, no progress can overwrite what the second says.
            stop.click(None, cancels=event, queue=False, api_visibility="private")
            stop.click(lambda: "Stopped.", outputs=status, queue=False, api_visibility="private")

        return connect


def serve(demo: Demo, max_queue: int, **where: Any) -> None:
    """Launch the page with a queue of max_queue requests; `where` is for gradio's `launch`."""
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate")
    look = {"theme": theme, "css": _CSS, "footer_links": ["api"], "ssr_mode": False}
    # Nothing is uploaded here.
    demo.page.queue(max_size=max_queue).launch(enable_monitoring=False, max_file_size="1kb", **look, **where)


def _result(tab: Callable[..., Any], *arguments: Any) -> Any:
    """What the tab returns; None for a run that was ended. Its tensors end with it in the model's thread: in one of
    gradio's, which Python's exit does not wait for, freeing them may crash the process."""
    try:
        return tab(*arguments)
    except Stopped:
        return None


def _gallery(name: str, columns: int, label: str | None = None) -> Any:
    look = {"columns": columns, "height": "auto", "object_fit": "contain", "buttons": ["download", "fullscreen"]}
    return gr.Gallery(label=label, show_label=True, interactive=False, elem_id=name, **look)


def _progress(report: Report, num_images: int) -> str:
    seconds, share = time.perf_counter() - report.started, report.done / max(report.total, 1)
    speed = f"{seconds:.1f} s · {share * num_images / seconds:.3g} img/s" * (share > 0)
    step = f", step {report.done} of {report.total}" * (report.total > 0)
    return f'{report.text}{step}\n{speed}<progress value="{share}"></progress>'
