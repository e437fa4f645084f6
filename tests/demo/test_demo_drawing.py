"""What the demo draws: the sample command's images, honest comparisons, a trajectory; one request at a time a model."""

import importlib
import json
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import ddt_fast.webdemo.running as running
from ddt_fast.sampling import SamplingPlan
from ddt_fast.webdemo import drawing, texts
from ddt_fast.webdemo.downloads import captions, image_names, write_pngs, write_zip
from ddt_fast.webdemo.models import load_models
from ddt_fast.webdemo.running import Finished, Progress, in_background
from demo_cases import embedded, no_report, request, result
from pipeline_cases import latent_folder

sample_command = importlib.import_module("ddt_fast.sample")


@pytest.fixture(scope="module")
def model():
    return embedded()


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    checkpoint = str(latent_folder(tmp_path_factory.mktemp("latent")))
    return load_models([checkpoint], None, torch.device("cpu"), "auto")[0]


def test_images_are_those_of_the_sample_command(model, tmp_path):
    arguments = ["--seeds", "5", "6", "7", "--classes", "2", "9", "--num-steps", "8", "--solver", "sde"]
    sample_command.main([*arguments, "--refresh-every", "3", "--output-dir", str(tmp_path)])
    asked = request(model, seed=5, classes=["2", "9"], num_images=3, solver="sde", refresh_every=3)
    drawn = drawing.draw(asked, no_report)
    np.testing.assert_array_equal(drawn.images, np.load(tmp_path / "samples.npz")["arr_0"])


def test_every_setting_reaches_the_images(model):
    plain = {"guidance_scale": 3, "refresh_every": 2, "solver": "lms"}
    changes = [
        {},
        *({name: value} for name, value in (("classes", ["5"]), ("num_steps", 9), ("guidance_scale", 5))),
        *({name: value} for name, value in (("guidance_low", 0.6), ("guidance_high", 0.7), ("refresh_every", 4))),
        *({name: value} for name, value in (("seed", 9), ("state_forecast", "linear"), ("solver", "euler"))),
        *({name: value} for name, value in (("order", 4), ("timeshift", 2))),
    ]
    images = [drawing.draw(request(model, **plain | change), no_report).images.tobytes() for change in changes]
    assert len(set(images)) == len(changes)


def test_latents_become_pictures(latent_model):
    drawn = drawing.draw(request(latent_model), no_report)
    assert drawn.images.shape == (4, 64, 64, 3)
    assert drawn.images.std() > 0
    followed = drawing.trajectory(request(latent_model, num_images=1), 3, no_report)
    assert followed.predictions.shape == (3, 1, 64, 64, 3)


def test_a_comparison_is_of_the_same_seeds_and_measures_the_difference(model):
    asked = request(model, refresh_every=4, state_forecast="linear", seed=3)
    compared = drawing.compare(asked, no_report)
    fresh = drawing.draw(request(model, seed=3), no_report)
    kept = drawing.draw(asked, no_report)
    np.testing.assert_array_equal(compared.fresh.images, fresh.images)
    np.testing.assert_array_equal(compared.kept.images, kept.images)
    error = np.linalg.norm(kept.samples - fresh.samples) / np.linalg.norm(fresh.samples)
    assert compared.relative_l2 == pytest.approx(float(error), rel=1e-5)
    distance = np.abs(kept.images.astype(float) - fresh.images)
    np.testing.assert_allclose(compared.difference, distance * 255 / distance.max(), atol=0.51)
    assert compared.speedup == compared.fresh.seconds / compared.kept.seconds
    assert "forecast linearly" in texts.comparison(compared)


def test_a_comparison_without_a_difference_says_so(model):
    with pytest.raises(ValueError, match=r"refresh K is 1, .*allowed: 2 or more"):
        drawing.compare(request(model), no_report)
    # One step has nothing to keep a state for.
    compared = drawing.compare(request(model, num_steps=1, refresh_every=2), no_report)
    assert (compared.relative_l2, compared.gain, compared.difference.max()) == (0, 1, 0)
    assert "none" in texts.side_titles(compared)[2]


@pytest.mark.parametrize("frames", [2, 4, 12])
def test_a_trajectory_goes_from_noise_to_the_sample(model, frames):
    asked = request(model, seed=11)
    followed = drawing.trajectory(asked, frames, no_report)
    drawn = drawing.draw(asked, no_report)
    assert (followed.steps[0], followed.steps[-1], followed.times[0], followed.times[-1]) == (0, 8, 0, 1)
    assert len(followed.steps) == min(frames, 9)
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(11 + i)) for i in range(4)])
    np.testing.assert_array_equal(followed.states[0], model.pixels(noise))
    np.testing.assert_array_equal(followed.states[-1], drawn.images)
    np.testing.assert_array_equal(followed.predictions[-1], drawn.images)


def test_predictions_of_the_euler_solver_are_its_velocities_ends(model):
    asked = request(model, guidance_scale=1)
    seen = []
    asked.model.pipe(
        asked.labels,
        **{"num_inference_steps": 8, "guidance_scale": 1, "solver": "euler", "last_step": 0},
        generator=[torch.Generator().manual_seed(seed) for seed in asked.seeds],
        output_type="latent",
        callback_on_step_end=lambda _pipe, _i, _t, tensors: seen.append(tensors["latents"]),
    )
    followed = drawing.trajectory(asked, 9, no_report)
    t = SamplingPlan.from_config(asked.sampling).steps[4].t
    velocity, _ = model.pipe.transformer.reference(seen[3], torch.full((4,), t), torch.tensor(asked.labels))
    expected = model.pixels(seen[3] + (1 - t) * velocity).astype(int)
    assert np.abs(followed.predictions[4] - expected).max() <= 1


def test_files_hold_the_true_pixels_and_the_settings(model, tmp_path):
    drawn = drawing.draw(request(model, classes=["4"], num_images=2, seed=8), no_report)
    assert image_names(drawn) == ["00000_class_4_seed_8.png", "00001_class_4_seed_9.png"]
    assert captions(drawn) == ["4 · seed 8", "4 · seed 9"]
    paths = write_pngs(drawn.images, image_names(drawn), tmp_path)
    archive = zipfile.ZipFile(write_zip(drawn, paths, tmp_path))
    assert archive.namelist() == [*image_names(drawn), "samples.npz", "settings.json"]
    np.testing.assert_array_equal(np.asarray(Image.open(archive.open(image_names(drawn)[1]))), drawn.images[1])
    saved = np.load(archive.open("samples.npz"))
    np.testing.assert_array_equal(saved["arr_0"], drawn.images)
    assert (saved["labels"].tolist(), saved["seeds"].tolist()) == ([4, 4], [8, 9])
    settings = json.loads(archive.read("settings.json"))
    assert (settings["seeds"], settings["num_steps"], settings["solver"]) == ([8, 9], 8, "euler")


def test_progress_is_told_and_shown(model, monkeypatch):
    monkeypatch.setattr(running, "REPORT_SECONDS", 0)
    updates = list(in_background(model, lambda report: drawing.draw(request(model, num_steps=40), report)))
    steps = [update for update in updates if isinstance(update, Progress) and update.total]
    assert steps, "no progress was told"
    assert [update.done for update in steps] == sorted({update.done for update in steps})
    assert all(update.total == 40 for update in steps)
    assert isinstance(updates[-1], Finished)
    shown = texts.progress(Progress("drawing", 10, 40, 2.0), 4)
    assert "step 10 of 40" in shown
    assert "0.5 img/s" in shown, "a quarter of 4 images in 2 seconds"


def test_two_requests_take_turns_and_get_their_own_images(model):
    asked = [request(model, seed=seed) for seed in (1, 50)]
    alone = [drawing.draw(one, no_report).images for one in asked]
    results = [None, None]

    def serve(i):
        results[i] = result(in_background(model, lambda report: drawing.draw(asked[i], report)))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for drawn, expected in zip(results, alone, strict=True):
        np.testing.assert_array_equal(drawn.images, expected)


def test_who_waits_is_told_so(model):
    with model.lock:
        updates = in_background(model, lambda report: drawing.draw(request(model), report))
        assert "waiting" in next(updates).text
    assert len(result(updates).images) == 4


def test_closing_ends_the_work_and_frees_the_model(model, monkeypatch):
    monkeypatch.setattr(running, "REPORT_SECONDS", 0)
    stopped = threading.Event()

    def endless(report):
        try:
            while True:
                report("working", 1, 2)
                time.sleep(0.001)
        finally:
            stopped.set()

    updates = in_background(model, endless)
    assert next(updates).text == "working"
    updates.close()
    assert stopped.wait(timeout=20)
    assert model.lock.acquire(timeout=20)
    model.lock.release()


def test_closing_ends_the_wait_for_a_model(model):
    begun = threading.Event()
    with model.lock:
        updates = in_background(model, lambda _report: begun.set())
        next(updates)
        updates.close()
        before = time.monotonic()
        while any(thread.name == "draw" for thread in threading.enumerate()):
            assert time.monotonic() - before < 20
            time.sleep(0.01)
    assert not begun.is_set()


def test_the_end_of_all_work_lets_none_begin(model, monkeypatch):
    monkeypatch.setattr(running, "REPORT_SECONDS", 0)
    begun = []

    def endless(report):
        begun.append(1)
        while True:
            report("working", 1, 2)
            time.sleep(0.5)  # while it ends, the other one asks for the model many times

    work = [in_background(model, endless) for _ in range(2)]
    assert next(work[0]).text == "working"
    assert "waiting" in next(work[1]).text
    running.end_work()
    assert begun == [1]
    assert not any(thread.name == "draw" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("steps is 0"), "steps is 0"),
        (MemoryError(), "out of memory; ask for fewer images"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (KeyError("secret path"), "the server met an error, which its log shows"),
    ],
)
def test_errors_become_messages_and_free_the_model(model, capsys, error, message):
    def fails(_report):
        raise error

    with pytest.raises(ValueError, match=message):
        list(in_background(model, fails))
    assert ("Traceback" in capsys.readouterr().err) == (type(error) is KeyError)
    assert not model.lock.locked()


def test_messages_are_escaped():
    assert "<script>" not in texts.error("class '<script>' is unknown")
