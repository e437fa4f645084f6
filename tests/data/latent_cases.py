"""Small image folders, caches and an encoder that is quick to build."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddt_fast.data.encode import cache_settings, encode_images
from ddt_fast.data.image_folder import list_images
from ddt_fast.data.latent_cache import CacheFolder, CacheSettings


class MeanPoolEncoder:
    """Encodes by averaging 8x8 pixels into 4 channels: the interface of ddt_fast.autoencoder.Encoder without a VAE."""

    name, scaling_factor, latent_channels, pixels_per_latent = "pool", 0.5, 4, 8

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.encoded = 0
        self.vae = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)

    def sha256(self) -> str:
        return "mean pool"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self.seconds)
        self.encoded += len(images)
        pooled = torch.nn.functional.avg_pool2d(images.float() / 255, 8)
        mean = torch.cat([pooled, pooled.mean(1, keepdim=True)], 1)
        return mean, -mean - 2


class PatchMeanFeatures:
    """Features that are the colours of 4x4 patches: the interface of ddt_fast.dinov2.DinoV2 without a ViT."""

    name, feature_size = "patch means", 3

    def grid(self, image_size: int) -> int:
        return image_size // 4

    def sha256(self) -> str:
        return "none"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images.float() / 255, 4).flatten(2).transpose(1, 2)


def make_images(root: Path, counts: dict[str, int], size: int = 24) -> Path:
    """A folder of noise images, as many per class as counts says."""
    random = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


def encode(
    images: Path,
    output: Path,
    encoder: MeanPoolEncoder | None = None,
    *,
    dtype: str = "float16",
    flips: bool = True,
    shard_size: int = 8,
    repa_encoder: PatchMeanFeatures | None = None,
    **options: object,
) -> dict | None:
    """Cache an image folder with the encoders above, 16 px, 3 images at a time."""
    folder, encoder = list_images(images), encoder or MeanPoolEncoder()
    settings = cache_settings(folder, encoder, repa_encoder, 16, dtype, flips, shard_size, 3)
    return encode_images(folder, output, encoder, settings, repa_encoder, **{"num_workers": 0, **options})


def write_cache(path: Path, count: int, shape=(4, 2, 2), *, flips: bool = True, logvar: float = -2.0) -> Path:
    """A cache whose mean of image i is i everywhere and whose mirrored mean is -i; its label is i % 5."""
    names = tuple(f"class {i}" for i in range(5))
    settings = CacheSettings(16, "x", "x", 0.5, shape, "float16", "float32", flips, 16, 4, count, "x", names)
    cache = CacheFolder(path, settings)
    for shard in range(settings.num_shards):
        index = torch.tensor(settings.shard_range(shard))
        mean = index.view(-1, 1, 1, 1).expand(-1, *shape).half().contiguous()
        tensors = {"mean": mean, "logvar": torch.full_like(mean, logvar), "labels": index % 5, "index": index}
        if flips:
            tensors |= {"mean_flip": -mean, "logvar_flip": tensors["logvar"].clone()}
        cache.write_shard(shard, tensors, [])
    cache.write_manifest()
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


if __name__ == "__main__":  # python latent_cases.py IMAGES OUTPUT: a slow run, to be killed
    slow, features = MeanPoolEncoder(0.02), PatchMeanFeatures()
    encode(Path(sys.argv[1]), Path(sys.argv[2]), slow, repa_encoder=features, num_workers=1)
