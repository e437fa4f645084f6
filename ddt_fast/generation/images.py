"""From samples to pictures: conversion to uint8, and labelled grids."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddt_fast.data.image_file import Images

_CAPTION_HEIGHT = 16
_GAP = 2


def quantize_pixels(images: Tensor) -> Tensor:
    """(N, 1 or 3, H, W) in [-1, 1] → (N, H, W, 3) uint8 on the same device: clip((x + 1) * 127.5 + 0.5, 0, 255), with
    grey repeated."""
    pixels = ((images.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def to_uint8(images: Tensor) -> Images:
    """As `quantize_pixels`, as a NumPy array."""
    return quantize_pixels(images).cpu().numpy()


def grid_columns(num_classes: int) -> int:
    """Up to 10 columns, such that images that cycle through the classes have one class per column; 10 for more than
    10 classes."""
    return 10 if num_classes > 10 else 10 - 10 % num_classes


def labelled_grid(images: Images, captions: Sequence[str], columns: int = 10) -> Image.Image:
    """A grid of (N, H, W, 3) uint8 images, one or more, each above its caption; small images are enlarged to about 64
    pixels."""
    count, height, width, _ = images.shape
    zoom = max(1, 64 // height)
    columns = min(columns, count)
    cell_width, cell_height = width * zoom + _GAP, height * zoom + _CAPTION_HEIGHT + _GAP
    grid = Image.new("RGB", (columns * cell_width, -(-count // columns) * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * cell_width, i // columns * cell_height
        enlarged = Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        grid.paste(enlarged, (left, top))
        while len(caption) > 1 and font.getlength(caption) > cell_width:
            caption = f"{caption[:-2]}…"
        draw.text((left + width * zoom / 2, top + height * zoom + 1), caption, fill="black", font=font, anchor="ma")
    return grid
