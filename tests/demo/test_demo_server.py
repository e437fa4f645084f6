"""The demo as its command serves it, and as any client meets it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddt_fast.pipeline import DDTPipeline
from ddt_fast.webdemo import drawing
from ddt_fast.webdemo.models import load_models
from demo_cases import embedded, error_line, fields, no_report, request
from pipeline_cases import latent_folder

gradio = pytest.importorskip("gradio", reason='gradio is not installed: pip install ".[demo]" in the checkout')
gradio_client = pytest.importorskip("gradio_client")

from ddt_fast.webdemo.page import CONCURRENT  # noqa: E402
from demo_server import drawing_threads, free_port, served, wait_until  # noqa: E402


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere is not a local folder"),
        (["--checkpoint", "digits"], "--checkpoint names digits twice"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--host", "no such host"], "no such host"),
        (["--port", "{taken}"], "{taken}"),
    ],
)
def test_what_cannot_be_served_is_one_line(capsys, arguments, message):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        line = error_line(capsys, *(argument.format(taken=taken) for argument in arguments))
    assert line.startswith("error: ")
    assert message.format(taken=taken) in line


@pytest.mark.parametrize(
    ("number", "drawing"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGHUP, False)], ids=str
)
def test_the_command_serves_on_loopback_until_interrupted(tmp_path, number, drawing):
    port = free_port()
    command = [sys.executable, "-m", "ddt_fast.demo", "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background jobs are started deaf to interrupts, and so are their children.
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)],
    ) as run:
        try:
            page = wait_for(f"http://127.0.0.1:{port}/", run)
            assert "Decoupled Diffusion Transformer" in page
            with pytest.raises(ConnectionRefusedError):  # another address of this machine than loopback's usual one
                socket.create_connection(("127.0.0.2", port), timeout=5)
            if drawing:
                client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
                job = client.submit(*fields(num_images=64, num_steps=1000).values(), api_name="/generate")
                wait_until(lambda: len(job.outputs()) > 0)
        finally:
            run.send_signal(number)
            try:
                output, _ = run.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                run.kill()
                raise
    assert run.returncode in (0, 130), output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir() if "inductor" not in path.name] == [], "files were left"


def wait_for(address: str, run: subprocess.Popen) -> str:
    for _ in range(600):
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return answer.read().decode()
        except OSError:
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.2)
    raise AssertionError("the page did not come")


@pytest.fixture(scope="module")
def model():
    return embedded()


@pytest.fixture(scope="module")
def latent_models(tmp_path_factory):
    """One model twice: as a run's model folder, and as a saved pipeline."""
    folder = tmp_path_factory.mktemp("latent")
    names = [str(latent_folder(folder)), str(folder / "saved")]
    DDTPipeline.from_pretrained(names[0]).save_pretrained(names[1])
    return load_models(names, None, torch.device("cpu"), "auto")[:2]


@pytest.fixture(scope="module")
def page(model, latent_models, tmp_path_factory):
    with served([model, *latent_models], tmp_path_factory.mktemp("gradio"), max_queue=1) as page:
        yield page


@pytest.fixture
def client(page, tmp_path):
    return gradio_client.Client(page.local_url, verbose=False, download_files=tmp_path)


def call(client, name="/generate", *more, **changes):
    return client.predict(*fields(**changes).values(), *more, api_name=name)


def test_generate_gives_files(client):
    status, gallery, archive = call(client, seed=4)
    assert "4 images" in status
    assert "img/s" in status
    assert [picture["caption"] for picture in gallery["value"]] == [f"{i} · seed {4 + i}" for i in range(4)]
    assert archive["value"].endswith(".zip")


def test_compare_and_trajectory_answer(client):
    status, table, *_, fresh, kept, difference = call(client, "/compare", refresh_every=4)
    assert "Refresh 4" in status
    assert "encoder runs" in table
    assert len(fresh["value"]) == len(kept["value"]) == len(difference["value"]) == 4
    status, states, predictions = call(client, "/trajectory", 5, num_images=2)
    assert "5 of 9 moments" in status
    assert len(states["value"]) == len(predictions["value"]) == 10


def pixels(gallery):
    return np.stack([np.asarray(Image.open(picture["image"])) for picture in gallery["value"]])


def test_models_of_latents_draw_their_pictures(client, latent_models):
    for model in latent_models:
        settings = {"num_images": 2, "num_steps": 5, "seed": 3}
        expected = drawing.draw(request(model, **settings), no_report).images
        assert expected.shape == (2, 64, 64, 3)
        status, gallery, archive = call(client, model=model.name, **settings)
        assert "2 images" in status
        assert np.array_equal(pixels(gallery), expected)
        assert zipfile.is_zipfile(archive["value"])
        answer = call(client, "/compare", model=model.name, refresh_every=3, **settings)
        assert "Refresh 3" in answer[0]
        assert np.array_equal(pixels(answer[-3]), expected)
        status, states, predictions = call(client, "/trajectory", 3, model=model.name, **settings)
        assert "3 of 6 moments" in status
        assert pixels(states).shape == pixels(predictions).shape == (6, 64, 64, 3)
        assert "Class 99 does not exist" in call(client, model=model.name, classes=["99"])[0]


def test_a_client_is_served_while_another_one_waits_for_its_model(page, client, latent_models):
    busy, free = latent_models
    other = gradio_client.Client(page.local_url, verbose=False, download_files=False)
    with busy.lock:
        waiting = other.submit(*fields(model=busy.name).values(), api_name="/generate")
        wait_until(lambda: drawing_threads() == 1)
        assert "4 images" in call(client, model=free.name)[0]
        assert not waiting.done()
    assert "4 images" in waiting.result(timeout=60)[0]


GOES = """
import os, sys, time, json, gradio_client
client = gradio_client.Client(sys.argv[1], verbose=False, download_files=False)
job = client.submit(*json.loads(sys.argv[2]), api_name="/generate")
while not job.outputs():
    time.sleep(0.02)
os._exit(0)
"""


def test_work_ends_with_a_client_that_disappears(page, client, monkeypatch):
    def endless(_request, report):
        while True:
            report("drawing", 1, 2)
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "draw", endless)
        values = json.dumps(list(fields().values()))
        subprocess.run([sys.executable, "-c", GOES, page.local_url, values], check=True, timeout=60)
        wait_until(lambda: drawing_threads() == 0)
    assert "4 images" in call(client)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 10**6}, "Images is 1000000; allowed: a whole number, 1 to 12"),
        ({"num_images": 0}, "Images is 0"),
        ({"num_steps": 10**9}, "Steps is 1000000000"),
        ({"classes": ["unicorn"]}, "is unknown"),
        ({"classes": [[1]]}, "is a list"),
        ({"seed": -1}, "Seed is -1"),
        ({"order": {}}, "Order is {}"),
        ({"seed": "x"}, "Seed is &#x27;x&#x27;"),
        ({"guidance_low": 0.9, "guidance_high": 0.1}, "Guidance interval is (0.9, 0.1)"),
    ],
)
def test_wrong_requests_are_answered_and_the_next_is_served(client, changes, message):
    answer = call(client, **changes)[0]
    assert "ddt-error" in answer
    assert message in answer
    assert "4 images" in call(client)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": -5},
        {"refresh_every": 1000},
        {"solver": "heun"},
        {"model": "no"},
    ],
)
def test_what_a_component_cannot_hold_is_refused_and_the_next_is_served(client, changes):
    with pytest.raises(gradio_client.exceptions.AppError):
        call(client, **changes)
    assert "4 images" in call(client)[0]


def test_a_full_queue_turns_requests_away_and_serves_the_others(client, page, model):
    values = [list(fields(seed=100 * i).values()) for i in range(CONCURRENT + 2)]
    with model.lock:
        jobs = []
        for i in range(CONCURRENT):  # one by one: they too pass through the queue, which one of them fills
            jobs.append(client.submit(*values[i], api_name="/generate"))
            wait_until(lambda count=i + 1: drawing_threads() == count)
        jobs.append(client.submit(*values[CONCURRENT], api_name="/generate"))
        wait_until(lambda: len(page._queue) == 1)
        with pytest.raises(Exception, match="full"):
            client.predict(*values[-1], api_name="/generate")
    for i, job in enumerate(jobs):
        captions = [picture["caption"] for picture in job.result(timeout=60)[1]["value"]]
        assert captions == [f"{k} · seed {100 * i + k}" for k in range(4)]
