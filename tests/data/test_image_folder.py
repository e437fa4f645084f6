"""Listing, cropping and reading images."""

import numpy as np
import pytest
import torch
from latent_cases import make_images
from PIL import Image

from ddt_fast.data.image_folder import UnreadableImageError, center_crop, list_images, read_image


def test_labels_follow_the_sorted_class_names(tmp_path):
    root = make_images(tmp_path / "images", {"n02": 2, "n01": 1, "n10": 3})
    (root / "n10" / "deeper").mkdir()
    (root / "n10" / "000.png").rename(root / "n10" / "deeper" / "a.PNG")
    (root / "n10" / "notes.txt").write_text("no image")
    (root / "readme").write_text("no image")
    (root / ".git").mkdir()
    folder = list_images(root)
    assert folder.class_names == ("n01", "n02", "n10")
    assert folder.files == (
        "n01/000.png",
        "n02/000.png",
        "n02/001.png",
        "n10/001.png",
        "n10/002.png",
        "n10/deeper/a.PNG",
    )
    assert folder.labels == (0, 1, 1, 2, 2, 2)
    assert [folder.labels.count(label) for label in range(3)] == [1, 2, 3]
    assert folder.ignored == ("n10/notes.txt", "readme")


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        list_images(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no class folders"):
        list_images(tmp_path)
    root = make_images(tmp_path / "images", {"a": 1, "b": 1})
    (root / "b" / "000.png").unlink()
    with pytest.raises(ValueError, match="b holds no images"):
        list_images(root)


@pytest.mark.parametrize("size", [(16, 16), (64, 33), (31, 70), (130, 64), (5, 40), (257, 128)])
def test_crop_is_the_middle_at_the_given_size(size):
    ramp = np.tile(np.linspace(0, 255, size[0], dtype=np.float32), (size[1], 1))
    cropped = np.asarray(center_crop(Image.fromarray(ramp), 16))
    assert cropped.shape == (16, 16)
    width = 255 * min(size) / size[0]  # what the middle square spans of the ramp
    middle = cropped[8]
    # An odd margin puts the crop half a pixel off the middle.
    assert abs(middle.mean() - 127.5) <= width / 16
    assert abs((middle[-1] - middle[0]) - width * 15 / 16) <= width / 8


def test_large_images_are_halved_by_boxes_before_the_bicubic_step():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8).astype(np.float32)
    boxes = pixels.reshape(16, 4, 16, 4).mean((1, 3))
    np.testing.assert_allclose(np.asarray(center_crop(Image.fromarray(pixels), 16)), boxes, atol=1e-3)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (20, 30), (255, 255, 255)).convert(mode).save(file)
    image = read_image(file, 16)
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.uint8
    assert image.min() >= 254


def test_unreadable_images_say_why(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    content = whole.read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    for name, reason in (
        ("cut.jpg", "truncated"),
        ("empty.jpg", "not an image"),
        ("text.png", "not an image"),
        ("missing.png", "No such file"),
    ):
        with pytest.raises(UnreadableImageError, match=reason) as error:
            read_image(tmp_path / name, 16)
        assert str(tmp_path) not in str(error.value)
