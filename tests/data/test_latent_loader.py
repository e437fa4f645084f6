"""Reading caches: what is drawn, in which order, and that it does not depend on ranks, threads or restarts."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from latent_cases import write_cache
from safetensors.torch import save_file

from ddt_fast.data import latent_loader
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.loader import LatentLoader


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("latents") / "cache", 70)


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    """A cache whose posteriors have next to no width: latents tell which image they are of."""
    return LatentDataset(write_cache(tmp_path_factory.mktemp("sure") / "cache", 70, logvar=-30.0))


def take(loader: LatentLoader, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The next `count` batches, concatenated."""
    with loader:
        batches = [next(loader) for _ in range(count)]
    assert all(batch.features is None and batch.images is None for batch in batches)
    return torch.cat([batch.latents for batch in batches]), torch.cat([batch.labels for batch in batches])


def seen(latents: torch.Tensor) -> list[int]:
    """Which images these are: the mean of image i is i, scaled by 0.5, mirrored -i."""
    return (latents[:, 0, 0, 0] * 2).round().int().tolist()


def test_every_epoch_visits_every_image_once_in_its_own_order(sure):
    latents, labels = take(LatentLoader(sure, 10, flips=False), 14)
    images = seen(latents)
    assert labels.tolist() == [image % 5 for image in images]
    first, second = images[:70], images[70:]
    assert sorted(first) == sorted(second) == list(range(70))
    assert first != second
    assert first != sorted(first)
    other, _ = take(LatentLoader(sure, 10, flips=False, seed=1), 7)
    assert seen(other) != first
    across, _ = take(LatentLoader(sure, 32, flips=False), 5)
    assert seen(across)[:140] == images


@pytest.mark.slow
def test_ranks_and_threads_only_divide_the_work(cache):
    dataset = LatentDataset(cache)
    whole = [take(LatentLoader(dataset, 12, num_threads=threads, prefetch=threads), 13) for threads in (1, 3)]
    torch.testing.assert_close(whole[0], whole[1], rtol=0, atol=0)
    for world_size in (2, 4):
        parts = [take(LatentLoader(dataset, 12, rank=rank, world_size=world_size), 13) for rank in range(world_size)]
        for together, single in zip(zip(*parts, strict=True), whole[0], strict=True):
            batches = torch.cat([part.unflatten(0, (13, -1)) for part in together], 1).flatten(0, 1)
            torch.testing.assert_close(batches, single, rtol=0, atol=0)


@pytest.mark.slow
def test_it_continues_at_the_exact_sample_even_with_another_batch_size(cache):
    dataset = LatentDataset(cache)
    whole = take(LatentLoader(dataset, 12), 15)
    for stop in (0, 5, 6, 12):
        with LatentLoader(dataset, 12) as loader:
            for _ in range(stop):
                next(loader)
            state = json.loads(json.dumps(loader.state_dict()))
        resumed = LatentLoader(dataset, 12, prefetch=2)
        next(resumed)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert resumed.epoch == stop * 12 // 70
        larger = LatentLoader(dataset, 28)
        larger.load_state_dict(state)
        for loader, count in ((resumed, 15 - stop), (larger, (180 - stop * 12) // 28)):
            for ours, theirs in zip(take(loader, count), whole, strict=True):
                torch.testing.assert_close(ours, theirs[stop * 12 :][: len(ours)], rtol=0, atol=0)


def test_states_of_other_data_are_refused(sure):
    with LatentLoader(sure, 10) as loader:
        state = loader.state_dict()
        for change, message in (
            ({"seed": 3}, "seed 3, now it is 0"),
            ({"num_samples": 9}, "num_samples 9, now it is 70"),
            ({"position": 70}, "outside the data"),
            ({"epoch": None}, "expected whole numbers"),
        ):
            with pytest.raises(ValueError, match=message):
                loader.load_state_dict({**state, **change})


def test_latents_are_drawn_afresh_from_their_posteriors(tmp_path):
    dataset = LatentDataset(write_cache(tmp_path / "cache", 40, (4, 16, 16), flips=False, logvar=-2.0))
    latents, _ = take(LatentLoader(dataset, 40), 50)
    images = torch.tensor(seen(latents.mean((1, 2, 3), keepdim=True)))
    noise = (latents / 0.5 - images.view(-1, 1, 1, 1)) / np.exp(-1)
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / count) ** 0.5
    flat = noise.flatten(1)
    similarity = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
    assert similarity.abs().max() < 7 / flat.shape[1] ** 0.5, "two visits got the same noise"


def test_logvar_is_clamped(tmp_path):
    wide = LatentDataset(write_cache(tmp_path / "wide", 40, flips=False, logvar=50.0))
    latents, _ = take(LatentLoader(wide, 40), 20)
    assert 0.9 < latents.std() / (0.5 * np.exp(10)) < 1.1


def test_half_of_the_images_are_mirrored(sure):
    latents, _ = take(LatentLoader(sure, 70), 40)
    images = np.array(seen(latents))
    assert sorted(np.abs(images[:70])) == list(range(70))
    mirrored = images[np.abs(images) > 0] < 0
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / len(mirrored) ** 0.5
    once = mirrored.reshape(40, -1)
    assert (once[0] != once[1]).any()


def test_lightningdit_shards_are_read(tmp_path):
    index = torch.arange(30).float().view(-1, 1, 1, 1).expand(-1, 4, 2, 2).contiguous()
    for rank, rows in enumerate((slice(0, 18), slice(18, 30))):
        part = {"latents": index[rows], "latents_flip": -index[rows], "labels": torch.arange(30)[rows] % 7}
        contiguous = {name: tensor.contiguous() for name, tensor in part.items()}
        save_file(contiguous, tmp_path / f"latents_rank{rank:02d}_shard000.safetensors")
    with pytest.raises(ValueError, match="do not record their scale"):
        LatentDataset(tmp_path)
    dataset = LatentDataset(tmp_path, scaling_factor=0.5)
    assert (len(dataset), dataset.num_classes, dataset.has_posterior, dataset.has_flips) == (30, 7, False, True)
    assert dataset.shape == (4, 2, 2)
    latents, labels = take(LatentLoader(dataset, 30, flips=False), 1)
    assert sorted(seen(latents)) == list(range(30))
    assert labels.tolist() == [image % 7 for image in seen(latents)]
    mirrored, _ = take(LatentLoader(dataset, 30), 1)
    assert sorted(np.abs(seen(mirrored))) == list(range(30))
    assert min(seen(mirrored)) < 0

    stats = tmp_path / "latents_stats.pt"
    torch.save({"mean": torch.full((1, 4, 1, 1), 3.0), "std": torch.full((1, 4, 1, 1), 2.0)}, stats)
    normalised = LatentDataset(tmp_path, scaling_factor=1.0, channel_stats=stats)
    normalised, _ = take(LatentLoader(normalised, 30, flips=False), 1)
    torch.testing.assert_close(normalised, (latents * 2 - 3) / 2)
    zero = {"mean": torch.zeros(4), "std": torch.zeros(4)}
    for content in (b"junk", zero, {**zero, "std": torch.ones(5)}, {**zero, "std": torch.full((4,), torch.nan)}):
        stats.write_bytes(content) if isinstance(content, bytes) else torch.save(content, stats)
        with pytest.raises(ValueError, match=r"latents_stats\.pt cannot be (used|read)"):
            LatentDataset(tmp_path, scaling_factor=1.0, channel_stats=stats)
    with pytest.raises(ValueError, match="no checksums to verify"):
        latent_loader.main([str(tmp_path), "--scaling-factor", "1", "--verify"])


def test_damaged_caches_are_named(cache, tmp_path):
    broken = shutil.copytree(cache, tmp_path / "cache")
    manifest, shard = broken / "manifest.json", broken / "latents-00002-of-00005.safetensors"
    record, content = json.loads(manifest.read_text()), shard.read_bytes()

    def refused(message: str, **options) -> None:
        with pytest.raises(ValueError, match=message):
            LatentDataset(broken, **options)

    refused("was made for 0.5", scaling_factor=0.18215)
    for other, message in (({**record, "version": 9}, "has version 9"), ({"version": 1}, "is damaged")):
        manifest.write_text(json.dumps(other))
        refused(message)
    manifest.write_text(json.dumps(record))
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    LatentDataset(broken)
    with pytest.raises(ValueError, match=r"latents-00002-of-00005\.safetensors does not have the checksum"):
        latent_loader.main([str(broken), "--verify"])
    shard.write_bytes(content[:-40])
    refused("latents-00002-of-00005.safetensors has .* bytes;")
    shard.unlink()
    refused("latents-00002-of-00005.safetensors is missing")
    manifest.unlink()
    refused("is an unfinished cache")
    for file in broken.glob("*.json"):
        file.unlink()
    for damaged in (content[:-40], content[:5]):
        shard.write_bytes(damaged)
        refused(
            "latents-00002-of-00005.safetensors cannot be read: it is truncated or not safetensors", scaling_factor=1.0
        )
    shutil.rmtree(broken)
    refused("does not exist")
    broken.mkdir()
    refused("holds no latents")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 9, "world_size": 2}, "multiples of world_size"),
        ({"batch_size": 8, "rank": 2, "world_size": 2}, "rank is 2"),
        ({"batch_size": 8, "num_threads": 0}, "num_threads is 0"),
        ({"batch_size": 4, "flips": True}, "the cache has no mirrored images"),
    ],
)
def test_wrong_settings_of_the_loader_are_refused(sure, tmp_path, options, message):
    dataset = LatentDataset(write_cache(tmp_path / "cache", 8, flips=False)) if "flips" in options else sure
    with pytest.raises(ValueError, match=message):
        LatentLoader(dataset, **options)


NEW_THREADS = """
import os, torch
from ddt_fast.data.digits import DigitsDataset
from ddt_fast.data.loader import LatentLoader
dataset = DigitsDataset()
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
before = len(os.listdir("/proc/self/task"))
with LatentLoader(dataset, 256, num_threads=1) as loader:
    [next(loader) for _ in range(3)]
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.slow
def test_digits_come_without_threads_that_would_slow_the_training_down():
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    result = subprocess.run([sys.executable, "-c", NEW_THREADS], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "1", result.stderr
