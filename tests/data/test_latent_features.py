"""REPA's input: features cached beside the latents, or the images themselves, both of the same crop and flip."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_cases import MeanPoolEncoder, PatchMeanFeatures, contents, encode, make_images
from safetensors.torch import load_file, save_file

from ddt_fast.data import latent_loader
from ddt_fast.data.image_folder import read_image
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.latent_loader import LatentBatch, LatentLoader


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """26 images of 3 classes, one of them broken."""
    root = make_images(tmp_path_factory.mktemp("images") / "images", {"a": 7, "b": 9, "c": 10})
    (root / "a" / "002.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def cache(images, tmp_path_factory):
    """Their latents and features, mirrored ones too."""
    output = tmp_path_factory.mktemp("cache") / "cache"
    encode(images, output, repa_encoder=PatchMeanFeatures())
    return output


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_features_are_cached_beside_the_latents(images, tmp_path, dtype):
    manifest = encode(images, tmp_path, dtype=dtype, repa_encoder=PatchMeanFeatures())
    settings = manifest["settings"]
    assert (settings["repa_encoder"], settings["repa_encoder_sha256"]) == ("patch means", "none")
    assert settings["feature_shape"] == [16, 3]
    shard = load_file(tmp_path / manifest["shards"][1]["file"])
    image = read_image(images / "b" / "001.png", 16)  # the 8th of the list, the first of the second shard
    assert shard["index"][0] == 8
    for suffix, pixels in (("", image), ("_flip", image.flip(-1))):
        wanted = PatchMeanFeatures()(pixels[None])[0].to(getattr(torch, dtype))
        torch.testing.assert_close(shard[f"features{suffix}"][0], wanted, rtol=0, atol=0)
    plain = encode(images, tmp_path / "plain", dtype=dtype)
    assert set(load_file(tmp_path / "plain" / plain["shards"][1]["file"])) == {
        name for name in shard if "features" not in name
    }


def test_a_stopped_run_goes_on_with_features(images, cache, tmp_path):
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    (copy / "latents-00002-of-00004.safetensors").unlink()
    (copy / "manifest.json").unlink()
    encoder = MeanPoolEncoder()
    encode(images, copy, encoder, repa_encoder=PatchMeanFeatures())
    assert encoder.encoded == 2 * 8
    assert contents(copy) == contents(cache)


def test_a_run_with_another_repa_encoder_is_refused(images, cache):
    with pytest.raises(ValueError, match=r"repa_encoder patch means, now None; .*feature_shape \[16, 3\], now None"):
        encode(images, cache)


def test_caches_from_before_there_were_features_stay_usable(images, tmp_path):
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


def test_features_that_are_too_large_or_no_numbers_are_refused(images, tmp_path):
    class Loud(PatchMeanFeatures):
        def __call__(self, images):
            return super().__call__(images) * 1e6

    with pytest.raises(ValueError, match=r"features up to .* do not fit float16; take bfloat16"):
        encode(images, tmp_path / "a", repa_encoder=Loud())

    class Broken(PatchMeanFeatures):
        def __call__(self, images):
            return super().__call__(images) * float("nan")

    with pytest.raises(ValueError, match="the features are not finite"):
        encode(images, tmp_path / "c", repa_encoder=Broken())
    assert encode(images, tmp_path / "b", dtype="bfloat16", repa_encoder=Loud())["count"] == 25


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_latents_features_and_images_are_of_the_same_view(images, tmp_path, dtype, tolerance):
    class Sure(MeanPoolEncoder):
        def __call__(self, images):
            mean, logvar = super().__call__(images)
            return mean, torch.full_like(logvar, -30)

    encode(images, tmp_path, Sure(), dtype=dtype, repa_encoder=PatchMeanFeatures())
    dataset = LatentDataset(tmp_path, features=True)
    assert dataset.feature_shape == (16, 3)
    seen = set()
    with LatentLoader(dataset, 5, images=images) as loader:
        for _ in range(15):
            batch = next(loader)
            assert (batch.images.shape, batch.images.dtype) == ((5, 3, 16, 16), torch.uint8)
            wanted = PatchMeanFeatures()(batch.images).to(getattr(torch, dtype))
            torch.testing.assert_close(batch.features, wanted, rtol=0, atol=0)
            mean, _ = MeanPoolEncoder()(batch.images)
            torch.testing.assert_close(batch.latents / 0.5, mean, rtol=0, atol=tolerance)
            seen |= {
                (label, *image.flatten().tolist())
                for label, image in zip(batch.labels.tolist(), batch.images, strict=True)
            }
    views = {
        (label, *view.flatten().tolist())
        for label, name in enumerate("abc")
        for path in (images / name).iterdir()
        if path != images / "a" / "002.png"
        for image in [read_image(path, 16)]
        for view in (image, image.flip(-1))
    }
    assert len(seen) > 25, "no image came in both views"
    assert seen <= views


def test_plain_batches_do_not_depend_on_features_or_images(images, cache):
    def batches(dataset: LatentDataset, **options) -> list[LatentBatch]:
        with LatentLoader(dataset, 10, **options) as loader:
            return [next(loader) for _ in range(4)]

    plain = batches(LatentDataset(cache))
    rich = batches(LatentDataset(cache, features=True), images=images, num_threads=3)
    assert all(batch.features is None and batch.images is None for batch in plain)
    for ours, theirs in zip(plain, rich, strict=True):
        torch.testing.assert_close(ours[:2], theirs[:2], rtol=0, atol=0)


def test_ranks_share_features_and_images(images, cache):
    dataset = LatentDataset(cache, features=True)

    def first(**ranks: int) -> LatentBatch:
        with LatentLoader(dataset, 12, images=images, **ranks) as loader:
            return next(loader)

    whole, parts = first(), [first(rank=rank, world_size=3) for rank in range(3)]
    for name in LatentBatch._fields:
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_features_of_a_cache_without_are_refused(images, tmp_path):
    encode(images, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"cache holds no features; .*cache_latents --repa-encoder"):
        LatentDataset(tmp_path / "cache", features=True)
    (tmp_path / "shards").mkdir()
    save_file({"latents": torch.zeros(3, 4, 2, 2), "labels": torch.zeros(3).long()}, tmp_path / "shards/a.safetensors")
    with pytest.raises(ValueError, match=r"shards holds no features; "):
        LatentDataset(tmp_path / "shards", scaling_factor=1.0, features=True)
    with pytest.raises(ValueError, match="opened without features"):
        LatentDataset(tmp_path / "cache").features(np.arange(2), np.zeros(2, dtype=bool))
    lightningdit = LatentDataset(tmp_path / "shards", scaling_factor=1.0)
    with pytest.raises(ValueError, match="LightningDiT's shards do not say which image is which"):
        LatentLoader(lightningdit, 2, images=images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda features: features[:, :9].contiguous(), r"00002-of-00004.safetensors holds features_flip of shape "),
        (lambda features: features.float(), r"00002-of-00004.safetensors holds features_flip as torch.float32"),
        (lambda features: None, r"00002-of-00004.safetensors holds no features_flip, only"),
    ],
)
def test_shards_with_other_features_are_named(cache, tmp_path, change, message):
    shutil.copytree(cache, tmp_path / "cache")
    shard = tmp_path / "cache" / "latents-00002-of-00004.safetensors"
    tensors = load_file(shard)
    tensors["features_flip"] = change(tensors["features_flip"])
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, shard)
    _set_size(tmp_path / "cache", shard)
    LatentDataset(tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        LatentDataset(tmp_path / "cache", features=True)


def test_shards_that_do_not_say_their_images_are_named(images, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    shard = tmp_path / "cache" / "latents-00002-of-00004.safetensors"
    tensors = load_file(shard)
    for index, message in (
        (tensors["index"][:-1], "00002-of-00004.safetensors does not say which images"),
        (tensors["index"] + 20, "images outside the 26 on record"),
    ):
        save_file({**tensors, "index": index.contiguous()}, shard)
        _set_size(tmp_path / "cache", shard)
        with pytest.raises(ValueError, match=message):
            LatentLoader(LatentDataset(tmp_path / "cache"), 4, images=images)


def _set_size(cache: Path, shard: Path) -> None:
    """Put the size of a shard on record."""
    manifest = json.loads((cache / "manifest.json").read_text())
    for record in manifest["shards"]:
        if record["file"] == shard.name:
            record["bytes"] = shard.stat().st_size
    (cache / "manifest.json").write_text(json.dumps(manifest))


def test_another_image_folder_is_refused(images, cache, tmp_path):
    dataset = LatentDataset(cache)
    with pytest.raises(ValueError, match="does not exist"):
        LatentLoader(dataset, 4, images=tmp_path / "none")
    other = tmp_path / "images"
    shutil.copytree(images, other)
    (other / "b" / "003.png").rename(other / "b" / "renamed.png")
    with pytest.raises(ValueError, match=r"images holds other file names than the image folder"):
        LatentLoader(dataset, 4, images=other)
    (other / "b" / "renamed.png").unlink()
    with pytest.raises(ValueError, match=r"images holds 25 images; the cache was made from 26"):
        LatentLoader(dataset, 4, images=other)


def test_an_image_that_broke_since_is_named_and_its_batch_is_not_skipped(images, cache, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    file = copy / "b" / "004.png"
    content = file.read_bytes()
    file.write_bytes(content[:200])
    with LatentLoader(LatentDataset(cache), 1, images=copy) as loader:
        for _ in range(25):
            state = loader.state_dict()
            try:
                next(loader)
            except ValueError as error:
                message = str(error)
                break
        else:
            pytest.fail("the broken image was not noticed in a whole epoch")
        assert f"{file} was readable when its latent was cached, now it is not: " in message
        with pytest.raises(ValueError, match=r"004\.png"):
            next(loader)
        assert loader.state_dict() == state
        file.write_bytes(content)
        loader.load_state_dict(state)
        torch.testing.assert_close(
            PatchMeanFeatures()(next(loader).images).mean(), PatchMeanFeatures()(read_image(file, 16)[None]).mean()
        )


def test_the_speed_command_reads_features_and_images(images, cache, capsys):
    common = ["--seconds", "0.1", "--batch-size", "5"]
    latent_loader.main([str(cache), "--features", "--images", str(images), *common])
    assert "with features of 16x3 and images of 16 px" in capsys.readouterr().out
