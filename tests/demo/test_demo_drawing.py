"""What the demo draws: the sample command's images, honest comparisons, a trajectory."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ddt_fast import sample as sample_command
from ddt_fast.config import DataConfig, DDTConfig, SamplingConfig
from ddt_fast.generation.images import to_uint8
from ddt_fast.model.reference import DDT
from ddt_fast.model.weights import save_model
from ddt_fast.pipeline import DDTPipeline
from ddt_fast.sampling import SamplingPlan
from demo_cases import MAX_IMAGES, MAX_STEPS, models, values
from sample_jobs import small_autoencoder

pytest.importorskip("gradio", reason='gradio is not installed: pip install ".[demo]" in the checkout')

from ddt_fast.demo import drawing
from ddt_fast.demo.page import Demo
from ddt_fast.demo.requests import class_choices, read_request


@pytest.fixture(scope="module")
def demo():
    return Demo(models(), MAX_IMAGES, MAX_STEPS)


@pytest.fixture
def request_of(demo, monkeypatch):
    monkeypatch.setattr(drawing, "_TIMED_RUNS", 1)

    def read(*more, **changes):
        return read_request([*values(**changes), *more], demo.models, demo.fields)

    return read


def images(gallery) -> np.ndarray:
    """(N, H, W, 3), read from a gallery's files."""
    paths = [item[0] if isinstance(item, tuple) else item for item in gallery["value"]]
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def drawn(request, folder) -> np.ndarray:
    return images(drawing.generate(request, drawing.Report(), folder)[1])


def test_images_are_those_of_the_sample_command(request_of, tmp_path):
    arguments = ["--seeds", "5", "6", "7", "--classes", "2", "9", "--num-steps", "8", "--solver", "sde"]
    sample_command.main([*arguments, "--refresh-every", "3", "--output-dir", str(tmp_path / "command")])
    asked = request_of(seed=5, classes=["2", "9"], num_images=3, solver="sde", refresh_every=3)
    expected = np.load(tmp_path / "command" / "samples.npz")["arr_0"]
    np.testing.assert_array_equal(drawn(asked, tmp_path), expected)


def test_a_comparison_is_of_the_same_seeds_and_measures_the_difference(request_of, tmp_path):
    asked = request_of(refresh_every=4, state_forecast="linear", seed=3)
    status, table, *sides = drawing.compare(asked, drawing.Report(), tmp_path)
    fresh, kept, difference = map(images, sides)
    np.testing.assert_array_equal(fresh, drawn(request_of(seed=3), tmp_path))
    np.testing.assert_array_equal(kept, drawn(asked, tmp_path))
    distance = np.abs(kept.astype(float) - fresh)
    np.testing.assert_allclose(difference, distance * 255 / distance.max(), atol=0.51)
    samples = [drawing._sample(one, drawing.Report(), "")[0] for one in (request_of(seed=3), asked)]
    error = np.linalg.norm(samples[1] - samples[0]) / np.linalg.norm(samples[0])
    rows = dict(row.strip("| ").split(" | ")[::2] for row in table.splitlines()[2:])
    assert rows["relative L2 difference"] == f"**{error:.2g}**"
    assert int(rows["encoder runs"]) < int(rows["network evaluations"])
    assert f"is {rows['times as fast']} times as fast" in status
    assert "state linear" in table
    assert [side["label"] for side in sides[:2]] == ["Refresh 1", "Refresh 4"]


def test_a_comparison_without_a_difference_says_so(request_of, tmp_path):
    with pytest.raises(ValueError, match=r"refresh K is 1, .*allowed: 2 or more"):
        drawing.compare(request_of(), drawing.Report(), tmp_path)
    # One step has nothing to keep a state for.
    *_, difference = drawing.compare(request_of(num_steps=1, refresh_every=2), drawing.Report(), tmp_path)
    assert (difference["label"], images(difference).max()) == ("No difference", 0)


@pytest.mark.parametrize("frames", [2, 4, 12])
def test_a_trajectory_goes_from_noise_to_the_sample(request_of, tmp_path, frames):
    asked = request_of(frames, seed=11)
    status, states, predictions = drawing.trajectory(asked, drawing.Report(), tmp_path)
    count = min(frames, 9)
    assert status.startswith(f"{count} of 9 moments")
    assert states["columns"] == count
    assert [caption for _, caption in states["value"]][:: count - 1][:2] == ["t 0.00", "t 1.00"]
    states, predictions = (images(strip).reshape(4, count, 8, 8, 3) for strip in (states, predictions))
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(11 + i)) for i in range(4)])
    np.testing.assert_array_equal(states[:, 0], drawing.to_uint8(noise))
    end = drawn(asked, tmp_path)
    np.testing.assert_array_equal(states[:, -1], end)
    np.testing.assert_array_equal(predictions[:, -1], end)


def test_predictions_of_the_euler_solver_are_its_velocities_ends(request_of, tmp_path):
    asked = request_of(guidance_scale=1)
    seen = {}
    drawing._sample(asked, drawing.Report(), "", seen)
    _, _, predictions = drawing.trajectory(asked, drawing.Report(), tmp_path)
    t = SamplingPlan.from_config(asked.sampling).steps[4].t
    velocity, _ = asked.pipe.transformer.reference(seen[4], torch.full((4,), t), torch.tensor(asked.labels))
    expected = drawing.to_uint8(seen[4] + (1 - t) * velocity).astype(int)
    assert np.abs(images(predictions).reshape(4, 9, 8, 8, 3)[:, 4] - expected).max() <= 1


def test_files_hold_the_true_pixels_and_the_settings(request_of, tmp_path):
    asked = request_of(classes=["4"], num_images=2, seed=8)
    status, gallery, archive = drawing.generate(asked, drawing.Report(), tmp_path)
    assert status.startswith("2 images in ")
    names = ["00000_class_4_seed_8.png", "00001_class_4_seed_9.png"]
    assert gallery["value"] == [(tmp_path / names[0], "4 · seed 8"), (tmp_path / names[1], "4 · seed 9")]
    archive = zipfile.ZipFile(archive["value"])
    assert archive.namelist() == [*names, "samples.npz", "settings.json"]
    np.testing.assert_array_equal(np.asarray(Image.open(archive.open(names[1]))), images(gallery)[1])
    saved = np.load(archive.open("samples.npz"))
    np.testing.assert_array_equal(saved["arr_0"], images(gallery))
    assert (saved["labels"].tolist(), saved["seeds"].tolist()) == ([4, 4], [8, 9])
    settings = json.loads(archive.read("settings.json"))
    assert (settings["seeds"], settings["num_steps"], settings["solver"]) == ([8, 9], 8, "euler")


def test_names_that_are_not_utf8_are_escaped(request_of, tmp_path):
    asked = request_of(classes=["0", "1"], num_images=2)
    parts = asked.pipe.transformer, None, asked.pipe.scheduler
    named = DDTPipeline(*parts, id2label={0: "caf\udce9, bar"})
    _, gallery, _ = drawing.generate(replace(asked, pipe=named), drawing.Report(), tmp_path)
    assert [caption for _, caption in gallery["value"]] == ["caf\\udce9 · seed 0", "class 1 · seed 1"]
    assert class_choices(named)[:2] == [("0 · caf\\udce9, bar", "0"), ("1", "1")]


def test_latents_are_decoded_by_the_scale_of_their_data(request_of, tmp_path):
    """Not by the autoencoder's scaling factor."""
    data = DataConfig("latents", 32, small_autoencoder(tmp_path / "vae"), scaling_factor=0.7)
    save_model(DDT(DDTConfig(4, 2, 32, 2, 3, 2, 3)), tmp_path / "model", data, SamplingConfig())
    pipe = DDTPipeline.from_pretrained(tmp_path / "model")
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    shown = drawing._pixels(replace(request_of(), pipe=pipe), latents)
    expected = to_uint8(pipe.vae.decode(latents / 0.7).sample.detach())
    assert np.abs(shown.astype(int) - expected).max() <= 1


def test_a_run_reports_its_steps_and_ends_when_told_to(request_of, tmp_path):
    class Watched(drawing.Report):
        def __call__(self, text, done, total):
            super().__call__(text, done, total)
            seen.append((text, done, total))
            if stop_at == done:
                self.stop.set()

    seen, stop_at = [], None
    drawing.generate(request_of(num_steps=40), Watched(), tmp_path)
    assert seen == [("drawing", done, 40) for done in range(41)]
    seen, stop_at = [], 3
    for tab in (drawing.generate, drawing.compare, drawing.trajectory):
        with pytest.raises(drawing.Stopped):
            tab(request_of(num_steps=40, refresh_every=2), Watched(), tmp_path)
    assert max(done for _, done, _ in seen) == 3


def test_a_request_holds_what_the_fields_say(request_of):
    fields = {"guidance_scale": 2, "refresh_every": 4, "state_forecast": "linear", "solver": "lms", "order": 3}
    asked = request_of(
        classes=["3", "8"], num_images=3.0, seed=7, guidance_low=0.25, guidance_high=0.9, timeshift=2, **fields
    )
    assert (asked.labels, asked.seeds) == ((3, 8, 3), (7, 8, 9))
    own = request_of().pipe.scheduler.sampling_config
    expected = replace(own, num_steps=8, guidance_interval=(0.25, 0.9), timeshift=2.0, **fields)
    assert asked.sampling == expected
    assert type(asked.sampling.guidance_scale) is float
    for everything in ([], None, ""):
        assert request_of(num_images=12, classes=everything).labels == (*range(10), 0, 1)
