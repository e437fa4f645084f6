"""REPA's input: features cached beside the latents, or the images themselves, both of the same crop and flip."""

import json
import shutil

import numpy as np
import pytest
import torch
from latent_cases import MeanPoolEncoder, PatchMeanFeatures, encode
from safetensors.torch import load_file, save_file

from ddt_fast.data import latent_loader
from ddt_fast.data.cached_images import CachedImages
from ddt_fast.data.image_folder import read_image
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.loader import LatentBatch, LatentLoader


def batches(dataset: LatentDataset, count: int, size: int, **options: object) -> list[LatentBatch]:
    with LatentLoader(dataset, size, **options) as loader:
        return [next(loader) for _ in range(count)]


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
    for batch in batches(dataset, 15, 5, images=CachedImages(images, dataset)):
        assert (batch.images.shape, batch.images.dtype) == ((5, 3, 16, 16), torch.uint8)
        expected = PatchMeanFeatures()(batch.images).to(getattr(torch, dtype))
        torch.testing.assert_close(batch.features, expected, rtol=0, atol=0)
        mean, _ = MeanPoolEncoder()(batch.images)
        torch.testing.assert_close(batch.latents / 0.5, mean, rtol=0, atol=tolerance)
        pairs = zip(batch.labels.tolist(), batch.images, strict=True)
        seen |= {(label, *image.flatten().tolist()) for label, image in pairs}
    readable = [(label, path) for label, name in enumerate("abc") for path in (images / name).iterdir()]
    views = {
        (label, *view.flatten().tolist())
        for label, path in readable
        if path not in (images / "a" / "002.png", images / "c" / "000.png")
        for image in [read_image(path, 16)]
        for view in (image, image.flip(-1))
    }
    assert len(seen) > 24, "no image came in both views"
    assert seen <= views


def test_plain_batches_do_not_depend_on_features_or_images(images, unbroken):
    dataset = LatentDataset(unbroken)
    plain = batches(dataset, 4, 10)
    rich = batches(LatentDataset(unbroken, features=True), 4, 10, images=CachedImages(images, dataset), num_threads=3)
    assert all(batch.features is None and batch.images is None for batch in plain)
    for ours, theirs in zip(plain, rich, strict=True):
        torch.testing.assert_close(ours[:2], theirs[:2], rtol=0, atol=0)


def test_ranks_share_features_and_images(images, unbroken):
    dataset = LatentDataset(unbroken, features=True)
    common = {"dataset": dataset, "count": 1, "size": 12, "images": CachedImages(images, dataset)}
    (whole,) = batches(**common)
    parts = [batches(**common, rank=rank, world_size=3)[0] for rank in range(3)]
    for name in LatentBatch._fields:
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_features_and_images_that_are_not_there_are_refused(images, unbroken, tmp_path):
    encode(images, tmp_path / "cache")
    (tmp_path / "shards").mkdir()
    save_file({"latents": torch.zeros(3, 4, 2, 2), "labels": torch.zeros(3).long()}, tmp_path / "shards/a.safetensors")
    other = shutil.copytree(images, tmp_path / "images")
    (other / "b" / "003.png").rename(other / "b" / "renamed.png")
    fewer = shutil.copytree(images, tmp_path / "fewer")
    (fewer / "b" / "003.png").unlink()
    plain, lightningdit = LatentDataset(tmp_path / "cache"), LatentDataset(tmp_path / "shards", scaling_factor=1.0)
    for refused, message in (
        (lambda: LatentDataset(tmp_path / "cache", features=True), r"no features; .*cache_latents --repa-encoder"),
        (lambda: LatentDataset(tmp_path / "shards", scaling_factor=1.0, features=True), "shards holds no features; "),
        (lambda: plain.features(np.arange(2), np.zeros(2, dtype=bool)), "opened without features"),
        (lambda: CachedImages(images, lightningdit), "LightningDiT's shards do not record their images"),
        (lambda: CachedImages(tmp_path / "none", plain), "does not exist"),
        (lambda: CachedImages(other, plain), r"images holds other file names than the image folder"),
        (lambda: CachedImages(fewer, plain), r"fewer holds 25 images; the cache was made from 26"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("features_flip", lambda tensor: tensor[:, :9].contiguous(), " holds features_flip of shape "),
        ("features_flip", lambda tensor: tensor.float(), " holds features_flip as torch.float32"),
        ("features_flip", lambda tensor: None, " holds no features_flip, only"),
        ("index", lambda tensor: tensor[:-1].contiguous(), " does not record the images"),
        ("index", lambda tensor: tensor + 20, " holds latents of images outside the 26 of the cache"),
    ],
)
def test_shards_with_other_features_or_images_are_named(images, cache, name, change, message):
    shard = cache / "latents-00002-of-00004.safetensors"
    tensors = load_file(shard)
    tensors[name] = change(tensors[name])
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, shard)
    manifest = json.loads((cache / "manifest.json").read_text())
    for record in manifest["shards"]:
        record["bytes"] = (cache / record["file"]).stat().st_size
    (cache / "manifest.json").write_text(json.dumps(manifest))
    LatentDataset(cache)
    with pytest.raises(ValueError, match=rf"(00002-of-00004\.safetensors|/cache){message}"):
        CachedImages(images, LatentDataset(cache, features=name != "index"))


def test_an_image_that_broke_since_is_named_and_its_batch_is_not_skipped(images, unbroken, tmp_path):
    copy = shutil.copytree(images, tmp_path / "images")
    file = copy / "b" / "004.png"
    content = file.read_bytes()
    file.write_bytes(content[:200])
    dataset = LatentDataset(unbroken)
    with LatentLoader(dataset, 1, images=CachedImages(copy, dataset)) as loader:
        for _ in range(24):
            state = loader.state_dict()
            try:
                next(loader)
            except ValueError as error:
                message = str(error)
                break
        else:
            pytest.fail("the broken image was not noticed in a whole epoch")
        assert f"{file} was readable when its latent was cached, but now is not: " in message
        with pytest.raises(ValueError, match=r"004\.png"):
            next(loader)
        assert loader.state_dict() == state
        file.write_bytes(content)
        loader.load_state_dict(state)
        means = [PatchMeanFeatures()(view).mean() for view in (next(loader).images, read_image(file, 16)[None])]
        torch.testing.assert_close(*means)


def test_the_speed_command_reads_features_and_images(images, unbroken, capsys):
    common = ["--seconds", "0.1", "--batch-size", "5"]
    latent_loader.main([str(unbroken), "--features", "--images", str(images), *common])
    printed = capsys.readouterr().out
    assert "24 latents of 4x2x2, 3 classes, scaled by 0.5\nwith features of 16x3 and images of 16 px\n" in printed
    assert "img/s" in printed
