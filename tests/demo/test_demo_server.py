"""The demo's server as any client meets it: hostile and mistaken ones, ones that vanish, more than it has room for."""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from ddt_fast.demo.requests import MAX_SEED, read_request
from ddt_fast.pipeline import DDTPipeline
from demo_cases import held, models, served, values, wait_until
from pipeline_cases import latent_folder

gradio = pytest.importorskip("gradio", reason='gradio is not installed: pip install ".[demo]" in the checkout')
gradio_client = pytest.importorskip("gradio_client")

import httpx  # noqa: E402

from ddt_fast.demo import drawing  # noqa: E402
from ddt_fast.demo.page import CONCURRENT, Demo  # noqa: E402


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The digits, and a saved pipeline of latents."""
    folder = tmp_path_factory.mktemp("latent")
    DDTPipeline.from_pretrained(latent_folder(folder)).save_pretrained(folder / "saved")
    loaded = models(folder / "saved")
    with served({"digits": loaded.pop("digits"), **loaded}, folder) as demo:
        yield demo


@pytest.fixture(scope="module")
def client(demo, tmp_path_factory):
    return gradio_client.Client(demo.page.local_url, verbose=False, download_files=tmp_path_factory.mktemp("files"))


def call(client, name="/generate", *more, **changes):
    return client.predict(*values(**changes), *more, api_name=name)


def images(gallery) -> np.ndarray:
    return np.stack([np.asarray(Image.open(item["image"])) for item in gallery["value"]])


@pytest.mark.slow
def test_every_model_answers_every_tab(client, demo, tmp_path):
    for name in demo.models:
        settings = {"model": name, "num_images": 2, "num_steps": 5, "seed": 3}
        asked = read_request(values(**settings), demo.models, demo.fields)
        _, drawn, _ = drawing.generate(asked, drawing.Report(), tmp_path)
        expected = np.stack([np.asarray(Image.open(path)) for path, _ in drawn["value"]])
        status, gallery, archive = call(client, **settings)
        assert "2 images in " in status
        assert "img/s" in status
        assert [item["caption"] for item in gallery["value"]] == CAPTIONS[name == "digits"]
        assert np.array_equal(images(gallery), expected)
        assert archive["value"].endswith("_seed_3.zip")
        status, table, fresh, kept, difference = call(client, "/compare", **settings | {"refresh_every": 4})
        assert "Refresh 4 is" in status
        assert "encoder runs" in table
        assert np.array_equal(images(fresh), images(gallery))
        assert images(kept).shape == images(difference).shape == images(fresh).shape
        status, states, predictions = call(client, "/trajectory", 3, **settings)
        assert "3 of 6 moments" in status
        assert images(states).shape == images(predictions).shape == (6, *expected.shape[1:])


CAPTIONS = (["class 0 · seed 3", "class 1 · seed 4"], ["0 · seed 3", "1 · seed 4"])
NAN = float("nan")
REFUSED = [
    ({"model": "/etc/passwd"}, "Model '/etc/passwd' is not available; allowed: digits, "),
    ({"model": ["digits"]}, "Model ['digits'] is not available"),
    ({"model": "x" * 10_000}, "Model 'xxxxxxxxxxxx...xxxxxxxxxxxxx' is not available"),
    ({"classes": ["unicorn"]}, "Class 'unicorn' is unknown"),
    ({"classes": ["<script>"]}, "Class '&lt;script&gt;' is unknown"),
    ({"classes": ["10"]}, "Class 10 does not exist; allowed: 0 to 9"),
    ({"classes": [3.5]}, "Class 3.5 is a float"),
    ({"classes": {"a": 1}}, "is a dict"),
    ({"classes": [True]}, "Class True is a bool"),
    ({"classes": ["3"] * 11}, "11 classes are chosen; allowed: up to 10"),
    ({"classes": ["9" * 5000]}, "A class name has 5000 characters; allowed: up to 100"),
    ({"num_images": 10**6}, "Images is 1000000; allowed: a whole number, 1 to 12"),
    ({"num_images": NAN}, "Images is nan"),
    ({"num_images": 10**400}, "Images is 1000"),
    ({"num_images": None}, "Images is empty"),
    ({"num_steps": 41}, "Steps is 41; allowed: a whole number, 1 to 40"),
    ({"guidance_scale": -1}, "CFG scale is -1; allowed: 0 to 20"),
    ({"guidance_scale": NAN}, "CFG scale is nan"),
    ({"guidance_low": -0.1}, "Guided from t is -0.1; allowed: 0 to 1"),
    ({"guidance_low": 0.8, "guidance_high": 0.3}, "Guidance_interval is (0.8, 0.3); allowed: "),
    ({"timeshift": 0}, "Timeshift is 0; allowed: 0.1 to 10"),
    ({"refresh_every": 0}, "Refresh K is 0; allowed: a whole number, 1 to 50"),
    ({"state_forecast": "cubic"}, "State_forecast is 'cubic'; allowed: hold, linear, quadratic"),
    ({"solver": "heun"}, "Solver is 'heun'; allowed: euler, lms, pec, sde"),
    ({"solver": "y" * 10_000}, "Solver is 'yyyy"),
    ({"order": 5}, "Order is 5; allowed: a whole number, 1 to 4"),
    ({"seed": "x"}, "Seed is 'x'"),
    ({"seed": 2**53}, "Seed is 9007199254740992"),
    ({"seed": MAX_SEED}, "The last of 4 seeds from 9007199254740991 is too large; allowed: up to 9007199254740991"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_wrong_values_are_refused_in_one_line(demo, changes, message):
    with pytest.raises(gradio.Error) as error:
        list(demo.answer(drawing.generate, 2, *values(**changes)))
    assert message in error.value.message
    assert "\n" not in error.value.message
    assert len(error.value.message) <= 300


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "message"), REFUSED[::10])
def test_over_the_wire_wrong_values_are_refused_too(demo, client, changes, message):
    """gradio's own client sends no NaN."""
    url = f"{demo.page.local_url}gradio_api/call/generate"
    body = json.dumps({"data": values(**changes)})
    event = httpx.post(url, content=body, headers={"Content-Type": "application/json"}).json()["event_id"]
    *_, name, data = httpx.get(f"{url}/{event}", timeout=60).text.strip().splitlines()
    assert name == "event: error"
    assert message in json.loads(data.removeprefix("data: "))["error"]
    with pytest.raises(gradio_client.exceptions.AppError):
        call(client, **{"num_images": 0})
    assert "4 images" in call(client)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("steps is 0"), "Steps is 0"),
        (MemoryError(), "Out of memory; ask for fewer images"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "Out of memory"),
        (KeyError("secret path"), "has not enabled verbose error reporting"),
    ],
)
def test_errors_are_told_and_the_next_request_is_served(client, monkeypatch, error, message):
    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "_sample", fails)
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            call(client)
    assert "4 images" in call(client)[0]


@pytest.mark.slow
def test_a_client_is_served_while_another_one_waits_for_its_model(client, demo):
    free, busy = demo.models
    other = gradio_client.Client(demo.page.local_url, verbose=False, download_files=False)
    with held(demo, busy):
        waiting = other.submit(*values(model=busy), api_name="/generate")
        wait_until(lambda: len(demo.reports) == 1)
        assert "4 images" in call(client, model=free)[0]
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


@pytest.mark.slow
def test_a_run_ends_with_a_client_that_vanishes(demo, client, monkeypatch):
    ended = threading.Event()

    def endless(_request, report, _text):
        try:
            while True:
                report("drawing", 1, 2)
                time.sleep(0.01)
        finally:
            ended.set()

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "_sample", endless)
        subprocess.run([sys.executable, "-c", GOES, demo.page.local_url, json.dumps(values())], check=True, timeout=60)
        assert ended.wait(timeout=60)
    assert "4 images" in call(client)[0]


@pytest.mark.slow
def test_a_full_queue_turns_requests_away_and_serves_the_others(client, demo):
    sent = [values(seed=100 * i) for i in range(CONCURRENT + 2)]
    with held(demo):
        jobs = []
        for count in range(1, CONCURRENT + 1):  # one by one: they too pass through the queue, which one of them fills
            jobs.append(client.submit(*sent[count - 1], api_name="/generate"))
            wait_until(lambda count=count: len(demo.reports) == count)
        jobs.append(client.submit(*sent[CONCURRENT], api_name="/generate"))
        wait_until(lambda: len(demo.page._queue) == 1)
        with pytest.raises(Exception, match="full"):
            client.predict(*sent[-1], api_name="/generate")
    for i, job in enumerate(jobs):
        captions = [picture["caption"] for picture in job.result(timeout=60)[1]["value"]]
        assert captions == [f"{k} · seed {100 * i + k}" for k in range(4)]


def test_closing_ends_the_run_and_lets_none_begin():
    demo, begun, freed = Demo(models(), 12, 40), [], []

    class Tensors:
        def __del__(self):
            freed.append(threading.current_thread())

    def endless(_request, report, _folder):
        tensors = Tensors()  # noqa: F841
        while True:
            report("working", 1, 2)
            begun.append(threading.current_thread())
            time.sleep(0.01)

    answers = [demo.answer(endless, 1, *values()) for _ in range(2)]
    next(answers[0])
    wait_until(lambda: begun)
    assert "waiting for the model" in next(answers[1])[0]
    drawn = len(begun)
    demo.close()
    assert len(begun) <= drawn + 1, "the second request began"
    assert not begun[0].is_alive()
    assert freed == [begun[0]] * 2, "gradio's threads, which nobody waits for, would free them"
    assert [list(answer) for answer in answers] == [[], []]
