"""The settings of the page: what is drawn, and how. Their values are checked by `requests.read_request`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import gradio as gr

from ddt_fast.config import Solver, StateForecast
from ddt_fast.webdemo.models import DemoModel
from ddt_fast.webdemo.requests import GUIDANCE_RANGE, REFRESH_RANGE

_FEW_IMAGES, _MANY_IMAGES = 4, 10
"""At first: of latents, and of pixels, which are fast to draw."""

_RANDOM_SEED = "() => Math.floor(Math.random() * 2 ** 31)"


class Controls:
    """The components, in the order in which they stand.

    Args:
        models: those offered; the first is chosen.

    Attributes:
        fields: by the names that `read_request` takes.
    """

    def __init__(self, models: Sequence[DemoModel]) -> None:
        self._models = {model.name: model for model in models}
        first = _defaults(models[0])
        names = list(self._models)
        self.fields: dict[str, Any] = {}
        add = self.fields.__setitem__
        add("model", gr.Dropdown(names, value=names[0], label="Model", elem_id="model"))
        add(
            "classes",
            gr.Dropdown(
                models[0].class_choices(),
                value=[],
                multiselect=True,
                allow_custom_value=True,
                label="Classes",
                info="Type to search; none: all, one after the other",
                elem_id="classes",
            ),
        )
        with gr.Row():
            add("num_images", _number("Images", first, "num_images"))
            add("num_steps", _number("Steps", first, "num_steps"))
        add("guidance_scale", _slider("CFG scale", first, "guidance_scale", *GUIDANCE_RANGE, 0.1, "1: no guidance"))
        with gr.Row():
            add("guidance_low", _number("Guided from t", first, "guidance_low", 0.05))
            add("guidance_high", _number("Guided to t", first, "guidance_high", 0.05))
        refresh = "The encoder runs at every K-th step"
        add("refresh_every", _slider("Refresh K", first, "refresh_every", *REFRESH_RANGE, 1, refresh))
        dice = gr.Button("Random", size="sm", elem_id="random-seed", render=False)
        add("seed", _number("Seed", {"seed": 0}, "seed", buttons=[dice]))
        with gr.Accordion("Solver and more", open=False):
            with gr.Row():
                add("solver", _choice("Solver", first, "solver", Solver))
                add("order", _number("Order of lms", first, "order"))
            add("timeshift", _number("Timeshift", first, "timeshift", 0.1, "Above 1: more steps near the noise"))
            add("state_forecast", _choice("State between refreshes", first, "state_forecast", StateForecast))
        dice.click(None, outputs=self.fields["seed"], js=_RANDOM_SEED, show_progress="hidden")
        self.fields["model"].input(
            self._changed,
            inputs=self.fields["model"],
            outputs=[field for name, field in self.fields.items() if name not in ("model", "seed")],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    def _changed(self, name: str) -> list[Any]:
        """The classes and settings of another model."""
        model = self._models[name]
        values = _defaults(model)
        rest = [key for key in self.fields if key not in ("model", "seed", "classes")]
        return [gr.Dropdown(choices=model.class_choices(), value=[]), *(values[key] for key in rest)]


def _defaults(model: DemoModel) -> dict[str, Any]:
    sampling = model.sampling
    low, high = sampling.guidance_interval
    return {
        "num_images": _MANY_IMAGES if model.pipe.vae is None else _FEW_IMAGES,
        "num_steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "guidance_low": low,
        "guidance_high": high,
        "refresh_every": sampling.refresh_every,
        "state_forecast": sampling.state_forecast,
        "solver": sampling.solver,
        "order": sampling.order,
        "timeshift": sampling.timeshift,
    }


def _slider(
    label: str, defaults: dict[str, Any], name: str, low: float, high: float, step: float, info: str | None = None
) -> Any:
    return gr.Slider(
        low, high, value=defaults[name], step=step, label=label, info=info, buttons=[], min_width=100, elem_id=name
    )


def _number(
    label: str, defaults: dict[str, Any], name: str, step: float = 1, info: str | None = None, **more: Any
) -> Any:
    """Without bounds of its own: the answer to a wrong number is the server's."""
    return gr.Number(defaults[name], label=label, info=info, step=step, min_width=100, elem_id=name, **more)


def _choice(label: str, defaults: dict[str, Any], name: str, choices: Any) -> Any:
    return gr.Dropdown(list(get_args(choices)), value=defaults[name], label=label, min_width=100, elem_id=name)
