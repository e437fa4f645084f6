"""The data loader: one epoch of cached latents, in random order, against a PyTorch DataLoader that reads the same
shards a sample at a time, as the public latent trainers do. On the host's CPU, whatever the GPU.

Verified: an epoch has every latent once. (The cache's variance is next to nothing, so a drawn latent is its mean.)
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Case, Inputs, Run, Variant, Workload
from ddt_fast.data.latent_cache import CacheFolder, CacheSettings
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.loader import LatentLoader
from ddt_kernels import Cost

COUNT, BATCH, SHARD, SHAPE, SCALE, WORKERS = 4096, 256, 1024, (4, 32, 32), 0.18215, 2
BASELINE, OURS = "torch DataLoader, a sample at a time, 2 workers", "LatentLoader, 2 threads"


class SampleBySample(Dataset[Tensor]):
    """Mean and log-variance of one latent read from its shard, and a latent drawn."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.safetensors"))

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        shard, row = divmod(index, SHARD)
        with safe_open(self.files[shard], framework="pt") as file:
            mean, logvar = (file.get_slice(name)[row].float() for name in ("mean", "logvar"))
        return SCALE * (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))


def write_cache(folder: Path) -> Tensor:
    """A latent cache; returns its means, whose first two elements say which latent it is."""
    classes = tuple(f"class {i}" for i in range(10))
    of_images = (256, "none", "none", SCALE, SHAPE, "float16", "float32", False)
    settings = CacheSettings(*of_images, SHARD, 1, COUNT, "none", classes)
    cache = CacheFolder(folder, settings)
    means = torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0)).half()
    number = torch.arange(COUNT)
    means[:, 0, 0, 0], means[:, 0, 0, 1] = number // 64, number % 64
    for shard in range(settings.num_shards):
        index = torch.tensor(settings.shard_range(shard))
        mean = means[index]
        tensors = {"mean": mean, "logvar": torch.full_like(mean, -30.0), "labels": index % 10, "index": index}
        cache.write_shard(shard, tensors, [])
    cache.write_manifest()
    return means


def in_order(latents: Tensor) -> Tensor:
    """Sorted by the numbers that `write_cache` put into their first two elements."""
    high, low = (latents / SCALE).round().flatten(1)[:, :2].unbind(1)
    return latents[(64 * high + low).argsort()]


def build() -> Workload:
    temporary = tempfile.TemporaryDirectory(prefix="ddt-fast-latents-")
    folder = Path(temporary.name) / "cache"
    means = write_cache(folder)
    loader = LatentLoader(LatentDataset(folder), BATCH, num_threads=WORKERS)

    def ours() -> Run:
        return lambda _: [next(loader).latents for _ in range(COUNT // BATCH)]

    def plain() -> Run:
        batches = DataLoader(SampleBySample(folder), BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
        return lambda _: list(batches)

    def check(run: Run, inputs: Inputs) -> Sequence[Tensor]:
        return [in_order(torch.cat(list(run(inputs))))]

    def clean_up() -> None:
        loader.close()
        temporary.cleanup()

    # Two float16 numbers read and one float32 written for each of a latent.
    cost = Cost(COUNT * means[0].numel() * (2 + 2 + 4), 0)
    variants = {BASELINE: Variant(plain, check=check), OURS: Variant(ours, ours=True, check=check)}
    expected = [in_order(SCALE * means.float())]
    return Workload(
        lambda: Inputs(()), variants, lambda _: expected, torch.float32, cost, COUNT, tolerance=1e-5, clean_up=clean_up
    )


SIZE = f"{COUNT} latents of 4x32x32, batch {BATCH}, float16 in shards"
CASES = [Case("data", "one epoch of latents", SIZE, (BASELINE, OURS), build, seconds=4.0)]


def test_data(case: Case, variant: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, variant)
