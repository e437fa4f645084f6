"""Jobs of the sample command: what they write, whichever processes share them."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from ddt_fast.autoencoder import Decoder
from ddt_fast.config import DataConfig, SamplingConfig
from ddt_fast.generation import shards
from ddt_fast.generation.npz import open_images
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT, read_experiment
from ddt_fast.model.weights import save_model
from golden_data import relative_error
from sample_jobs import (
    JOB,
    OUTPUTS,
    as_rank,
    begin,
    drawn,
    sample,
    sample_error,
    small_autoencoder,
    whole,
    without_ranks,
)


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    without_ranks(monkeypatch)
    whole()  # drawn before a test counts what is drawn


def test_the_file_is_balanced_mixed_and_says_what_is_in_it():
    assert sorted(path.name for path in whole().iterdir()) == OUTPUTS
    with np.load(whole() / "samples.npz") as saved:
        images, labels, seeds = saved["arr_0"], saved["labels"], saved["seeds"]
    assert images.shape == (123, 8, 8, 3)
    assert images.dtype == np.uint8
    assert sorted(np.bincount(labels).tolist()) == [12] * 7 + [13] * 3
    assert sorted(seeds.tolist()) == list(range(123))
    np.testing.assert_array_equal(labels, seeds % 10)
    runs = 1 + np.count_nonzero(np.diff(labels))
    assert runs > 100, "classes come in runs"
    np.testing.assert_array_equal(open_images(whole() / "samples.npz"), images)
    for file in (whole() / "images").iterdir():
        position, label, seed = (int(number) for number in re.findall(r"\d+", file.name))
        assert (labels[position], seeds[position]) == (label, seed)
        np.testing.assert_array_equal(np.asarray(Image.open(file)), images[position])
    record = json.loads((whole() / "generation.json").read_text())
    assert record["settings"]["sampling"]["num_steps"] == 1
    assert record["network_evaluations"] == 1
    assert record["tflop_per_image"] > 0
    assert record["versions"]["torch"]
    assert [(maker["images"], maker["engine"]) for maker in record["made_with"]] == [(123, "eager")]
    assert record["made_with"][0]["img_per_second"] > 0


def test_the_grid_has_one_class_a_column(tmp_path):
    with np.load(whole() / "samples.npz") as saved:
        by_seed = saved["arr_0"][np.argsort(saved["seeds"])]
    grid = np.asarray(Image.open(whole() / "grid.png"))
    cell_height, cell_width = grid.shape[0] // 10, grid.shape[1] // 10
    for seed in (0, 7, 13, 99):
        row, column = divmod(seed, 10)
        cell = grid[row * cell_height :, column * cell_width :][:64:8, :64:8]
        np.testing.assert_array_equal(cell, by_seed[seed])
    sample(tmp_path, "--num-images", "120", "--num-steps", "1", "--classes", "3", "1", "4", "--num-png", "0")
    assert Image.open(tmp_path / "grid.png").width == grid.shape[1] // 10 * 9


@pytest.mark.slow
def test_an_image_depends_on_its_seed_and_label_alone(tmp_path):
    """Not on the batch: on a CPU with one thread not a bit; elsewhere matrix products may round differently."""
    job = ["--num-images", "24", "--num-steps", "4", "--num-png", "0"]
    content = sample(tmp_path / "24", *job)
    for batch_size in ("1", "7"):
        assert sample(tmp_path / batch_size, *job, "--batch-size", batch_size) == content
    sample(tmp_path / "two", "--num-steps", "4", "--seeds", "17", "5", "--classes", "7", "5")
    images = open_images(tmp_path / "24" / "samples.npz")
    np.testing.assert_array_equal(open_images(tmp_path / "two" / "samples.npz"), images[[17, 5]])


@pytest.mark.slow
def test_a_process_that_is_done_waits_for_no_other_and_a_later_call_ends_the_job(tmp_path, monkeypatch, capsys):
    as_rank(monkeypatch, 1, 3, tmp_path, *JOB)
    assert "rank 1 of 3: finished its shards; the last process to finish writes" in capsys.readouterr().out
    assert not (tmp_path / "samples.npz").exists()
    sizes = drawn(monkeypatch)
    assert sample(tmp_path, *JOB) == (whole() / "samples.npz").read_bytes()
    assert sum(sizes) == 123 - 40
    assert "found 2 of 7 shards of 20 images; continuing with the others" in capsys.readouterr().out


def test_kept_shards_are_the_samples(tmp_path):
    sample(tmp_path, *JOB, "--keep-shards")
    (folder,) = tmp_path.glob("shards-*")
    content = json.loads((folder / "job.json").read_text())
    reopened = shards.ShardFolder(tmp_path, content["settings"], content["num_images"], None, 1)
    images = np.concatenate([reopened.read(shard)[0] for shard in range(reopened.num_shards)])
    np.testing.assert_array_equal(images, open_images(whole() / "samples.npz"))


def test_on_images_sees_every_image_once_however_often_the_job_was_stopped(tmp_path):
    begin(tmp_path, 3)
    for _ in range(2):  # continued; finished already
        seen: list[tuple[np.ndarray, np.ndarray]] = []
        sample(tmp_path, *JOB, on_images=lambda *pair, seen=seen: seen.append((pair[0], pair[1].copy())))
        indices = np.concatenate([index for index, _ in seen])
        images = np.concatenate([images for _, images in seen])[np.argsort(indices)]
        assert sorted(indices.tolist()) == list(range(123))
        np.testing.assert_array_equal(images, open_images(whole() / "samples.npz"))


@pytest.mark.parametrize(
    ("arguments", "pairs"),
    [
        (["--seeds-per-class", "2"], [(3, 0), (8, 1), (3, 2), (8, 3)]),
        (["--class-seeds", "9", "4"], [(3, 9), (8, 9), (3, 4), (8, 4)]),
    ],
)
def test_published_ways_to_name_a_job(tmp_path, arguments, pairs):
    sample(tmp_path, *arguments, "--num-steps", "1", "--classes", "3", "8")
    with np.load(tmp_path / "samples.npz") as saved:
        assert list(zip(saved["labels"].tolist(), saved["seeds"].tolist(), strict=True)) == pairs


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    return small_autoencoder(tmp_path_factory.mktemp("vae"))


def latent_model(folder, autoencoder: str) -> list[str]:
    """Arguments that draw 12 images of a latent model, in shards of 4."""
    digits = replace(read_experiment(EMBEDDED_CHECKPOINT).model, in_channels=4)
    save_model(DDT(digits), folder, DataConfig("latents", 64, autoencoder), SamplingConfig(num_steps=1))
    job = ["--num-images", "12", "--num-steps", "1", "--shard-size", "4", "--batch-size", "2", "--dtype", "float32"]
    return ["--checkpoint", str(folder), *job]


@pytest.mark.slow
def test_latents_are_decoded_and_shards_of_another_decoder_refused(tmp_path, autoencoder, capsys):
    shutil.copytree(autoencoder, tmp_path / "vae")
    job = latent_model(tmp_path / "model", str(tmp_path / "vae"))
    content = sample(tmp_path / "a", *job)
    images = open_images(tmp_path / "a" / "samples.npz")
    assert images.shape == (12, 64, 64, 3)
    assert images.std() > 0
    assert Image.open(tmp_path / "a" / "images" / "00002_class_2_seed_2.png").size == (64, 64)
    for name in "bc":
        begin(tmp_path / name, 2, *job)
    assert sample(tmp_path / "b", *job) == content
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    other = safetensors.torch.load_file(weights)
    other["decoder.conv_out.bias"] += 0.1
    safetensors.torch.save_file(other, weights)
    assert "(autoencoder_sha256 " in sample_error(capsys, tmp_path / "c", *job)


def test_a_missing_autoencoder_is_one_error(tmp_path, capsys):
    job = latent_model(tmp_path / "model", str(tmp_path / "no-vae"))
    assert "no-vae could not be loaded" in sample_error(capsys, tmp_path / "out", *job)


def test_the_number_of_latents_decoded_at_a_time_changes_no_image(autoencoder):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    single, several = (Decoder(autoencoder, torch.device("cpu"), batch_size=size)(latents) for size in (1, 3))
    assert single.shape == (5, 3, 64, 64)
    assert relative_error(several, single) < 1e-5


def test_nonsense_of_the_launcher_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "environment variable RANK is 2; allowed: below WORLD_SIZE (2)" in sample_error(capsys, tmp_path)
