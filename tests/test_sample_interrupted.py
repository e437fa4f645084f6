"""Large jobs of the sample command that are stopped, killed, changed, damaged or out of disk on the way."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ddt_fast.generation import finish
from sample_jobs import JOB, OUTPUTS, begin, drawn, error_line, sample, without_ranks


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    without_ranks(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """JOB, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    sample(folder, *JOB)
    return folder


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
    assert "the same command continues from them" in line
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
