"""The command as a user runs it, with a small AutoencoderKL."""

import io
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_cases import make_images
from PIL import Image
from safetensors.torch import load_file

from ddt_fast import cache_latents
from ddt_fast.autoencoder import Decoder, Encoder
from ddt_fast.command import run_command
from ddt_fast.data.cached_images import CachedImages
from ddt_fast.data.encode import cache_settings
from ddt_fast.data.image_file import center_crop
from ddt_fast.data.image_folder import list_images
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.loader import LatentLoader
from ddt_fast.data.verification import wrong_shards
from ddt_fast.dinov2 import DinoV2
from sample_jobs import error_line, files_up_to, small_autoencoder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """32 of 3 classes, and a truncated JPEG."""
    root = make_images(tmp_path_factory.mktemp("images") / "images", {"a": 10, "b": 10, "c": 12}, size=64)
    cut = root / "c" / "cut.jpg"
    Image.open(root / "c" / "000.png").save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    return root


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return Path(small_autoencoder(tmp_path_factory.mktemp("vae") / "vae"))


def arguments(images: Path, autoencoder: Path, output: Path, *more: str) -> list[str]:
    """The command's options for 32 px, 10 images per shard."""
    options = {"--images": images, "--output": output, "--autoencoder": autoencoder, "--image-size": 32}
    options |= {"--shard-size": 10, "--batch-size": 4, "--num-workers": 0}
    return [str(word) for pair in options.items() for word in pair] + list(more)


def test_from_images_to_batches(images, autoencoder, tmp_path, capsys):
    cache_latents.main(arguments(images, autoencoder, tmp_path, "--flips"))
    output = capsys.readouterr()
    assert "32 latents of 3 classes in 4 shards" in output.out
    assert re.search(r"c/cut\.jpg: image file is truncated", output.out)
    assert "img/s" in output.err
    dataset = LatentDataset(tmp_path)
    assert dataset.shape == (4, 4, 4)
    assert wrong_shards(dataset, dataset.checksums) == []
    encoder = Encoder(str(autoencoder), torch.device("cpu"))
    assert dataset.scaling_factor == encoder.scaling_factor == 0.18215
    with LatentLoader(dataset, 32) as loader:
        latents, labels, *_ = next(loader)
    assert labels.bincount(minlength=3).tolist() == dataset.labels.bincount(minlength=3).tolist()
    assert Decoder(str(autoencoder), torch.device("cpu"))(latents[:2]).shape == (2, 3, 32, 32)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2") / "dinov2"
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


def test_cached_features_are_those_of_the_images(images, autoencoder, dinov2, tmp_path, capsys):
    cache_latents.main(arguments(images, autoencoder, tmp_path, "--flips", "--repa-encoder", str(dinov2)))
    encoder = DinoV2(str(dinov2))
    dataset = LatentDataset(tmp_path, features=True)
    assert wrong_shards(dataset, dataset.checksums) == []
    assert dataset.settings is not None
    assert (dataset.settings.repa_encoder, dataset.settings.repa_encoder_sha256) == (str(dinov2), encoder.sha256())
    assert dataset.feature_shape == (4, 24)
    with LatentLoader(dataset, 16, images=CachedImages(images, dataset)) as loader:
        for _ in range(4):
            batch = next(loader)
            torch.testing.assert_close(batch.features.float(), encoder(batch.images), rtol=1e-3, atol=2e-3)
    with pytest.raises(ValueError, match="was begun with other settings: repa_encoder"):
        cache_latents.main(arguments(images, autoencoder, tmp_path, "--flips"))
    # Shards with features are smaller by default.
    folder, vae = list_images(images), Encoder(str(autoencoder), torch.device("cpu"))
    sizes = [cache_settings(folder, vae, with_, 32, "float16", True, None, 4).shard_size for with_ in (None, encoder)]
    assert sizes == [8192, 2048]


def test_the_last_of_two_processes_ends_the_cache(images, autoencoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        cache_latents.main(arguments(images, autoencoder, tmp_path))
        said.append(capsys.readouterr().out)
    assert said[0].startswith("rank 0 of 2: finished its shards; the last process to finish writes ")
    assert "32 latents of 3 classes" in said[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-size", "30"], "--image-size is 30; allowed: multiples of 8"),
        (["--dtype", "float32"], "allowed: float16, bfloat16"),
        (["--compute-dtype", "int8"], "allowed: float32, bfloat16"),
        (["--num-workers", "-1"], "--num-workers is -1"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--images", "nowhere"], "image folder nowhere does not exist"),
        (["--autoencoder", "."], "autoencoder . could not be loaded"),
        (["--repa-encoder", "."], "DINOv2 . could not be loaded"),
        (["--output", "{images}/latents"], "lies inside the image folder"),
    ],
)
def test_mistakes_are_one_line(images, autoencoder, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    given = arguments(images, autoencoder, tmp_path / "cache", *(word.format(images=images) for word in more))
    assert message in error_line(capsys, cache_latents.main, given)
    assert not (images / "latents").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(images, autoencoder, tmp_path, capsys):
    with files_up_to(2048):
        line = error_line(capsys, cache_latents.main, arguments(images, autoencoder, tmp_path / "cache"))
    assert "latents-00000-of-00004.safetensors could not be written: File too large; finished shards are kept" in line
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["settings.json"]


def test_nothing_readable_is_a_mistake(autoencoder, tmp_path, capsys):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name in ("1.png", "2.jpg"):
        (tmp_path / "images" / "a" / name).touch()
    line = error_line(capsys, cache_latents.main, arguments(tmp_path / "images", autoencoder, tmp_path / "cache"))
    assert "images holds 2 images, none of which can be read; the first, a/1.png: not an image that" in line


@pytest.mark.slow
def test_arrays_tars_and_flat_folders_are_cached_as_the_same_files(autoencoder, tmp_path, capsys):
    """Three pictures of one class each way: the same latents, and training reads the images again."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 40, 32, 3), dtype=np.uint8)
    for place in ("flat", "arrays", "tars"):
        (tmp_path / place).mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "flat" / f"{i}.png")
    np.save(tmp_path / "arrays" / "stack.npy", pictures)
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as archive:
        archive.add(tmp_path / "flat", "")
    seen = []
    for place in ("flat", "arrays", "tars", "tars/0.tar"):
        output = tmp_path / "caches" / place
        given = arguments(tmp_path / place, autoencoder, output)
        cache_latents.main([*given, "--num-workers", "2"])
        assert "3 latents of 1 class in 1 shard" in capsys.readouterr().out
        dataset = LatentDataset(output)
        seen.append(load_file(output / "latents-00000-of-00001.safetensors")["mean"])
        read = CachedImages(tmp_path / place, dataset).read(np.arange(3), np.zeros(3, dtype=bool))
        expected = [center_crop(Image.fromarray(picture), 32) for picture in pictures]
        np.testing.assert_array_equal(read.permute(0, 2, 3, 1), np.stack([np.asarray(crop) for crop in expected]))
    assert all(torch.equal(mean, seen[0]) for mean in seen)


def test_names_that_are_not_utf8_are_escaped(autoencoder, tmp_path, monkeypatch):
    folder = os.fsencode(tmp_path) + b"/i/caf\xe9"
    os.makedirs(folder)
    Image.new("RGB", (32, 32)).save(os.fsdecode(folder + b"/1.png"))
    Path(os.fsdecode(folder + b"/br\xf6ken.png")).touch()
    Path(os.fsdecode(folder + b"/x.\xe9")).touch()
    terminal = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_command(lambda: cache_latents.main(arguments(tmp_path / "i", autoencoder, tmp_path / "cache")))
    terminal.flush()
    assert rb"caf\xe9/br\xf6ken.png: not an image" in terminal.buffer.getvalue()
    assert [os.fsencode(name) for name in LatentDataset(tmp_path / "cache").settings.class_names] == [b"caf\xe9"]
