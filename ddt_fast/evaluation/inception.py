"""The Inception network of FID: TensorFlow's graph of 2015-12-05, which every published FID uses.

It differs from torchvision's Inception v3: 1008 classes; average pools leave out the padding; the last block pools by
maximum; images are resized as in TensorFlow 1. Parameter names are those of the published weights file (see
`inception_weights`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ddt_fast.device import deterministic_convolutions, float32_as

INPUT_SIZE = 299
NUM_CLASSES = 1008
POOL_DIM = 2048
# sFID's features: the first 7 channels of mixed_6/conv, 17 x 17 (arXiv 2103.03841, and ADM's evaluator).
SPATIAL_CHANNELS = 7


class InceptionOutput(NamedTuple):
    """Features of B images.

    Attributes:
        pool: (B, 2048) float32, `pool_3` of the graph.
        spatial: (B, 2023) float32, the first 7 channels of `mixed_6/conv`, ordered (row, column, channel).
    """

    pool: Tensor
    spatial: Tensor


# A step of a block's branch: convolutions of the same input, name → arguments of `_ConvNormReLU`, whose outputs are
# concatenated; or a pool ("average", "maximum", or "halve").
_Convs = dict[str, tuple[Any, ...]]
_Branch = Sequence[_Convs | str]


class _ConvNormReLU(nn.Module):
    def __init__(
        self, in_channels: int, channels: int, kernel: int | tuple[int, int] = 1, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = "same" if padded and stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    """Branches of one input, concatenated."""

    def __init__(self, in_channels: int, branches: Sequence[_Branch]) -> None:
        super().__init__()
        self.branches, self.out_channels = branches, 0
        for branch in branches:
            channels = in_channels
            for convs in (step for step in branch if not isinstance(step, str)):
                for name, conv in convs.items():
                    self.add_module(name, _ConvNormReLU(channels, *conv))
                channels = sum(conv[0] for conv in convs.values())
            self.out_channels += channels

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            parts = [x]
            for step in branch:
                y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
                parts = [_pool(step, y)] if isinstance(step, str) else [self.get_submodule(name)(y) for name in step]
            outputs += parts
        return torch.cat(outputs, 1)


def _pool(kind: str, x: Tensor) -> Tensor:
    if kind == "average":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return F.max_pool2d(x, 3, stride=1, padding=1) if kind == "maximum" else F.max_pool2d(x, 3, stride=2)


def _chain(name: str, *convs: tuple[Any, ...]) -> list[_Convs]:
    return [{f"{name}_{i}": conv} for i, conv in enumerate(convs, 1)]


def _block_35(pool_channels: int) -> list[_Branch]:
    return [
        [{"branch1x1": (64,)}],
        _chain("branch5x5", (48,), (64, 5)),
        _chain("branch3x3dbl", (64,), (96, 3), (96, 3)),
        ["average", {"branch_pool": (pool_channels,)}],
    ]


def _block_17(c: int) -> list[_Branch]:
    row, column = (1, 7), (7, 1)
    return [
        [{"branch1x1": (192,)}],
        _chain("branch7x7", (c,), (c, row), (192, column)),
        _chain("branch7x7dbl", (c,), (c, column), (c, row), (c, column), (192, row)),
        ["average", {"branch_pool": (192,)}],
    ]


def _block_8(pool: str) -> list[_Branch]:
    row, column = (384, (1, 3)), (384, (3, 1))
    return [
        [{"branch1x1": (320,)}],
        [*_chain("branch3x3", (384,)), {"branch3x3_2a": row, "branch3x3_2b": column}],
        [*_chain("branch3x3dbl", (448,), (384, 3)), {"branch3x3dbl_3a": row, "branch3x3dbl_3b": column}],
        [pool, {"branch_pool": (192,)}],
    ]


_TO_17: list[_Branch] = [
    [{"branch3x3": (384, 3, 2)}],
    _chain("branch3x3dbl", (64,), (96, 3), (96, 3, 2)),
    ["halve"],
]
_TO_8: list[_Branch] = [
    _chain("branch3x3", (192,), (320, 3, 2)),
    _chain("branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
    ["halve"],
]
_BLOCKS = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": _TO_17,
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": _TO_8,
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("maximum"),
}


class Inception(nn.Module):
    """The network, in evaluation mode and without gradients; its weights are random until a state dict is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _ConvNormReLU(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _ConvNormReLU(32, 64, 3)
        self.Conv2d_3b_1x1 = _ConvNormReLU(64, 80)
        self.Conv2d_4a_3x3 = _ConvNormReLU(80, 192, 3, padded=False)
        channels = 192
        for name, branches in _BLOCKS.items():
            block = _Block(channels, branches)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = nn.Linear(POOL_DIM, NUM_CLASSES)
        self.eval().requires_grad_(False)

    def fold(self) -> Self:
        """Move every normalisation into its convolution, in place: the same function, faster, without BatchNorm's
        parameters."""
        for module in self.modules():
            if isinstance(module, _ConvNormReLU) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        return self

    def forward(self, images: Tensor) -> InceptionOutput:
        """The features of images (B, 3, H, W) uint8 of any size; ValueError for another dtype or shape."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (B, 3, H, W)")
        x = (resize(images.to(self.fc.weight.dtype)) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":
                # branch1x1, the graph's mixed_6/conv, comes first in the concatenation.
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return InceptionOutput(x.mean((2, 3)), spatial)

    def probabilities(self, pool: Tensor) -> Tensor:
        """Class probabilities (B, 1008) of pool features (B, 2048), from logits without bias, as the Inception Score
        is defined."""
        return (pool @ self.fc.weight.T).softmax(1)


def resize(images: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """(B, C, H, W) floating point → (B, C, size, size), as TensorFlow 1 resizes: bilinear, output pixel i at
    i * H / size (no half-pixel centres), no antialiasing, interpolated along rows first."""
    for dim in (3, 2):
        length = images.shape[dim]
        # The graph computes positions in float32, which decides the pixel that a position falls in.
        scale = torch.tensor(length / size, dtype=torch.float32)
        position = torch.arange(size, dtype=torch.float32) * scale
        low = position.long().clamp(max=length - 1)
        weight = (position - low).to(images.device, images.dtype).reshape((-1, 1) if dim == 2 else (-1,))
        low = low.to(images.device)
        first, second = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=length - 1))
        images = first + (second - first) * weight
    return images


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 convolutions and products in float32, without TF32 or bfloat16, and the same way every time; the
    settings are restored afterwards."""
    with float32_as("ieee"), deterministic_convolutions():
        yield
