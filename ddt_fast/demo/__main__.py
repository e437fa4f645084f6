"""Draw images on a page in the browser: `python -m ddt_fast.demo` alone serves the package's digits on loopback."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from operator import attrgetter

from ddt_fast.checks import require
from ddt_fast.command import CommandParser, run_command
from ddt_fast.generation.settings import Engine
from ddt_fast.interrupts import interrupt
from ddt_fast.presets import PRESETS


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m ddt_fast.demo", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=str, nargs="+", default=[], help="folders, files or hub ids, beside the package's digits")
    add("--preset", choices=list(PRESETS), help="settings for a .ckpt or .safetensors without config.json")
    parser.add_options(Engine, "device", "dtype")
    add("--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in")
    add("--port", type=int, default=7860, help="port to listen on")
    add("--share", action="store_true", help="also serve a public address through gradio's servers for a week")
    add("--max-queue", type=int, default=16, help="requests that may wait; more are refused")
    add("--max-images", type=int, default=64, help="most images per request")
    add("--max-steps", type=int, default=1000, help="most steps per request")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load the models, serve until interrupted."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    with parser.naming_options(), tempfile.TemporaryDirectory(prefix="ddt-demo-") as folder:
        for name, highest in (("port", 65535), ("max_queue", 1000), ("max_images", 1000), ("max_steps", 10_000)):
            require(1 <= options[name] <= highest, name, options[name], f"1 to {highest}")
        _check_address(options.host, options.port)
        # gradio reads these when it is imported. The folder holds what the page shows.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        _reach_without_proxy("localhost", "127.0.0.1", "::1", options.host)
        try:
            from ddt_fast.demo.page import Demo, serve
        except ImportError as error:
            raise ValueError(f'the demo needs gradio ({error}); pip install ".[demo]" in the checkout') from error
        from ddt_fast.demo.requests import load_models
        from ddt_fast.device import choose_device
        from ddt_fast.threads import threads_for

        models = load_models(options.checkpoint, options.preset, choose_device(options.device), options.dtype)
        largest = max((pipe.transformer.ddt_config for pipe in models.values()), key=attrgetter("hidden_size"))
        demo = Demo(models, options.max_images, options.max_steps)
        try:
            where = {"server_name": options.host, "server_port": options.port, "share": options.share}
            with threads_for(largest, options.device):
                serve(demo, options.max_queue, **where)
        finally:
            demo.close()


def _reach_without_proxy(*hosts: str) -> None:
    """Add hosts to no_proxy: gradio asks its own page whether it is up, and a proxy cannot reach this machine."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, dict.fromkeys([*given.split(","), *hosts])))


def _check_address(host: str, port: int) -> None:
    """ValueError for an address that cannot be used: gradio would answer with a traceback."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot listen on `host` {host} `port` {port}: {error}") from error


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # Windows lacks SIGHUP; under nohup it stays ignored
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
            signal.signal(getattr(signal, name), interrupt)
    run_command(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is cleaned up; a thread that is still drawing would abort the interpreter's own end
