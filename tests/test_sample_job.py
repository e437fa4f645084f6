"""Large jobs of the sample command as a user runs them: shared, killed, gone on with, changed, out of disk."""

import errno
import importlib
import json
import os
import re
import resource
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
from ddt_fast.command import run_command
from ddt_fast.config import DataConfig, SamplingConfig
from ddt_fast.generation import finish, shards
from ddt_fast.generation.npz import open_images
from ddt_fast.model.reference import DDT
from ddt_fast.model.weights import read_experiment, save_model
from ddt_fast.sampling.engine import Sampler
from ddt_fast.sampling_options import EMBEDDED_CHECKPOINT
from golden_data import relative_error

sample_command = importlib.import_module("ddt_fast.sample")

JOB = ["--num-images", "123", "--num-steps", "2", "--shard-size", "20", "--batch-size", "10"]
OUTPUTS = ["generation.json", "grid.png", "images", "samples.npz"]


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def sample(folder: Path, *arguments: str, **more) -> bytes:
    sample_command.main([*arguments, "--output-dir", str(folder)], **more)
    return (folder / "samples.npz").read_bytes()


def error_line(capsys, folder: Path, *arguments: str) -> str:
    """Run a command that must fail; return the last line of stderr, where it says why."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: sample(folder, *arguments))
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def begin(folder: Path, count: int, *arguments: str) -> list[Path]:
    """Stop a job of JOB once it has `count` shards; return their files."""
    write = shards.ShardFolder.write

    def interrupted(self, shard, *rest):
        if shard >= count:
            raise KeyboardInterrupt
        write(self, shard, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardFolder, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(folder, *JOB, *arguments)
    files = sorted(folder.glob("shards-*/shard-*.safetensors"))
    assert len(files) == count
    return files


def drawn(monkeypatch) -> list[int]:
    """A list that gets the size of every batch that is drawn from now on."""
    sizes: list[int] = []
    call = Sampler.__call__

    def counted(self, noise, *rest, **more):
        sizes.append(len(noise))
        return call(self, noise, *rest, **more)

    monkeypatch.setattr(Sampler, "__call__", counted)
    return sizes


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """JOB, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    sample_command.main([*JOB, "--output-dir", str(folder)])
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


def trials(tmp_path: Path, mode: str, count: int, *arguments: str) -> list[Path]:
    script = Path(__file__).parent / "generation" / "killed_jobs.py"
    command = [sys.executable, str(script), str(tmp_path), mode, str(count), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    log = tmp_path / "log.txt"
    assert result.returncode == 0, result.stderr + log.read_text()
    (tmp_path / "said").write_text(result.stdout)
    return sorted(path for path in tmp_path.iterdir() if path.name.startswith("trial"))


def test_kill_9_at_random_moments_changes_no_byte(tmp_path):
    arguments = ["--num-images", "300", "--num-steps", "4", "--shard-size", "20", "--batch-size", "10"]
    folders = trials(tmp_path, "random", 6, *arguments)
    assert len(folders) == 6
    for folder in folders:
        assert (folder / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()
        assert (folder / "grid.png").read_bytes() == (tmp_path / "whole" / "grid.png").read_bytes()
        assert sorted(path.name for path in folder.iterdir()) == OUTPUTS


def test_kill_9_at_every_rename_changes_no_byte(tmp_path):
    arguments = ["--num-images", "30", "--num-steps", "1", "--shard-size", "20", "--batch-size", "10"]
    folders = trials(tmp_path, "renames", 6, *arguments)
    assert len(folders) == 12
    assert (tmp_path / "said").read_text().count("killed") == 12, "a job has fewer renames now: lower the count"
    for folder in folders:
        assert (folder / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()
        assert len(list((folder / "images").iterdir())) == 30
        assert sorted(path.name for path in folder.iterdir()) == OUTPUTS


def test_a_stopped_job_goes_on_by_itself(whole, tmp_path, monkeypatch, capsys):
    begin(tmp_path, 3)
    sizes = drawn(monkeypatch)
    assert sample(tmp_path, *JOB) == (whole / "samples.npz").read_bytes()
    assert sum(sizes) == 123 - 60
    output = capsys.readouterr()
    assert "found 3 of 7 shards of 20 images; going on with the others" in output.out
    assert re.search(r"eager, float32, attention \w+: 100%.*img/s", output.err)


def test_another_batch_size_goes_on_in_the_shards_there_are_and_says_what_that_means(whole, tmp_path, capsys):
    begin(tmp_path, 2)
    content = sample(tmp_path, "--num-images", "123", "--num-steps", "2", "--batch-size", "16")
    assert content == (whole / "samples.npz").read_bytes()
    said = capsys.readouterr().out
    assert "found shards were made with batch_size 10, now 16: images agree but for rounding" in said
    record = json.loads((tmp_path / "generation.json").read_text())
    assert [(maker["batch_size"], maker["images"]) for maker in record["made_with"]] == [(10, 40), (16, 83)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--guidance-scale", "3"], "sampling.guidance_scale 1.5, now 3.0"),
        (["--num-images", "124"], "num_images 123, now 124"),
        (["--first-seed", "4"], 'seeds "0 and up", now "4 and up"'),
        (["--classes", "4"], 'classes "all", now [4]'),
        (["--dtype", "bfloat16"], 'dtype "float32", now "bfloat16"'),
    ],
)
def test_shards_of_other_settings_are_refused_unless_overwrite(tmp_path, capsys, more, message):
    files = begin(tmp_path, 2)
    line = error_line(capsys, tmp_path, *JOB, *more)
    assert message in line
    assert "holds 2 finished shards of a job with other settings" in line
    assert "--overwrite" in line
    assert all(file.exists() for file in files)
    sample(tmp_path, *JOB, *more, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == OUTPUTS


def test_another_shard_size_is_refused(tmp_path, capsys):
    begin(tmp_path, 2)
    line = error_line(capsys, tmp_path, *JOB, "--shard-size", "30")
    assert "was begun with 20 images a shard, now 30; leave the shard size out" in line


def test_a_finished_job_is_not_done_again_unless_overwrite(whole, tmp_path, monkeypatch, capsys):
    first = sample(tmp_path, *JOB)
    sizes = drawn(monkeypatch)
    assert sample(tmp_path, *JOB) == first
    assert sizes == []
    assert "holds these samples already" in capsys.readouterr().out
    sample(tmp_path, *JOB, "--num-png", "5")
    assert sizes == []
    assert len(list((tmp_path / "images").iterdir())) == 5
    sample(tmp_path, *JOB, "--overwrite")
    assert sum(sizes) == 123


def test_finished_samples_that_took_long_are_not_replaced_unasked(tmp_path, capsys):
    first = sample(tmp_path, *JOB)
    record = json.loads((tmp_path / "generation.json").read_text())
    (tmp_path / "generation.json").write_text(json.dumps({**record, "process_seconds": 7200}))
    line = error_line(capsys, tmp_path, *JOB, "--num-steps", "3")
    assert "finished samples of other settings (sampling.num_steps 2, now 3) that took 120 minutes" in line
    assert (tmp_path / "samples.npz").read_bytes() == first
    assert sample(tmp_path, *JOB, "--num-steps", "3", "--overwrite") != first


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_shard_is_found_and_made_again(whole, tmp_path, monkeypatch, capsys, damage):
    file = begin(tmp_path, 3)[1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes({"truncated": content[:-5], "flipped": content, "emptied": b""}[damage])
    sizes = drawn(monkeypatch)
    assert sample(tmp_path, *JOB) == (whole / "samples.npz").read_bytes()
    assert sum(sizes) == 123 - 40
    error = capsys.readouterr().err
    assert re.search(r"warning: .*shard-00001-of-00007.safetensors is damaged: .*; it is made again", error)


def test_a_shard_of_another_process_damaged_at_the_merge_is_named_and_removed(whole, tmp_path, monkeypatch, capsys):
    file = begin(tmp_path, 3)[1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(
            "ddt_fast.generation.job.Generation._is_whole", lambda self, shard: self.shards.file(shard).exists()
        )
        line = error_line(capsys, tmp_path, *JOB)
    assert "shard-00001-of-00007.safetensors is damaged" in line
    assert "the same command goes on from them" in line
    assert sample(tmp_path, *JOB) == (whole / "samples.npz").read_bytes()


def test_a_full_disk_while_a_shard_is_written_loses_nothing(whole, tmp_path, capsys):
    begin(tmp_path, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        line = error_line(capsys, tmp_path, *JOB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "shard-00003-of-00007.safetensors could not be written: File too large; finished shards are kept" in line
    (folder,) = tmp_path.glob("shards-*")
    assert sorted(path.name for path in folder.iterdir() if path.name != "job.json") == [
        f"shard-{i:05d}-of-00007.safetensors" for i in range(3)
    ]
    assert sample(tmp_path, *JOB) == (whole / "samples.npz").read_bytes()


@pytest.mark.parametrize("function", ["write_npz", "labelled_grid", "_write_record"])
def test_a_full_disk_at_the_end_leaves_nothing_half_written(whole, tmp_path, monkeypatch, capsys, function):
    first = sample(tmp_path, *JOB, "--num-steps", "1")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(finish, function, full)
        line = error_line(capsys, tmp_path, *JOB)
    assert "samples.npz could not be written: No space left on device; finished shards are kept" in line
    (folder,) = tmp_path.glob("shards-*")
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path != folder} == before
    assert (tmp_path / "samples.npz").read_bytes() == first
    sizes = drawn(monkeypatch)
    assert sample(tmp_path, *JOB) == (whole / "samples.npz").read_bytes()
    assert sizes == []


def test_what_a_killed_merge_left_is_removed_and_what_is_the_users_is_not(tmp_path):
    tmp_path.joinpath(".samples.123.npz").write_bytes(b"half")
    tmp_path.joinpath(".images.abcd_123").mkdir()
    tmp_path.joinpath(".images.abcd_123", "00001_class_1_seed_1.png").touch()
    tmp_path.joinpath(".samples.mine.npz").touch()
    tmp_path.joinpath("notes.txt").touch()
    sample(tmp_path, *JOB)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*OUTPUTS, ".samples.mine.npz", "notes.txt"])


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
    """A small AutoencoderKL with random weights, 8 pixels a latent as the published one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)
    return str(folder)


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
        (["--seeds-per-class", "0"], "--seeds-per-class is 0; allowed: 1 or more"),
        (["--num-png", "-1"], "--num-png is -1; allowed: 0 or more"),
        (["--shard-size", "0"], "--shard-size is 0; allowed: 1 or more"),
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
