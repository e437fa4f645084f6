"""Random weights for the Inception network that give features as large as the trained ones do."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from ddt_fast.evaluation.inception import Inception


@cache
def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict; every normalisation has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network = Inception()
    network.to_empty(device="cpu")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.uniform_(0.8, 1.2, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
    network.fc.weight.normal_(0, 0.05, generator=generator)
    network.fc.bias.normal_(0, 1, generator=generator)
    return network.state_dict()


@cache
def weights_file() -> str:
    """A file of `random_weights`."""
    file = Path(tempfile.mkdtemp()) / "random.pth"
    torch.save(random_weights(), file)
    return str(file)


def smooth_images(count: int, seed: int, size: int = 32) -> NDArray[np.uint8]:
    """Images (count, size, size, 3) uint8 that are not plain noise, which looks all the same to a network."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size))) for image in coarse])
