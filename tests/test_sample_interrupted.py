"""Jobs of the sample command that are stopped, killed, changed, damaged or out of disk on the way."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddt_fast.generation import finish
from ddt_fast.generation.folder import JobFolder
from sample_jobs import JOB, OUTPUTS, begin, drawn, files_up_to, sample, sample_error, whole, without_ranks


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    without_ranks(monkeypatch)
    whole()  # drawn before a test counts what is drawn


def expected() -> bytes:
    return (whole() / "samples.npz").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


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


def test_samples_of_a_merge_that_was_killed_are_replaced(tmp_path):
    begin(tmp_path, 3)
    tmp_path.joinpath("samples.npz").write_bytes(b"ours")
    assert sample(tmp_path, *JOB) == expected()


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


def test_what_a_killed_merge_left_is_removed_and_what_is_the_users_is_not(tmp_path):
    tmp_path.joinpath(".images.abcd_123").mkdir()
    for name in (".samples.123.npz", ".images.abcd_123/00001_class_1_seed_1.png", ".samples.mine.npz", "notes.txt"):
        tmp_path.joinpath(name).touch()
    sample(tmp_path, *JOB)
    assert names(tmp_path) == sorted([*OUTPUTS, ".samples.mine.npz", "notes.txt"])
