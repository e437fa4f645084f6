"""Writing caches: what is in them, and that no stop loses, repeats or changes anything."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import latent_cases
import pytest
import torch
from latent_cases import MeanPoolEncoder, contents, encode, make_images
from safetensors.torch import load_file

from ddt_fast.data import latent_cache
from ddt_fast.data.image_folder import read_image


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """26 images of 3 classes, two of them broken."""
    root = make_images(tmp_path_factory.mktemp("images") / "images", {"a": 7, "b": 9, "c": 10})
    (root / "a" / "002.png").write_bytes((root / "a" / "002.png").read_bytes()[:300])
    (root / "c" / "000.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    """What a run that nothing stops writes."""
    output = tmp_path_factory.mktemp("unbroken") / "cache"
    encode(images, output)
    return output


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cache_holds_every_readable_image(images, tmp_path, dtype, capsys):
    manifest = encode(images, tmp_path / "cache", dtype=dtype, num_workers=1)
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text()) == manifest
    assert manifest["count"] == 24
    assert manifest["class_counts"] == [6, 9, 9]
    assert [(image["index"], image["file"]) for image in manifest["unreadable"]] == [
        (2, "a/002.png"),
        (16, "c/000.png"),
    ]
    reported = capsys.readouterr().err
    assert "a/002.png is left out" in reported
    assert "c/000.png is left out: no image" in reported
    shards = [load_file(tmp_path / "cache" / shard["file"]) for shard in manifest["shards"]]
    assert [len(shard["labels"]) for shard in shards] == [7, 8, 7, 2]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    assert whole["index"].tolist() == [i for i in range(26) if i not in (2, 16)]
    assert whole["labels"].tolist() == [0] * 6 + [1] * 9 + [2] * 9
    image = read_image(images / "b" / "001.png", 16)  # the 7th readable one
    for suffix, pixels in (("", image), ("_flip", image.flip(-1))):
        mean, logvar = MeanPoolEncoder()(pixels[None])
        wanted = latent_cache.storage_dtype(dtype)
        torch.testing.assert_close(whole[f"mean{suffix}"][7], mean[0].to(wanted), rtol=0, atol=0)
        torch.testing.assert_close(whole[f"logvar{suffix}"][7], logvar[0].to(wanted), rtol=0, atol=0)


def test_flips_are_left_out_unless_asked_for(images, tmp_path):
    manifest = encode(images, tmp_path, flips=False)
    assert set(load_file(tmp_path / manifest["shards"][0]["file"])) == {"mean", "logvar", "labels", "index"}


def test_the_number_of_processes_leaves_no_trace(images, unbroken, tmp_path):
    assert encode(images, tmp_path, rank=1, world_size=3) is None
    assert encode(images, tmp_path, rank=2, world_size=3) is None
    assert not (tmp_path / "manifest.json").exists()
    assert encode(images, tmp_path, rank=0, world_size=3) is not None
    assert contents(tmp_path) == contents(unbroken)


def test_kill_9_at_random_moments_changes_nothing(images, unbroken, tmp_path):
    moments, killed = random.Random(os.environ.get("KILL_SEED")), 0
    trials = int(os.environ.get("KILL_TRIALS", "3"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for trial in range(trials):
        wanted = trial % 3  # finished shards, of four, to be killed after
        cache = tmp_path / f"cache{trial // 3}"
        command = [sys.executable, str(Path(latent_cases.__file__)), str(images), str(cache)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        before = _finished(cache)
        while len(_finished(cache)) < wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1) if wanted else moments.uniform(0.5, 2))
        os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert before.items() <= _finished(cache).items(), "a finished shard was lost or made again"
        if wanted == 2 or trial == trials - 1:
            if (cache / "settings.json").exists():
                (cache / ".latents-00000-of-00004.1.safetensors").write_bytes(b"half")
            encode(images, cache, MeanPoolEncoder())
            assert contents(cache) == contents(unbroken)
    assert killed


def _finished(folder: Path) -> dict[str, int]:
    """Finished shards and when they were written."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("latents-*.safetensors")}


def test_finished_shards_are_not_made_again(images, unbroken, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(unbroken, cache)
    encoder = MeanPoolEncoder()
    encode(images, cache, encoder)
    assert encoder.encoded == 0
    (cache / "latents-00002-of-00004.safetensors").unlink()
    (cache / "manifest.json").unlink()
    encode(images, cache, encoder)
    assert encoder.encoded == 2 * 7
    assert contents(cache) == contents(unbroken)


def test_damaged_shards_are_found_and_made_again(images, unbroken, tmp_path, capsys):
    cache = tmp_path / "cache"
    shutil.copytree(unbroken, cache)
    cut = cache / "latents-00001-of-00004.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    changed = cache / "latents-00003-of-00004.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\xff")
    encode(images, cache)
    assert cut.read_bytes() == (unbroken / cut.name).read_bytes()
    assert changed.read_bytes() != (unbroken / changed.name).read_bytes()
    encode(images, cache, verify=True)
    assert contents(cache) == contents(unbroken)
    assert f"{changed} does not have the checksum on record" in capsys.readouterr().err


def test_other_settings_are_refused_by_name(images, unbroken, tmp_path):
    before = contents(unbroken)
    with pytest.raises(ValueError, match=r"dtype float16, now bfloat16; flips True, now False; take"):
        encode(images, unbroken, dtype="bfloat16", flips=False)
    fewer = tmp_path / "images"
    shutil.copytree(images, fewer)
    (fewer / "c" / "003.png").unlink()
    with pytest.raises(ValueError, match="num_images 26, now 25; images_sha256"):
        encode(fewer, unbroken)
    assert contents(unbroken) == before


def test_a_folder_that_holds_something_else_is_refused(images, unbroken, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis.tex"):
        encode(images, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(unbroken / "latents-00000-of-00004.safetensors", foreign)
    with pytest.raises(ValueError, match=r"holds latents-00000-of-00004.safetensors"):
        encode(images, foreign)


def test_a_full_disk_loses_nothing(images, unbroken, tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 7:  # settings, a record and its shard, each with the folder, then the second shard's record
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"latents-00001-of-00004.safetensors could not be written: No space left"):
        encode(images, tmp_path)
    assert sorted(contents(tmp_path)) == [
        "latents-00000-of-00004.json",
        "latents-00000-of-00004.safetensors",
        "settings.json",
    ]
    encoder = MeanPoolEncoder()
    encode(images, tmp_path, encoder)
    assert encoder.encoded == 2 * (24 - 7)
    assert contents(tmp_path) == contents(unbroken)


def test_latents_that_do_not_fit_are_refused(images, tmp_path):
    class Loud(MeanPoolEncoder):
        def __call__(self, images):
            mean, logvar = super().__call__(images)
            return mean * 1e6, logvar

    with pytest.raises(ValueError, match="do not fit float16; take bfloat16"):
        encode(images, tmp_path / "a", Loud())
    assert encode(images, tmp_path / "b", Loud(), dtype="bfloat16")["count"] == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "float32"}, "allowed: float16, bfloat16"), ({"shard_size": 0}, "shard size is 0")],
)
def test_wrong_settings_are_refused(images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        encode(images, tmp_path, **options)
