"""The demo's command answers mistakes in one line, a missing gradio among them."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from demo_cases import error_line


def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = error_line(capsys)
    assert line.startswith("error: the demo needs gradio (")
    assert line.endswith('; pip install ".[demo]" in the checkout')
    with ThreadPoolExecutor(1) as thread:  # which takes no signals
        assert thread.submit(error_line, capsys).result() == line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port is 0; allowed: 1 to 65535"),
        (["--port", "http"], "port"),
        (["--max-queue", "0"], "--max-queue is 0; allowed: 1 to 1000"),
        (["--max-images", "-1"], "--max-images is -1"),
        (["--preset", "xxl"], "xxl"),
        (["--dtype", "int8"], "int8"),
        (["--hots", "::1"], "hots"),
    ],
)
def test_wrong_options_are_one_line(capsys, arguments, message):
    line = error_line(capsys, *arguments)
    assert line.startswith("error: ")
    assert message in line
