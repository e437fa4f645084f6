"""One image, from whatever file holds it, as 8-bit RGB, and the crop that ADM and its successors train on.

Every command that takes images reads them here. What becomes of them:
    16 bits a channel     the high byte (value >> 8); of TIFFs with fewer bits, their high 8 bits
    32-bit integers, floats  unreadable: their formats do not say which value is white
    transparency          composited on white, also that of palettes
    palettes, CMYK, Lab, 1 bit  converted by Pillow, without the file's colour profile
    EXIF orientation      ignored, as by ADM and torchvision: the pixels as they are stored
    several frames        the first
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

Images = NDArray[np.uint8]
"""(N, H, W, 3) RGB."""

_ARRAY_DTYPES = (np.uint8, np.uint16)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
# Beyond this ratio of the sides, an image that must be enlarged is cropped first: its long side could fill the memory.
_EXTREME_RATIO = 16


class Member(NamedTuple):
    """An image inside a file that holds several.

    Attributes:
        file: the tar or .npy file.
        start: first byte in a tar, row in a .npy stack.
        length: bytes in a tar.
        label: class that the tar gives it, if any.
        damage: why the file cannot be read, if it cannot.
        wrong_label: why the tar's .cls or .json for it holds no class, if it does not.
    """

    file: str
    start: int = 0
    length: int = 0
    label: int | None = None
    damage: str | None = None
    wrong_label: str | None = None


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message says why, without the path."""


def read_pixels(file: Path, crop: int | None = None, member: Member | None = None) -> NDArray[np.uint8]:
    """Read an image, (H, W, 3) uint8 RGB.

    Args:
        file: the file; with `member`, the one that holds it.
        crop: side of the centre crop; None reads the image whole.
        member: which of the file's images.

    Raises:
        UnreadableImageError: the file is missing, unreadable, truncated, not an image, or of unknown range.
    """
    with _opened(file, member) as image:
        rgb = to_rgb(image)
        return np.asarray(rgb if crop is None else center_crop(rgb, crop))


def check_image(file: Path, member: Member | None = None) -> tuple[int, int]:
    """Decode an image, a JPEG at an eighth of its size, and return its height and width.

    Raises:
        UnreadableImageError: as `read_pixels`.
    """
    with _opened(file, member) as image:
        width, height = image.size
        image.draft(None, (1, 1))
        to_rgb(image)
        return height, width


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to 8-bit RGB, as this module's docstring says; UnreadableImageError if its range is not
    known."""
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not sixteen_bits:
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise UnreadableImageError(
            f"mode {image.mode} ({kind}) does not say which value is white; expected 8 or 16 bits"
        )
    if sixteen_bits:
        image = _high_byte(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """The image of 16-bit greys in 8 bits: mode L, or LA if one grey is transparent."""
    values = np.asarray(image).astype(np.uint16)
    bits = 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2[_BITS_PER_SAMPLE][0]
        if image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = ~values  # Pillow inverts 8 bits, not 16
    grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` and take the middle size x size pixels, as ADM does (arXiv 2105.05233,
    guided-diffusion): halve with a box filter while the side is at least 2 * size, then resize bicubically."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if scale > 1 and max(image.size) > _EXTREME_RATIO * min(image.size):
        # Only around the crop, with what the filter reads there: 2 pixels of the image on each side.
        margin = math.ceil(3 * scale)
        x0, x1 = max(0, left - margin), min(width, left + size + margin)
        y0, y1 = max(0, top - margin), min(height, top + size + margin)
        across, down = image.width / width, image.height / height
        box = (x0 * across, y0 * down, x1 * across, y1 * down)
        image = image.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box=box)
        return image.crop((left - x0, top - y0, left - x0 + size, top - y0 + size))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


@contextmanager
def _opened(file: Path, member: Member | None) -> Iterator[Image.Image]:
    """The image, opened; what goes wrong inside becomes an UnreadableImageError."""
    try:
        if member is not None and member.damage is not None:
            raise UnreadableImageError(member.damage)
        if file.suffix.lower() == ".npy":
            yield _array_image(file, None if member is None else member.start)
            return
        content: Path | io.BytesIO = file
        if member is not None:
            with file.open("rb") as stream:
                stream.seek(member.start)
                content = io.BytesIO(stream.read(member.length))
        with Image.open(content) as image:
            yield image
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError("not an image that Pillow can read") from None
    except MemoryError:
        raise UnreadableImageError("does not fit in memory") from None
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    except Exception as error:  # a decoder may raise anything on damaged bytes: SyntaxError, IndexError, …
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _array_image(file: Path, row: int | None) -> Image.Image:
    """The image in a .npy file, or one row of its stack."""
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    pixels = array if row is None else array[row]
    grey_or_rgb = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if array.dtype not in _ARRAY_DTYPES or not grey_or_rgb or 0 in pixels.shape:
        expected = "uint8 or uint16 (H, W), (H, W, 3) or (N, H, W, 3)"
        raise UnreadableImageError(f"an array of {array.dtype} {array.shape}; expected {expected}")
    return Image.fromarray((pixels >> 8 if array.dtype == np.uint16 else pixels).astype(np.uint8))


def is_stack(array: NDArray[Any]) -> bool:
    """Whether the array of a .npy file is a stack of RGB images."""
    return array.dtype in _ARRAY_DTYPES and array.ndim == 4 and array.shape[3] == 3
