"""Jobs of the sample command: what they write, whichever processes share them, and however often they are stopped,
killed, changed, damaged or out of disk on the way."""

import errno
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
from ddt_fast.generation import finish, shards
from ddt_fast.generation.folder import JobFolder
from ddt_fast.generation.npz import open_images
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT, read_experiment
from ddt_fast.model.weights import save_model
from golden_data import relative_error
from sample_jobs import JOB, OUTPUTS, as_rank, begin, drawn, files_up_to, sample, sample_error, small_autoencoder, whole


def expected() -> bytes:
    return (whole() / "samples.npz").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


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
    assert sample(tmp_path, *JOB) == expected()
    assert sum(sizes) == 123 - 40


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


def test_a_flag_that_is_not_given_leaves_the_checkpoints_own_setting(tmp_path):
    model = DDT(read_experiment(EMBEDDED_CHECKPOINT).model)
    save_model(model, tmp_path / "model", DataConfig(), SamplingConfig(num_steps=1, cuda_graphs=True))
    with pytest.warns(UserWarning, match="cuda_graphs is set, but the model is on cpu"):
        sample(tmp_path / "out", "--checkpoint", str(tmp_path / "model"), "--device", "cpu", "--num-images", "1")


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "count", "images", "steps", "folders"), [("random", "4", 200, 2, 4), ("renames", "6", 30, 1, 12)]
)
def test_kill_9_at_random_moments_and_at_every_rename_changes_no_byte(tmp_path, mode, count, images, steps, folders):
    script = Path(__file__).parent / "generation" / "killed_jobs.py"
    job = ["--num-images", str(images), "--num-steps", str(steps), "--shard-size", "20", "--batch-size", "10"]
    command = [sys.executable, str(script), str(tmp_path), mode, count, *job]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + (tmp_path / "log.txt").read_text()
    trials = list(tmp_path.glob("trial*"))
    assert len(trials) == folders
    if mode == "renames":
        assert result.stdout.count("killed") == folders, "a job has fewer renames now: lower the count"
    for folder in trials:
        assert names(folder) == OUTPUTS
        assert len(list((folder / "images").iterdir())) == images
        for name in ("samples.npz", "grid.png"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_stopped_job_is_continued(tmp_path, monkeypatch, capsys):
    begin(tmp_path, 3)
    sizes = drawn(monkeypatch)
    assert sample(tmp_path, *JOB) == expected()
    assert sum(sizes) == 123 - 60
    output = capsys.readouterr()
    assert "found 3 of 7 shards of 20 images; continuing with the others" in output.out
    assert re.search(r"eager, float32, attention \w+: 100%.*img/s", output.err)


def test_jobs_of_earlier_versions_are_found(tmp_path):
    """The fingerprint of a job's settings names its shards: it must never change."""
    (file, *_) = begin(tmp_path, 1, "--device", "cpu", "--dtype", "float32", "--num-steps", "2")
    assert file.parent.name == "shards-62a61f58aefa"
    assert json.loads((file.parent / "job.json").read_text())["settings"].keys() == {
        *("num_images", "classes", "seeds", "order", "image_size", "model", "weights_sha256", "dtype", "quantize"),
        *("sampling", "autoencoder_sha256"),
    }


def test_another_batch_size_continues_the_shards_and_says_what_that_means(tmp_path, capsys):
    begin(tmp_path, 2)
    assert sample(tmp_path, *JOB[:4], "--batch-size", "16") == expected()
    said = capsys.readouterr().out
    assert "the shards found were made with batch_size 10, now 16: images may differ by rounding" in said
    record = json.loads((tmp_path / "generation.json").read_text())
    assert [(maker["batch_size"], maker["images"]) for maker in record["made_with"]] == [(10, 40), (16, 83)]


@pytest.mark.slow
def test_shards_of_other_settings_are_refused_unless_overwrite(tmp_path, capsys):
    files = begin(tmp_path, 2)
    for more, message in (
        (["--guidance-scale", "3"], "sampling.guidance_scale 1.5, now 3.0"),
        (["--num-images", "124"], "num_images 123, now 124"),
        (["--first-seed", "4"], 'seeds "0 and up", now "4 and up"'),
        (["--classes", "4"], 'classes "all", now [4]'),
        (["--dtype", "bfloat16"], 'dtype "float32", now "bfloat16"'),
    ):
        line = sample_error(capsys, tmp_path, *JOB, *more)
        assert message in line
        assert "holds 2 finished shards of a job with other settings" in line
        assert "or set --overwrite to drop them" in line
    assert "with 20 images per shard, now 30; leave --shard-size out" in sample_error(
        capsys, tmp_path, *JOB, "--shard-size", "30"
    )
    assert all(file.exists() for file in files)
    sample(tmp_path, *JOB, "--classes", "4", "--overwrite")
    assert names(tmp_path) == OUTPUTS


@pytest.mark.slow
def test_a_finished_job_is_drawn_again_only_with_overwrite(tmp_path, monkeypatch, capsys):
    first = sample(tmp_path, *JOB)
    sizes = drawn(monkeypatch)
    assert sample(tmp_path, *JOB) == first
    assert "holds these samples already" in capsys.readouterr().out
    sample(tmp_path, *JOB, "--num-png", "5")
    assert sizes == []
    assert len(list((tmp_path / "images").iterdir())) == 5
    sample(tmp_path, *JOB, "--overwrite")
    assert sum(sizes) == 123
    line = sample_error(capsys, tmp_path, *JOB, "--num-steps", "2")
    assert "holds finished samples with other settings (sampling.num_steps 1, now 2); choose another" in line
    assert (tmp_path / "samples.npz").read_bytes() == first
    assert sample(tmp_path, *JOB, "--num-steps", "2", "--overwrite") != first
    sample(tmp_path, "--num-images", "2", "--num-steps", "1", "--overwrite")
    assert names(tmp_path) == OUTPUTS
    assert len(list((tmp_path / "images").iterdir())) == 2


@pytest.mark.parametrize("name", ["samples.npz", "grid.png"])
def test_the_users_own_files_are_replaced_only_with_overwrite(tmp_path, capsys, name):
    tmp_path.joinpath(name).write_bytes(b"mine")
    line = sample_error(capsys, tmp_path, *JOB)
    assert f"{name} would be replaced, but there is no generation.json" in line
    assert "or set --overwrite to replace it" in line
    assert tmp_path.joinpath(name).read_bytes() == b"mine"
    assert sample(tmp_path, *JOB, "--overwrite") == expected()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_shard_is_found_and_made_again(tmp_path, monkeypatch, capsys, damage):
    file = begin(tmp_path, 3)[1]
    if damage == "flipped":
        flip(file)
    else:
        file.write_bytes(file.read_bytes()[: -5 if damage == "truncated" else 0])
    sizes = drawn(monkeypatch)
    assert sample(tmp_path, *JOB) == expected()
    assert sum(sizes) == 123 - 40
    error = capsys.readouterr().err
    assert re.search(r"warning: .*shard-00001-of-00007.safetensors is damaged: .*; making it again", error)


def test_a_shard_of_another_process_damaged_at_the_merge_is_named_and_removed(tmp_path, monkeypatch, capsys):
    flip(begin(tmp_path, 3)[1])
    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "_is_whole", lambda self, shard: self.shards.file(shard).exists())
        line = sample_error(capsys, tmp_path, *JOB)
    assert "shard-00001-of-00007.safetensors is damaged" in line
    assert "finished shards are kept, and the same command" in line
    assert sample(tmp_path, *JOB) == expected()


def test_a_full_disk_while_a_shard_is_written_loses_nothing(tmp_path, capsys):
    files = begin(tmp_path, 3)
    with files_up_to(2048):
        line = sample_error(capsys, tmp_path, *JOB)
    assert "shard-00003-of-00007.safetensors could not be written: File too large; finished shards are kept" in line
    assert names(files[0].parent) == ["job.json", *(file.name for file in files)]
    assert sample(tmp_path, *JOB) == expected()


@pytest.mark.slow
def test_a_full_disk_at_the_end_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    first = sample(tmp_path, *JOB, "--num-steps", "2")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != "generation.json"}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for function in ("write_npz", "labelled_grid", "json_text"):
        with monkeypatch.context() as patch:
            patch.setattr(finish, function, full)
            line = sample_error(capsys, tmp_path, *JOB, "--overwrite")
        assert "samples.npz could not be written: No space left on device; finished shards are kept" in line
        (folder,) = tmp_path.glob("shards-*")
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path != folder} == before
        assert (tmp_path / "samples.npz").read_bytes() == first
    sizes = drawn(monkeypatch)
    assert sample(tmp_path, *JOB) == expected()
    assert sizes == []


def test_what_a_killed_merge_left_is_replaced_and_what_is_the_users_is_not(tmp_path):
    begin(tmp_path, 3)
    tmp_path.joinpath(".images.abcd_123").mkdir()
    left = ("samples.npz", ".samples.123.npz", ".images.abcd_123/00001_class_1_seed_1.png")
    for name in (*left, ".samples.mine.npz", "notes.txt"):
        tmp_path.joinpath(name).touch()
    assert sample(tmp_path, *JOB) == expected()
    assert names(tmp_path) == sorted([*OUTPUTS, ".samples.mine.npz", "notes.txt"])
