"""The words of the page, as HTML: the line above the pictures, the comparison's table, and the style sheet."""

from __future__ import annotations

from html import escape

from ddt_fast.webdemo.drawing import Comparison, Drawn, Trajectory
from ddt_fast.webdemo.running import Progress

TITLE = "DDT · Decoupled Diffusion Transformer"

HEADER = """
<div class="ddt-header">
  <h1>DDT <span>Decoupled Diffusion Transformer</span></h1>
  <p>An encoder turns time and class into a state, a decoder moves the picture; a state may serve for K steps.</p>
</div>
"""

CSS = """
.gradio-container > main { max-width: 1240px !important; width: 100% !important; margin: 0 auto; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container .column { gap: 10px; }
.ddt-header h1 { font-size: 1.5rem; font-weight: 700; margin: 0; }
.ddt-header h1 span { font-weight: 400; color: var(--body-text-color-subdued); margin-left: 0.4rem; }
.ddt-header p { margin: 0.1rem 0 0 0; color: var(--body-text-color-subdued); }
.ddt-status { min-height: 3.7rem; padding: 0.4rem 0.8rem; border-radius: 8px; background: var(--block-background-fill);
  border: 1px solid var(--border-color-primary); font-variant-numeric: tabular-nums; }
.ddt-status .ddt-bar { height: 4px; border-radius: 2px; margin-top: 0.4rem; background: var(--border-color-primary); }
.ddt-status .ddt-bar div { height: 100%; border-radius: 2px; background: var(--color-accent); }
.ddt-status .ddt-detail { color: var(--body-text-color-subdued); font-size: 0.85rem; }
.ddt-status.ddt-error { border-color: var(--error-border-color); background: var(--error-background-fill);
  color: var(--error-text-color); }
.ddt-table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
.ddt-table th, .ddt-table td { padding: 0.25rem 0.7rem; text-align: right;
  border-bottom: 1px solid var(--border-color-primary); }
.ddt-table th:first-child, .ddt-table td:first-child { text-align: left; font-weight: 400; }
.ddt-table th { font-weight: 600; }
.ddt-title { font-weight: 600; font-size: 0.9rem; }
.ddt-title span { font-weight: 400; color: var(--body-text-color-subdued); }
.ddt-pictures .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important;
  grid-auto-rows: auto !important; grid-template-rows: none !important; gap: 6px !important; }
.ddt-pictures .grid-wrap { overflow-y: auto !important; max-height: none !important;
  min-height: 5rem !important; }
.ddt-pictures .thumbnail-item { aspect-ratio: auto !important; height: auto !important; border: none !important;
  background: none !important; box-shadow: none !important; border-radius: 4px !important; }
.ddt-pictures .thumbnail-item img { aspect-ratio: 1; width: 100% !important; height: auto !important; }
.ddt-pictures .caption-label { position: static !important; max-width: 100% !important; padding: 1px 0 !important;
  border: none !important; background: none !important; text-align: center !important; font-size: 0.75rem !important;
  font-weight: 400 !important; color: var(--body-text-color-subdued) !important; }
.ddt-pixels img { image-rendering: pixelated; }
"""

_LONGEST = 500

STATES = ("The picture so far", "x at time t")
PREDICTIONS = ("Where it is going", "the picture at t = 1 that the step from there points to")

IDLE = '<div class="ddt-status"><div class="ddt-detail">Choose, then press the button.</div></div>'

STOPPED = '<div class="ddt-status"><div class="ddt-detail">Stopped.</div></div>'


def progress(state: Progress, images: int) -> str:
    """How far a run is, with its speed so far."""
    if not state.total:
        return _status(escape(state.text) + " …", bar=1.0 if state.seconds else 0.0)
    share = state.done / state.total
    speed = f"{share * images / state.seconds:.3g} img/s" if state.seconds else ""
    detail = f"step {state.done} of {state.total} · {state.seconds:.1f} s · {speed}"
    return _status(escape(state.text), detail, share)


def error(message: str) -> str:
    """What was wrong with a request, or went wrong."""
    return f'<div class="ddt-status ddt-error" role="alert">{escape(message[:1].upper() + message[1:_LONGEST])}</div>'


def drawn(result: Drawn) -> str:
    """What was drawn and how fast."""
    count = len(result.images)
    head = (
        f"{count} image{'s' * (count > 1)} in {seconds(result.seconds)} · <b>{result.images_per_second:.3g} img/s</b>"
    )
    return _status(head, f"{_cost(result)} an image")


def trajectory(result: Trajectory) -> str:
    """As `drawn`, of the images that are followed."""
    noise = "; with the sde solver this holds the step's noise, too" * (result.drawn.request.sampling.solver == "sde")
    moments = f"{len(result.steps)} of {result.steps[-1] + 1} moments of the run"
    return _status(moments, f"from noise, t = 0, to the picture, t = 1{noise}")


def compared(result: Comparison) -> str:
    """The comparison in a line."""
    every = result.kept.request.sampling.refresh_every
    return _status(
        f"Refresh {every} is <b>{result.speedup:.2f} times</b> as fast as refresh 1; the samples differ by "
        f"<b>{result.relative_l2:.2g}</b> (relative L2)",
        f"{len(result.kept.images)} images of the same seeds; times of sampling alone",
    )


def comparison(result: Comparison) -> str:
    """The table of a comparison."""
    fresh, kept = result.fresh, result.kept
    every = kept.request.sampling.refresh_every
    between = {"hold": "held", "linear": "forecast linearly", "quadratic": "forecast quadratically"}
    rows = [
        ("time", seconds(fresh.seconds), seconds(kept.seconds)),
        ("speed", f"{fresh.images_per_second:.3g} img/s", f"{kept.images_per_second:.3g} img/s"),
        *((name, *(_costs(side)[name] for side in (fresh, kept))) for name in _costs(fresh)),
        ("times as fast", "1", f"<b>{result.speedup:.2f}</b>"),
        ("relative L2 difference", "0", f"<b>{result.relative_l2:.2g}</b>"),
    ]
    body = "".join(f"<tr><td>{name}</td><td>{left}</td><td>{right}</td></tr>" for name, left, right in rows)
    states = between[kept.request.sampling.state_forecast]
    head = f"<tr><th></th><th>encoder at every step</th><th>every {every} steps, state {states}</th></tr>"
    return f'<table class="ddt-table">{head}{body}</table>'


def side_titles(result: Comparison) -> list[str]:
    """Titles of the three columns of pictures."""
    gain = f"times {result.gain:.2g}" if result.difference.any() else "none"
    every = result.kept.request.sampling.refresh_every
    return [title("Refresh 1"), title(f"Refresh {every}"), title("Difference", gain)]


def title(text: str, detail: str = "") -> str:
    """A title above pictures."""
    return f'<div class="ddt-title">{escape(text)} <span>{escape(detail)}</span></div>'


def seconds(value: float) -> str:
    """A duration: "62 ms", "1.35 s"."""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _status(head: str, detail: str = "", bar: float | None = None) -> str:
    line = f'<div class="ddt-detail">{detail}</div>' if detail else ""
    strip = "" if bar is None else f'<div class="ddt-bar"><div style="width: {bar:.1%}"></div></div>'
    return f'<div class="ddt-status">{head}{line}{strip}</div>'


def _costs(result: Drawn) -> dict[str, str]:
    request = result.request
    plan, config = request.plan, request.model.pipe.transformer.ddt_config
    flops = plan.flops(config, *result.samples.shape[2:])
    amount = f"{flops / 1e9:.3g} GFLOP" if flops < 1e12 else f"{flops / 1e12:.3g} TFLOP"
    return {
        "encoder runs": str(plan.encoder_evaluations),
        "network evaluations": str(plan.network_evaluations),
        "FLOP an image": amount,
    }


def _cost(result: Drawn) -> str:
    costs = _costs(result)
    return (
        f"{costs['network evaluations']} network evaluations, {costs['encoder runs']} encoder runs, "
        f"{costs['FLOP an image']}"
    )
