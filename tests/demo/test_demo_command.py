"""The demo's command: mistakes are one line, and it serves on loopback until it is interrupted."""

import os
import socket
import subprocess
import sys
import urllib.request

import pytest

from ddt_fast.demo import __main__ as command
from demo_cases import free_port, values, wait_until
from sample_jobs import error_line


def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "ddt_fast.demo.page", raising=False)
    monkeypatch.delitem(sys.modules, "ddt_fast.demo.drawing", raising=False)
    line = error_line(capsys, command.main, [])
    assert line.startswith("error: the demo needs gradio (")
    assert line.endswith('; pip install ".[demo]" in the checkout')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port is 0; allowed: 1 to 65535"),
        (["--port", "http"], "port"),
        (["--max-queue", "0"], "--max-queue is 0; allowed: 1 to 1000"),
        (["--max-steps", "20000"], "--max-steps is 20000; allowed: 1 to 10000"),
        (["--preset", "xxl"], "xxl"),
        (["--dtype", "int8"], "int8"),
        (["--hots", "::1"], "--hots ::1; nearest: --host"),
    ],
)
def test_wrong_options_are_one_line(capsys, arguments, message):
    assert message in error_line(capsys, command.main, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere is no"),
        (["--checkpoint", "digits"], "--checkpoint names digits twice"),
        (["--checkpoint", __file__], "test_demo_command.py"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--host", "no such host"], "cannot listen on --host no such host --port"),
        (["--port", "{taken}"], "cannot listen on --host 127.0.0.1 --port {taken}: "),
    ],
)
def test_what_cannot_be_served_is_one_line(capsys, arguments, message):
    pytest.importorskip("gradio", reason='gradio is not installed: pip install ".[demo]" in the checkout')
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        line = error_line(capsys, command.main, [argument.format(taken=taken) for argument in arguments])
    assert message.format(taken=taken) in line


@pytest.mark.slow
def test_the_command_serves_on_loopback_until_it_is_ended_even_behind_a_proxy_and_while_drawing(tmp_path):
    gradio_client = pytest.importorskip("gradio_client", reason='pip install ".[demo]" in the checkout')
    port = free_port()
    proxy = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}
    with subprocess.Popen(
        [sys.executable, "-m", "ddt_fast.demo", "--port", str(port)],
        env=os.environ | {"TMPDIR": str(tmp_path)} | proxy,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        try:
            wait_until(lambda: run.poll() is not None or answers(port))
            with pytest.raises(ConnectionRefusedError):  # another address of this machine than loopback's usual one
                socket.create_connection(("127.0.0.2", port), timeout=5)
            client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
            job = client.submit(*values(num_images=64, num_steps=1000), api_name="/generate")
            wait_until(lambda: len(job.outputs()) > 0)
        finally:
            run.terminate()
            try:
                output, _ = run.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                run.kill()
                raise
    assert run.returncode in (0, 130), output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir() if "inductor" not in path.name] == [], "files were left"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, "localhost,127.0.0.1,::1,0.0.0.0"),
        ({"NO_PROXY": "intra.net, 127.0.0.1"}, "intra.net, 127.0.0.1,localhost,127.0.0.1,::1,0.0.0.0"),
        ({"no_proxy": "intra.net,localhost"}, "intra.net,localhost,127.0.0.1,::1,0.0.0.0"),
    ],
    ids=["nothing", "upper case", "lower case"],
)
def test_loopback_needs_no_proxy_beside_what_the_user_excepts(monkeypatch, given, kept):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, given.get(name, ""))
    command._reach_without_proxy("localhost", "127.0.0.1", "::1", "0.0.0.0")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == kept


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
            return "Decoupled Diffusion Transformer" in answer.read().decode()
    except OSError:
        return False
