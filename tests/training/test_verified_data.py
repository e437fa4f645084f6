"""Shards of another checksum are found before training starts, and those that were compared are not read again."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny_runs import CPU, latents, start

from ddt_fast.data import verification
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.verification import verify_together
from ddt_fast.training.loop import train
from ddt_fast.training.parallel import patient_group, process_group


@pytest.fixture
def cache(latent_cache, tmp_path):
    """A copy of the cache, three shards, without what runs on the original left in it."""
    folder = tmp_path / "latents"
    shutil.copytree(latent_cache, folder, ignore=shutil.ignore_patterns("verified.json"))
    return folder


@pytest.fixture
def read(monkeypatch):
    """Names of the shards whose checksums are computed."""
    names, original = [], verification.file_sha256
    monkeypatch.setattr(verification, "file_sha256", lambda file: (names.append(file.name), original(file))[1])
    return names


def damage(shard):
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_wrong_checksum_is_refused_before_anything_is_written_unless_verify_is_off(cache, tmp_path):
    damage(cache / "latents-00001-of-00003.safetensors")
    experiment = latents(cache, 1)
    with pytest.raises(ValueError, match=r"00001-of-00003\.safetensors does not have the checksum in .*manif"):
        train(experiment, tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()
    assert not (cache / "verified.json").exists()
    train(replace(experiment, data=replace(experiment.data, verify=False)), tmp_path / "run", CPU)


@pytest.mark.slow
def test_what_another_process_finds_stops_all(cache, tmp_path):
    damage(cache / "latents-00001-of-00003.safetensors")
    output = start(latents(cache, 1, batch_size=8), tmp_path / "run", processes=2).finish(code=2)
    assert output.count("latents-00001-of-00003.safetensors does not have the checksum") == 2


@pytest.fixture
def verify(cache):
    """Verifies the cache, opened anew, as a run does before it trains."""
    with process_group(CPU):
        group = patient_group()
        yield lambda: verify_together(LatentDataset(cache), group)


def test_shards_are_compared_once_and_again_when_they_change(cache, read, verify, capsys):
    verify()
    assert sorted(read) == [f"latents-0000{shard}-of-00003.safetensors" for shard in range(3)]
    assert "verified 0.00 GB of" in capsys.readouterr().err
    read.clear()
    verify()
    assert read == []
    changed = cache / "latents-00002-of-00003.safetensors"
    changed.write_bytes(changed.read_bytes())
    verify()
    assert read == [changed.name]
    record = json.loads((cache / "verified.json").read_text())
    assert record[changed.name]["modified_ns"] == changed.stat().st_mtime_ns
    damage(changed)
    with pytest.raises(ValueError, match="does not have the checksum"):
        verify()


def test_a_cache_that_cannot_be_written_to_is_compared_every_time(read, verify, monkeypatch, capsys):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(verification, "write_json", refuse)
    for _ in range(2):
        verify()
    assert len(read) == 6
    assert "verified.json could not be written (Permission denied), so the next run" in capsys.readouterr().err


def test_a_damaged_record_is_refused(cache, read, verify):
    for content in ('{"latents', "[]"):
        (cache / "verified.json").write_text(content)
        with pytest.raises(ValueError, match=r"verified\.json .*; remove it to compare all checksums again"):
            verify()
    (cache / "verified.json").write_text('{"latents-00000-of-00003.safetensors": 3, "other": null}')
    verify()
    assert len(read) == 3
