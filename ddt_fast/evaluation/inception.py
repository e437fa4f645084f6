"""The Inception network of FID: TensorFlow's graph of 2015-12-05, which every published FID uses.

It differs from torchvision's Inception v3: 1008 classes; average pools leave out the padding; the last block pools by
maximum; images are resized as in TensorFlow 1. Parameter names are those of the published weights file (see
`inception_weights`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

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


class _Conv(NamedTuple):
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class _Fork(tuple[_Conv, ...]):
    """Convolutions of the same input, side by side."""


# The steps of a block's branch: convolutions, a fork at the end, or a pool ("average", "maximum", or "halve").
_Step = _Conv | _Fork | str


class _ConvNormReLU(nn.Module):
    def __init__(self, in_channels: int, conv: _Conv, padded: bool) -> None:
        super().__init__()
        padding = tuple(size // 2 for size in conv.kernel) if padded else 0
        self.conv = nn.Conv2d(in_channels, conv.channels, conv.kernel, conv.stride, padding, bias=False)  # type: ignore[arg-type]
        self.bn: nn.Module = nn.BatchNorm2d(conv.channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Move the normalisation into the convolution's weights."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.bn)
            self.bn = nn.Identity()


class _Block(nn.Module):
    """Branches of one input, concatenated. A single convolution has the name of its branch; of several, the i-th is
    called NAME_i, and those of a fork NAME_ia, NAME_ib."""

    def __init__(self, in_channels: int, branches: dict[str, list[_Step]]) -> None:
        super().__init__()
        self.out_channels = 0
        # For each branch and step: the names of convolutions side by side, or a pool.
        self.branches: list[list[tuple[str, ...] | str]] = []
        for branch, steps in branches.items():
            channels = in_channels
            plan: list[tuple[str, ...] | str] = []
            num_convs = sum(not isinstance(step, str) for step in steps)
            for step in steps:
                if isinstance(step, str):
                    plan.append(step)
                    continue
                index = 1 + sum(not isinstance(done, str) for done in plan)
                name = f"{branch}_{index}" if num_convs > 1 else branch
                names = [name + "a", name + "b"] if isinstance(step, _Fork) else [name]
                parts = dict(zip(names, step if isinstance(step, _Fork) else [step], strict=True))
                for part, conv in parts.items():
                    self.add_module(part, _ConvNormReLU(channels, conv, padded=conv.stride == 1))
                plan.append(tuple(parts))
                channels = sum(conv.channels for conv in parts.values())
            self.branches.append(plan)
            self.out_channels += channels

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self.branches:
            y = x
            for step in steps:
                if isinstance(step, str):
                    y = _pool(step, y)
                else:
                    parts = [self.get_submodule(name)(y) for name in step]
                    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def _pool(kind: str, x: Tensor) -> Tensor:
    if kind == "average":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return F.max_pool2d(x, 3, stride=1, padding=1) if kind == "maximum" else F.max_pool2d(x, 3, stride=2)


def _block_35(pool_channels: int) -> dict[str, list[_Step]]:
    return {
        "branch1x1": [_Conv(64)],
        "branch5x5": [_Conv(48), _Conv(64, (5, 5))],
        "branch3x3dbl": [_Conv(64), _Conv(96, (3, 3)), _Conv(96, (3, 3))],
        "branch_pool": ["average", _Conv(pool_channels)],
    }


def _block_17(c: int) -> dict[str, list[_Step]]:
    row, column = (1, 7), (7, 1)
    return {
        "branch1x1": [_Conv(192)],
        "branch7x7": [_Conv(c), _Conv(c, row), _Conv(192, column)],
        "branch7x7dbl": [_Conv(c), _Conv(c, column), _Conv(c, row), _Conv(c, column), _Conv(192, row)],
        "branch_pool": ["average", _Conv(192)],
    }


def _block_8(pool: str) -> dict[str, list[_Step]]:
    fork = _Fork((_Conv(384, (1, 3)), _Conv(384, (3, 1))))
    return {
        "branch1x1": [_Conv(320)],
        "branch3x3": [_Conv(384), fork],
        "branch3x3dbl": [_Conv(448), _Conv(384, (3, 3)), fork],
        "branch_pool": [pool, _Conv(192)],
    }


_TO_17: dict[str, list[_Step]] = {
    "branch3x3": [_Conv(384, (3, 3), 2)],
    "branch3x3dbl": [_Conv(64), _Conv(96, (3, 3)), _Conv(96, (3, 3), 2)],
    "branch_pool": ["halve"],
}
_TO_8: dict[str, list[_Step]] = {
    "branch3x3": [_Conv(192), _Conv(320, (3, 3), 2)],
    "branch7x7x3": [_Conv(192), _Conv(192, (1, 7)), _Conv(192, (7, 1)), _Conv(192, (3, 3), 2)],
    "branch_pool": ["halve"],
}
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
        self.Conv2d_1a_3x3 = _ConvNormReLU(3, _Conv(32, (3, 3), 2), padded=False)
        self.Conv2d_2a_3x3 = _ConvNormReLU(32, _Conv(32, (3, 3)), padded=False)
        self.Conv2d_2b_3x3 = _ConvNormReLU(32, _Conv(64, (3, 3)), padded=True)
        self.Conv2d_3b_1x1 = _ConvNormReLU(64, _Conv(80), padded=False)
        self.Conv2d_4a_3x3 = _ConvNormReLU(80, _Conv(192, (3, 3)), padded=False)
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
            if isinstance(module, _ConvNormReLU):
                module.fold()
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
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
