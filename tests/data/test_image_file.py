"""One image: its values as 8-bit RGB, its crop, and why it cannot be read."""

import io
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddt_fast.data.image_file import UnreadableImageError, center_crop, check_image, read_pixels, to_rgb


def crop_of_adm(image: Image.Image, size: int) -> np.ndarray:
    """By its definition, all of the image at every step."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].astype(int)


@pytest.mark.parametrize(
    ("size", "rounding"),
    [
        *((size, 0) for size in [(16, 16), (64, 33), (31, 70), (130, 64), (5, 40), (257, 128)]),
        # Thin images are cropped before the last step, which changes them by no more than rounding.
        *((size, 2) for size in [(10, 200), (250, 15), (4, 500), (2, 1500)]),
    ],
)
def test_the_crop_is_that_of_adm(size, rounding):
    # Far from black and white: Pillow clips between its two passes, whose order depends on its version and the size.
    pixels = np.random.default_rng(0).integers(96, 160, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert abs(np.asarray(center_crop(image, 16)) - crop_of_adm(image, 16)).max() <= rounding


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LAB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    file = tmp_path / ("x.tif" if mode in ("CMYK", "LAB") else "x.png")
    Image.new("RGB", (20, 30), (255, 255, 255)).convert(mode).save(file)
    image = read_pixels(file, 16)
    assert (image.shape, image.dtype) == ((16, 16, 3), np.uint8)
    assert image.min() >= 254


@pytest.mark.parametrize(("end", "dtype"), [*((end, "u2") for end in ("png", "tif", "jp2", "pgm")), ("tif", ">u2")])
def test_sixteen_bits_are_read_by_their_high_byte(tmp_path, end, dtype):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    values[3, 3] = 0x12FF
    Image.fromarray(values.astype(dtype)).save(tmp_path / f"x.{end}")
    read = read_pixels(tmp_path / f"x.{end}")
    np.testing.assert_array_equal(read, (values >> 8).astype(np.uint8)[..., None].repeat(3, 2))


def test_what_tiffs_say_of_their_greys_is_heeded(tmp_path):
    """12 bits, and 16 where 0 is white: Pillow hands both on as they are stored."""
    file = tmp_path / "x.tif"
    Image.fromarray(np.array([[0x1234, 0xFFFF]], np.uint16)).save(file, tiffinfo={262: 0})
    assert read_pixels(file)[..., 0].tolist() == [[0xED, 0]]
    content = io.BytesIO()
    Image.fromarray(np.array([[0x0180]], np.uint16)).save(content, "TIFF")
    file.write_bytes(content.getvalue())
    with Image.open(file) as image:
        image.load()
        image.tag_v2[258] = (12,)
        assert to_rgb(image).getpixel((0, 0)) == (0x18,) * 3


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), {}, (255, 0, 0)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), {}, (127, 127, 127)),
        (Image.new("LA", (4, 4), (0, 0)), {}, (255, 255, 255)),
        (Image.new("LA", (4, 4), (9, 255)), {}, (9, 9, 9)),
        (Image.new("P", (4, 4), 0), {"transparency": 0}, (255, 255, 255)),
        (Image.new("P", (4, 4), 0), {"transparency": 1}, (0, 0, 0)),
        (Image.new("L", (4, 4), 9), {"transparency": 9}, (255, 255, 255)),
        (Image.new("RGB", (4, 4), (9, 8, 7)), {"transparency": (9, 8, 7)}, (255, 255, 255)),
        (Image.new("1", (4, 4), 0), {"transparency": 0}, (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 0x8001, np.uint16)), {"transparency": 0x8001}, (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 0x8001, np.uint16)), {"transparency": 0x8002}, (128, 128, 128)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "-".join(map(str, value)),
)
def test_transparency_is_composited_on_white(tmp_path, image, options, expected):
    if image.mode == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "x.png", **options)
    assert tuple(read_pixels(tmp_path / "x.png")[0, 0]) == expected
    if image.mode == "P":
        image.save(tmp_path / "x.gif", **options)
        assert tuple(read_pixels(tmp_path / "x.gif")[0, 0]) == expected
    pa = Image.new("PA", (1, 1))
    assert to_rgb(pa).getpixel((0, 0)) == (255, 255, 255)


def test_the_orientation_in_exif_is_ignored(tmp_path):
    image, exif = Image.new("RGB", (20, 10), "red"), Image.Exif()
    image.paste("blue", (10, 0, 20, 10))
    exif[0x0112] = 6  # shown turned by 90 degrees
    image.save(tmp_path / "x.png", exif=exif)
    read = read_pixels(tmp_path / "x.png")
    assert read.shape == (10, 20, 3)
    assert (tuple(read[5, 0]), tuple(read[5, 19])) == ((255, 0, 0), (0, 0, 255))


@pytest.mark.parametrize("size", [(83333, 1), (1, 83333), (40000, 2), (17, 30000)])
def test_thin_images_take_little_memory(tmp_path, size):
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)[:, None].repeat(min(size), 1)
    Image.fromarray(ramp if size[1] > size[0] else np.ascontiguousarray(ramp.T)).save(tmp_path / "x.png")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, limits[1]))
    try:
        read = read_pixels(tmp_path / "x.png", 256)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert read.shape == (256, 256, 3)
    assert abs(read.astype(int) - 127).max() <= 1


def test_unreadable_images_say_why(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    content, side = whole.read_bytes(), (65535).to_bytes(2, "little")
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    bomb = b"GIF89a" + 2 * side + b"\x80\x00\x00" + bytes(6) + b"\x2c" + bytes(4) + 2 * side + b"\x00\x02"
    (tmp_path / "bomb.gif").write_bytes(bomb)
    for name, dtype in (("integers.tif", np.int32), ("floats.tif", np.float32)):
        Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / name)
    for name, reason in (
        ("cut.jpg", "truncated"),
        ("empty.jpg", "not an image"),
        ("text.png", "not an image"),
        ("missing.png", "No such file"),
        ("bomb.gif", "exceeds limit"),
        ("integers.tif", r"mode I \(32-bit integers\) does not say .*; expected 8 or 16 bits"),
        ("floats.tif", r"mode F \(floats\) does not say .*; expected 8 or 16 bits"),
    ):
        for read in (read_pixels, check_image):
            with pytest.raises(UnreadableImageError, match=reason) as error:
                read(tmp_path / name)
            assert str(tmp_path) not in str(error.value)
