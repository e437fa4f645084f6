"""Writing caches: what is in them, and that no stop loses, repeats or changes anything."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import latent_cases
import numpy as np
import pytest
import torch
from latent_cases import MeanPoolEncoder, PatchMeanFeatures, contents, encode, make_images
from safetensors.torch import load_file

from ddt_fast.data import latent_cache
from ddt_fast.data.image_folder import read_image
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.ranks import Ranks


def encode_all(images: Path, output: Path, encoder: MeanPoolEncoder | None = None, **options: object) -> dict | None:
    """As the session's cache was made."""
    return encode(images, output, encoder, repa_encoder=PatchMeanFeatures(), **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cache_holds_every_readable_image(images, tmp_path, dtype, capsys):
    manifest = encode_all(images, tmp_path / "cache", dtype=dtype, num_workers=1)
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text()) == manifest
    assert (manifest["count"], manifest["class_counts"]) == (24, [6, 9, 9])
    broken = [(image["index"], image["file"]) for image in manifest["unreadable"]]
    assert broken == [(2, "a/002.png"), (16, "c/000.png")]
    settings = manifest["settings"]
    assert (settings["repa_encoder"], settings["repa_encoder_sha256"]) == ("patch means", "none")
    assert settings["feature_shape"] == [16, 3]
    reported = capsys.readouterr().err
    assert "a/002.png is left out" in reported
    assert "c/000.png is left out: not an image" in reported
    shards = [load_file(tmp_path / "cache" / shard["file"]) for shard in manifest["shards"]]
    assert [len(shard["labels"]) for shard in shards] == [7, 8, 7, 2]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    assert whole["index"].tolist() == [i for i in range(26) if i not in (2, 16)]
    assert whole["labels"].tolist() == [0] * 6 + [1] * 9 + [2] * 9
    image = read_image(images / "b" / "001.png", 16)  # the 7th readable one
    stored = latent_cache.storage_dtype(dtype)
    for suffix, pixels in (("", image), ("_flip", image.flip(-1))):
        mean, logvar = MeanPoolEncoder()(pixels[None])
        expected = {"mean": mean, "logvar": logvar, "features": PatchMeanFeatures()(pixels[None])}
        for name, tensor in expected.items():
            torch.testing.assert_close(whole[name + suffix][7], tensor[0].to(stored), rtol=0, atol=0)


def test_flips_and_features_are_left_out_by_default(images, tmp_path):
    manifest = encode(images, tmp_path, flips=False)
    assert set(load_file(tmp_path / manifest["shards"][0]["file"])) == {"mean", "logvar", "labels", "index"}


def test_the_number_of_processes_leaves_no_trace(images, unbroken, tmp_path):
    assert encode_all(images, tmp_path, ranks=Ranks(1, 3)) is None
    assert encode_all(images, tmp_path, ranks=Ranks(2, 3)) is None
    assert not (tmp_path / "manifest.json").exists()
    assert encode_all(images, tmp_path, ranks=Ranks(0, 3)) is not None
    assert contents(tmp_path) == contents(unbroken)


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(images, unbroken, tmp_path):
    moments, killed = random.Random(os.environ.get("KILL_SEED")), 0
    trials = int(os.environ.get("KILL_TRIALS", "3"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for trial in range(trials):
        needed = trial % 3  # finished shards, of four, to be killed after
        cache = tmp_path / f"cache{trial // 3}"
        command = [sys.executable, str(Path(latent_cases.__file__)), str(images), str(cache)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        before = _finished(cache)
        while len(_finished(cache)) < needed and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1) if needed else moments.uniform(0.5, 2))
        with contextlib.suppress(ProcessLookupError):  # it may have ended just before
            os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert before.items() <= _finished(cache).items(), "a finished shard was lost or made again"
        if needed == 2 or trial == trials - 1:
            if (cache / "settings.json").exists():
                (cache / ".latents-00000-of-00004.1.safetensors").write_bytes(b"half")
            encode_all(images, cache)
            assert contents(cache) == contents(unbroken)
    assert killed


def _finished(folder: Path) -> dict[str, int]:
    """Finished shards and when they were written."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("latents-*.safetensors")}


def test_finished_shards_are_not_made_again(images, unbroken, cache):
    encoder = MeanPoolEncoder()
    encode_all(images, cache, encoder)
    assert encoder.encoded == 0
    (cache / "latents-00002-of-00004.safetensors").unlink()
    (cache / "manifest.json").unlink()
    encode_all(images, cache, encoder)
    assert encoder.encoded == 2 * 7
    assert contents(cache) == contents(unbroken)


def test_damaged_shards_are_found_and_made_again(images, unbroken, cache, capsys):
    cut = cache / "latents-00001-of-00004.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    changed = cache / "latents-00003-of-00004.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\xff")
    encode_all(images, cache)
    assert cut.read_bytes() == (unbroken / cut.name).read_bytes()
    assert changed.read_bytes() != (unbroken / changed.name).read_bytes()
    encode_all(images, cache, verify=True)
    assert contents(cache) == contents(unbroken)
    assert f"{changed} does not have the recorded checksum" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(images, unbroken, tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 7:  # settings, a record and its shard, each with the folder, then the second shard's record
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"latents-00001-of-00004.safetensors could not be written: No space left"):
        encode_all(images, tmp_path)
    first = ["latents-00000-of-00004.json", "latents-00000-of-00004.safetensors", "settings.json"]
    assert sorted(contents(tmp_path)) == first
    encoder = MeanPoolEncoder()
    encode_all(images, tmp_path, encoder)
    assert encoder.encoded == 2 * (24 - 7)
    assert contents(tmp_path) == contents(unbroken)


def test_a_cache_from_before_there_were_features_stays_usable(images, tmp_path):
    encode(images, tmp_path)
    for name in ("settings.json", "manifest.json"):
        content = json.loads((tmp_path / name).read_text())
        settings = content.get("settings", content)
        for key in ("repa_encoder", "repa_encoder_sha256", "feature_shape"):
            del settings[key]
        (tmp_path / name).write_text(json.dumps(content))
    assert LatentDataset(tmp_path).settings.repa_encoder is None
    encoder = MeanPoolEncoder()
    encode(images, tmp_path, encoder)
    assert encoder.encoded == 0


def test_a_cache_of_other_settings_or_images_is_refused(images, unbroken, tmp_path):
    before = contents(unbroken)
    fewer = make_images(tmp_path / "fewer", {"a": 7, "b": 9, "c": 9})
    repa = {"repa_encoder": PatchMeanFeatures()}
    for folder, options, message in (
        (images, repa | {"dtype": "bfloat16", "flips": False}, 'now "bfloat16"; flips true, now false; use'),
        (fewer, repa, "num_images 26, now 25; images_sha256"),
        (images, {}, r'repa_encoder "patch means", now null; .*feature_shape \[16, 3\], now null'),
    ):
        with pytest.raises(ValueError, match=message):
            encode(folder, unbroken, **options)
    assert contents(unbroken) == before


@pytest.mark.parametrize("name", ["thesis.tex", "latents-00000-of-00004.safetensors"])
def test_a_folder_that_holds_something_else_is_refused(images, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}"):
        encode(images, tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]


def scaled(kind: type, scale: float) -> Any:
    """An encoder whose means, or whose features, are so many times as large."""

    class Scaled(kind):
        def __call__(self, images):
            found = super().__call__(images)
            return (found[0] * scale, found[1]) if isinstance(found, tuple) else found * scale

    return Scaled()


LOUD, LOUD_FEATURES = scaled(MeanPoolEncoder, 1e6), scaled(PatchMeanFeatures, 1e6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "allowed: float16, bfloat16"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"encoder": LOUD}, "latents up to .* do not fit float16; use bfloat16"),
        ({"repa_encoder": LOUD_FEATURES}, "features up to .* do not fit float16; use bfloat16"),
        ({"encoder": scaled(MeanPoolEncoder, np.nan)}, "the latents are not finite"),
        ({"repa_encoder": scaled(PatchMeanFeatures, np.nan)}, "the features are not finite"),
    ],
    ids=["dtype", "shard size", "workers", "loud latents", "loud features", "nan latents", "nan features"],
)
def test_what_cannot_be_encoded_is_refused(images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        encode(images, tmp_path, **options)


def test_bfloat16_takes_large_latents_and_features(images, tmp_path):
    manifest = encode(images, tmp_path, LOUD, dtype="bfloat16", repa_encoder=LOUD_FEATURES)
    assert manifest["count"] == 24
