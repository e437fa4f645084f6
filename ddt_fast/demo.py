"""A page to draw with in the browser: `python -m ddt_fast.demo` alone serves the digits in the package on loopback."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jsonargparse

from ddt_fast.command import CommandParser, run_command
from ddt_fast.device import DTYPES, choose_device
from ddt_fast.presets import PRESETS
from ddt_fast.webdemo.models import load_models
from ddt_fast.webdemo.requests import Limits
from ddt_fast.webdemo.running import end_work


def build_parser() -> jsonargparse.ArgumentParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m ddt_fast.demo", description=__doc__)
    limits = Limits()
    add = parser.add_argument
    add("--checkpoint", type=str, nargs="+", default=[], help="folders, files or hub ids, beside the package's digits")
    add("--preset", choices=list(PRESETS), help="settings for a .ckpt or .safetensors without config.json")
    add("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 for latents, where there are units")
    add("--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0: all, for others to reach")
    add("--port", type=int, default=7860, help="to listen on")
    add("--share", action="store_true", help="also a public address through gradio's servers, for a week")
    add("--max-queue", type=int, default=16, help="requests that may wait; more are turned away")
    add("--max-images", type=int, default=limits.images, help="of one request")
    add("--max-steps", type=int, default=limits.steps, help="of one request")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load the models, serve until interrupted."""
    options = build_parser().parse_args(arguments)
    for name, highest in (("port", 65535), ("max_queue", 1000), ("max_images", 1000), ("max_steps", 10_000)):
        value = getattr(options, name)
        if not 1 <= value <= highest:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: 1 to {highest}")
    with _interrupted_by_signals(), tempfile.TemporaryDirectory(prefix="ddt-demo-") as folder:
        # Read when gradio is imported, and later. Pictures that are shown lie there, and are gone with the server.
        os.environ["GRADIO_TEMP_DIR"] = folder
        launch = _server()
        _check_address(options.host, options.port)
        device = choose_device(options.device)
        models = load_models(options.checkpoint, options.preset, device, options.dtype)
        try:
            launch(
                models,
                Limits(options.max_images, options.max_steps),
                host=options.host,
                port=options.port,
                share=options.share,
                max_queue=options.max_queue,
            )
        finally:
            end_work()


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """A signal that ends the process, or its terminal, is an interrupt within; one that is ignored, as under nohup,
    stays so. Only a main thread can take signals."""
    numbers = []
    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has one
        numbers = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _check_address(host: str, port: int) -> None:
    """ValueError where nobody can listen there: gradio would say so with a traceback."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.create_server(address[:2], family=kind):
            pass
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on --host {host} --port {port}: {reason}") from error


def _server() -> Any:
    """`webdemo.server.serve`; ValueError where gradio is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(f'the demo needs gradio ({error}); pip install ".[demo]" in the checkout') from error
    from ddt_fast.webdemo.server import serve

    return serve


if __name__ == "__main__":
    run_command(main)
