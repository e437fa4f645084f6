"""Serving the page: a bounded queue, and nothing that leaves the machine unless it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from ddt_fast.webdemo import texts
from ddt_fast.webdemo.models import DemoModel
from ddt_fast.webdemo.page import build_page
from ddt_fast.webdemo.requests import Limits


def serve(
    models: Sequence[DemoModel],
    limits: Limits,
    *,
    host: str,
    port: int,
    share: bool = False,
    max_queue: int = 16,
    block: bool = True,
) -> gr.Blocks:
    """Serve the page.

    Args:
        models: those offered; the first is chosen.
        limits: of one request.
        host, port: where to listen.
        share: also make a public address, through gradio's servers.
        max_queue: requests that may wait; others are turned away, with a message.
        block: until interrupted; else return as soon as the page can be had.

    Raises:
        OSError: the address cannot be listened on.
    """
    page = build_page(models, limits)
    page.queue(max_size=max_queue)
    fonts = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=fonts)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=not block,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size="1kb",  # nothing is uploaded here
        footer_links=["api"],
        theme=theme,
        css=texts.CSS,
    )
    return page
