"""Large jobs of the sample command as a user runs them: what they write, shared by processes, and refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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
from ddt_fast.model.weights import read_experiment, save_model
from ddt_fast.sampling_options import EMBEDDED_CHECKPOINT
from golden_data import relative_error
from sample_jobs import JOB, OUTPUTS, begin, drawn, error_line, sample, sample_command, small_autoencoder, without_ranks


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    without_ranks(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """JOB, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    sample(folder, *JOB)
    return folder


def test_the_file_is_balanced_mixed_and_says_what_is_in_it(whole):
    assert sorted(path.name for path in whole.iterdir()) == OUTPUTS
    with np.load(whole / "samples.npz") as saved:
        images, labels, seeds = saved["arr_0"], saved["labels"], saved["seeds"]
    assert images.shape == (123, 8, 8, 3)
    assert images.dtype == np.uint8
    assert sorted(np.bincount(labels).tolist()) == [12] * 7 + [13] * 3
    assert sorted(seeds.tolist()) == list(range(123))
    np.testing.assert_array_equal(labels, seeds % 10)
    runs = 1 + np.count_nonzero(np.diff(labels))
    assert runs > 100, "classes come in runs"
    np.testing.assert_array_equal(open_images(whole / "samples.npz"), images)
    for file in (whole / "images").iterdir():
        position, label, seed = (int(number) for number in re.findall(r"\d+", file.name))
        assert (labels[position], seeds[position]) == (label, seed)
        np.testing.assert_array_equal(np.asarray(Image.open(file)), images[position])
    record = json.loads((whole / "generation.json").read_text())
    assert record["settings"]["sampling"]["num_steps"] == 2
    assert record["network_evaluations"] == 3
    assert record["tflop_per_image"] > 0
    assert record["versions"]["torch"]
    assert [(maker["images"], maker["engine"]) for maker in record["made_with"]] == [(123, "eager")]
    assert record["made_with"][0]["img_per_second"] > 0


def test_the_grid_has_one_class_a_column(whole, tmp_path):
    with np.load(whole / "samples.npz") as saved:
        by_seed = saved["arr_0"][np.argsort(saved["seeds"])]
    grid = np.asarray(Image.open(whole / "grid.png"))
    cell_height, cell_width = grid.shape[0] // 10, grid.shape[1] // 10
    for seed in (0, 7, 13, 99):
        row, column = divmod(seed, 10)
        cell = grid[row * cell_height :, column * cell_width :][:64:8, :64:8]
        np.testing.assert_array_equal(cell, by_seed[seed])
    sample(tmp_path, "--num-images", "120", "--num-steps", "1", "--classes", "3", "1", "4")
    assert Image.open(tmp_path / "grid.png").width == grid.shape[1] // 10 * 9


@pytest.mark.parametrize("batch_size", ["1", "7", "123"])
def test_the_batch_size_changes_no_image(whole, tmp_path, batch_size):
    """On a CPU with one thread not a bit; elsewhere matrix products may round differently."""
    content = sample(tmp_path, "--num-images", "123", "--num-steps", "2", "--batch-size", batch_size)
    assert content == (whole / "samples.npz").read_bytes()


def test_an_image_is_that_of_its_seed_and_label_alone(whole, tmp_path):
    sample(tmp_path, "--num-steps", "2", "--seeds", "77", "5", "--classes", "7", "5")
    with np.load(whole / "samples.npz") as large, np.load(tmp_path / "samples.npz") as small:
        assert small["seeds"].tolist() == [77, 5]
        for image, seed in zip(small["arr_0"], small["seeds"], strict=True):
            np.testing.assert_array_equal(image, large["arr_0"][large["seeds"] == seed][0])


def test_two_processes_write_what_one_does(whole, tmp_path):
    command = [sys.executable, "-m", "ddt_fast.sample", *JOB, "--output-dir", str(tmp_path)]
    common = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, env={**common, "RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    said = [stdout.splitlines()[-1] for stdout, _ in outputs]
    assert sum("wrote images/, grid.png, samples.npz" in line for line in said) >= 1, said
    assert (tmp_path / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == OUTPUTS


def test_a_process_that_is_first_waits_for_nobody_and_a_later_call_ends_the_job(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    sample_command.main([*JOB, "--output-dir", str(tmp_path)])
    assert "rank 1 of 3: finished its shards; the last process to finish writes" in capsys.readouterr().out
    assert not (tmp_path / "samples.npz").exists()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    sizes = drawn(monkeypatch)
    assert sample(tmp_path, *JOB) == (whole / "samples.npz").read_bytes()
    assert sum(sizes) == 123 - 40
    assert "found 2 of 7 shards of 20 images; going on with the others" in capsys.readouterr().out


def test_kept_shards_are_the_samples(whole, tmp_path):
    sample(tmp_path, *JOB, "--keep-shards")
    (folder,) = tmp_path.glob("shards-*")
    content = json.loads((folder / "job.json").read_text())
    reopened = shards.ShardFolder(tmp_path, content["settings"], content["num_images"], None, 1)
    images = np.concatenate([reopened.read(shard)[0] for shard in range(reopened.num_shards)])
    np.testing.assert_array_equal(images, open_images(whole / "samples.npz"))


def test_on_images_sees_every_image_once_however_often_the_job_was_stopped(whole, tmp_path):
    def collect(*arguments: str) -> tuple[list[int], np.ndarray]:
        seen: list[tuple[np.ndarray, np.ndarray]] = []
        sample(tmp_path, *JOB, *arguments, on_images=lambda index, images: seen.append((index, images.copy())))
        indices = np.concatenate([index for index, _ in seen])
        return sorted(indices.tolist()), np.concatenate([images for _, images in seen])[np.argsort(indices)]

    begin(tmp_path, 3)
    for _ in range(2):  # gone on with; finished already
        indices, images = collect()
        assert indices == list(range(123))
        np.testing.assert_array_equal(images, open_images(whole / "samples.npz"))


def test_an_error_of_on_images_ends_the_job(tmp_path):
    def failing(index: np.ndarray, images: np.ndarray) -> None:
        raise ValueError("no such features")

    with pytest.raises(ValueError, match="no such features"):
        sample(tmp_path, *JOB, on_images=failing)


def test_published_ways_to_name_a_job(tmp_path):
    def labels_and_seeds(*arguments: str) -> list[tuple[int, int]]:
        sample(tmp_path, *arguments, "--num-steps", "1")
        with np.load(tmp_path / "samples.npz") as saved:
            return list(zip(saved["labels"].tolist(), saved["seeds"].tolist(), strict=True))

    assert labels_and_seeds("--seeds-per-class", "2", "--classes", "3", "8") == [(3, 0), (8, 1), (3, 2), (8, 3)]
    assert labels_and_seeds("--class-seeds", "9", "4", "--classes", "3", "8") == [(3, 9), (8, 9), (3, 4), (8, 4)]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    return small_autoencoder(tmp_path_factory.mktemp("vae"))


def test_latents_are_decoded_and_shards_of_another_decoder_refused(tmp_path, autoencoder, capsys):
    model, vae = tmp_path / "model", tmp_path / "vae"
    shutil.copytree(autoencoder, vae)
    digits = read_experiment(EMBEDDED_CHECKPOINT).model
    save_model(DDT(replace(digits, in_channels=4)), model, DataConfig("latents", 64, str(vae)), SamplingConfig())
    arguments = ["--checkpoint", str(model), "--num-steps", "2", "--dtype", "float32"]
    sample(tmp_path / "a", *arguments, *JOB[:2])
    begin(tmp_path / "b", 2, *arguments)
    assert sample(tmp_path / "b", *arguments, *JOB) == (tmp_path / "a" / "samples.npz").read_bytes()
    begin(tmp_path / "c", 2, *arguments)
    other = safetensors.torch.load_file(vae / "diffusion_pytorch_model.safetensors")
    other["decoder.conv_out.bias"] += 0.1
    safetensors.torch.save_file(other, vae / "diffusion_pytorch_model.safetensors")
    assert "(autoencoder_sha256 " in error_line(capsys, tmp_path / "c", *arguments, *JOB)


def test_the_number_of_latents_decoded_at_a_time_changes_no_image(autoencoder):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    single, several = (Decoder(autoencoder, torch.device("cpu"), batch_size=size)(latents) for size in (1, 3))
    assert single.shape == (5, 3, 64, 64)
    assert relative_error(several, single) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds-per-class", "0"], "--seeds-per-class is 0; allowed: a whole number, 1 or more"),
        (["--num-png", "-1"], "--num-png is -1; allowed: a whole number, 0 or more"),
        (["--shard-size", "0"], "--shard-size is 0; allowed: a whole number, 1 or more"),
        (["--seeds-per-class", "2", "--num-images", "20"], "--seeds-per-class and --num-images are both given"),
        (["--class-seeds", "2", "--seeds", "20"], "--seeds and --class-seeds are both given"),
        (["--class-seeds", "2", "--first-seed", "20"], "--class-seeds and --first-seed are both given"),
        (["--class-seeds", "-2"], "seed -2 does not exist"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    assert message in error_line(capsys, tmp_path, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_nonsense_of_the_launcher_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "environment variable RANK is 2; allowed: below WORLD_SIZE (2)" in error_line(capsys, tmp_path)
