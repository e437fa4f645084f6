"""Listing images and their classes: files, links, tars and arrays."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from latent_cases import make_images
from PIL import Image
from torch.utils.data import DataLoader

from ddt_fast.data.image_file import UnreadableImageError
from ddt_fast.data.image_folder import find_images, list_images


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
        *("n01/000.png", "n02/000.png", "n02/001.png", "n10/001.png", "n10/002.png", "n10/deeper/a.PNG"),
    )
    assert folder.labels == (0, 1, 1, 2, 2, 2)
    assert [folder.labels.count(label) for label in range(3)] == [1, 2, 3]
    assert folder.passed_over == "passed over 2 files not named like images: 1 .txt, 1 without an ending"
    assert folder.images.names == folder.files


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        list_images(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no images; expected images .*; it is empty"):
        list_images(tmp_path)
    root = make_images(tmp_path / "images", {"a": 1, "b": 1})
    (root / "b" / "000.png").unlink()
    with pytest.raises(ValueError, match="b holds no images"):
        list_images(root)


@pytest.mark.parametrize("place", ["a", "a/deep", "."])
@pytest.mark.parametrize("target", ["..", "../..", "here", "sibling"])
def test_every_real_folder_is_read_once(tmp_path, place, target):
    root = make_images(tmp_path / "images", {"a": 2, "b": 1})
    make_images(root / "a", {"deep": 1})
    link = root / place / "zz"
    link.symlink_to({"here": ".", "sibling": root / "b"}.get(target, target))
    folder = list_images(root)
    assert folder.files == ("a/000.png", "a/001.png", "a/deep/000.png", "b/000.png")
    assert folder.class_names == ("a", "b")
    shown = link.relative_to(root).as_posix()
    assert folder.passed_over == f"passed over 1 link to folders that are read anyway, such as {shown}"


def test_two_links_to_each_other_end(tmp_path):
    root = make_images(tmp_path / "images", {"a": 1, "b": 1})
    (root / "a" / "to_b").symlink_to("../b")
    (root / "b" / "to_a").symlink_to("../a")
    (root / "b" / "itself.png").symlink_to("itself.png")
    (root / "b" / "nowhere.png").symlink_to("nothing.png")
    os.mkfifo(root / "b" / "pipe.png")
    folder = list_images(root)
    assert folder.files == ("a/000.png", "b/000.png", "b/itself.png", "b/nowhere.png")
    for index in (2, 3):
        with pytest.raises(UnreadableImageError, match=r"symbolic links|No such file"):
            folder.read(index, 16)


def test_links_to_folders_elsewhere_are_classes(tmp_path):
    store = make_images(tmp_path / "store", {"x": 2, "y": 1})
    root = tmp_path / "images"
    root.mkdir()
    for name, target in (("cat", "x"), ("dog", "y"), ("same", "y")):
        (root / name).symlink_to(store / target)
    folder = list_images(root)
    assert folder.files == ("cat/000.png", "cat/001.png", "dog/000.png")
    assert folder.class_names == ("cat", "dog")


def test_names_that_pillow_knows_are_images_and_others_are_counted(tmp_path):
    root = make_images(tmp_path / "images", {"a": 1})
    pixels = Image.new("RGB", (20, 20), "red")
    read = [".jfif", ".jpe", ".JPG", ".jp2", ".tga", ".webp", ".avif"]
    for end in read:
        if end.lower() in Image.registered_extensions():
            pixels.save(root / "a" / f"x{end}")
    for name in ("notes.txt", "more.txt", "list.json", ".DS_Store", "README", "film.mpg", "page.eps"):
        (root / "a" / name).touch()
    folder = list_images(root)
    assert len(folder.files) == 1 + len(read) - (".avif" not in Image.registered_extensions())
    for index in range(1, len(folder.files)):
        assert abs(folder.read(index, 16).float().mean((1, 2)) - torch.tensor([255.0, 0, 0])).max() < 3
    assert folder.passed_over == (
        "passed over 7 files not named like images: 1 .eps, 1 .json, 1 .mpg, 2 .txt, 1 hidden, 1 without an ending"
    )


def test_a_folder_without_class_folders_is_one_class(tmp_path):
    make_images(tmp_path, {"flowers.v2": 3})
    folder = list_images(tmp_path / "flowers.v2")
    assert (folder.class_names, folder.labels) == (("flowers.v2",), (0, 0, 0))
    make_images(tmp_path / "flowers.v2", {"rose": 1})
    folder = list_images(tmp_path / "flowers.v2")
    assert (folder.class_names, folder.files) == (("rose",), ("rose/000.png",))
    assert folder.passed_over == "passed over 3 images beside the class folders"


def picture(level: int, end: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (level,) * 3).save(stream, end)
    return stream.getvalue()


def write_tar(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def levels(folder) -> list[int]:
    """The grey of each image of one colour."""
    return [int(folder.read(index, 8).float().mean()) for index in range(len(folder.files))]


def test_tars_of_webdataset_give_images_and_classes(tmp_path):
    write_tar(
        tmp_path / "w" / "b.tar",
        {"./0.png": picture(30), "./0.cls": b"2\n", "1.json": b'{"cls": 0, "text": "a"}', "1.png": picture(40)},
    )
    write_tar(
        tmp_path / "w" / "a.tar",
        {"d/7.cls": b"1", "d/7.png": picture(10), "d/7.seg.png": picture(99), "d/7.txt": b"", "d/._7.png": b"mac"},
    )
    folder = list_images(tmp_path / "w")
    assert folder.files == ("a.tar/d/7.png", "b.tar/0.png", "b.tar/1.png")
    assert (folder.labels, folder.class_names) == ((1, 2, 0), ("0", "1", "2"))
    assert levels(folder) == [10, 30, 40]
    assert folder.passed_over == "passed over 2 files not named like images: 1 .txt, 1 hidden"
    loaded = DataLoader(
        [0, 2], num_workers=2, collate_fn=lambda batch: [folder.read(i, 8).float().mean() for i in batch]
    )
    assert [batch[0] for batch in loaded] == [10, 40]
    alone = list_images(tmp_path / "w" / "b.tar")
    assert (alone.files, alone.labels) == (("b.tar/0.png", "b.tar/1.png"), (2, 0))


def test_folders_in_tars_and_around_them_are_classes(tmp_path):
    write_tar(
        tmp_path / "in" / "x.tar", {"dog/1.png": picture(5), "cat/1.v1.png": picture(6), "cat/1.v2.png": picture(7)}
    )
    folder = list_images(tmp_path / "in")
    assert folder.files == ("x.tar/cat/1.v1.png", "x.tar/cat/1.v2.png", "x.tar/dog/1.png")
    assert (folder.class_names, folder.labels) == (("cat", "dog"), (0, 0, 1))
    assert levels(folder) == [6, 7, 5]
    write_tar(tmp_path / "around" / "dog" / "x.tar", {"1.png": picture(5)})
    write_tar(tmp_path / "around" / "cat" / "x.tar", {"1.png": picture(6)})
    folder = list_images(tmp_path / "around")
    assert (folder.files, folder.class_names) == (("cat/x.tar/1.png", "dog/x.tar/1.png"), ("cat", "dog"))
    write_tar(tmp_path / "flat" / "x.tar", {"1.png": picture(5), "2.png": picture(6)})
    assert list_images(tmp_path / "flat").class_names == ("flat",)


def test_damaged_and_contradictory_tars(tmp_path):
    file = tmp_path / "w" / "a.tar"
    write_tar(file, {"0.png": picture(1), "0.cls": b"3", "1.png": picture(2), "1.cls": b"1"})
    content = file.read_bytes()
    file.write_bytes(content[:2700])  # in the second image
    (tmp_path / "w" / "c.tar").write_bytes(content[:3072] + b"x" * 512 + content[3584:])  # the header after it
    (tmp_path / "w" / "d.tar").write_bytes(content[:3300])
    (tmp_path / "w" / "b.tar").write_text("no tar")
    folder = list_images(tmp_path / "w")
    assert folder.files == ("a.tar", "a.tar/0.png", "b.tar", "c.tar", "c.tar/0.png", "d.tar", "d.tar/0.png")
    assert [folder.labels[index] for index in (1, 4, 6)] == [3, 3, 3]
    for index in (0, 2, 3, 5):
        with pytest.raises(UnreadableImageError, match="damaged tar"):
            folder.read(index, 8)
    for content, message in (
        ({"0.png": picture(1), "0.cls": b"dog"}, r"a\.tar/0\.cls holds no class: .*'dog'; expected a whole number"),
        ({"0.png": picture(1), "0.cls": b"-1"}, r"a\.tar/0\.cls holds no class: the class is -1"),
        ({"0.png": picture(1), "0.cls": b"1000000"}, r"is 1000000; expected a whole number, 0 to 999,999"),
        ({"0.png": picture(1), "0.json": b"{"}, r"a\.tar/0\.json holds no class"),
        ({"0.png": picture(1), "0.cls": b"1", "1.png": picture(1)}, r"a\.tar/1\.png has no class, although"),
    ):
        write_tar(tmp_path / "x" / "a.tar", content)
        with pytest.raises(ValueError, match=message):
            list_images(tmp_path / "x")


@pytest.mark.parametrize("label", [{"1.cls": b"2000000000"}, {"1.cls": b"\xff"}, {"1.json": b'{"cls": 0'}])
def test_an_image_with_a_wrong_class_in_its_tar_is_unreadable(tmp_path, label):
    write_tar(tmp_path / "a.tar", {"0.png": picture(3), "0.cls": b"2", "1.png": picture(4), **label})
    folder = list_images(tmp_path)
    assert folder.files == ("a.tar/0.png", "a.tar/1.png")
    assert (folder.labels[0], folder.class_names) == (2, ("0", "1", "2"))
    assert folder.read(0, 8).max() == 3
    with pytest.raises(UnreadableImageError, match=rf"a\.tar/{next(iter(label))} holds no class: "):
        folder.read(1, 8)
    images = find_images(tmp_path)  # without the classes, as scoring reads them
    assert images.read("a.tar/1.png").max() == 4


def test_arrays_in_npy_files_are_images(tmp_path):
    root = tmp_path / "images"
    for place, array in (
        ("a/grey.npy", np.full((20, 30), 1, np.uint8)),
        ("a/rgb.npy", np.full((20, 30, 3), 2, np.uint8)),
        ("a/sixteen.npy", np.full((20, 30), 0x03FF, np.uint16)),
        ("b/stack.npy", np.arange(4, 7, dtype=np.uint8)[:, None, None, None].repeat(9, 1).repeat(8, 2).repeat(3, 3)),
        ("c/empty.npy", np.zeros((0, 8, 8, 3), np.uint8)),
        ("c/float.npy", np.zeros((2, 8, 8, 3))),
        ("c/planes.npy", np.zeros((3, 8, 8), np.uint8)),
        ("c/objects.npy", np.array([None])),
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / place, array)
    folder = list_images(root)
    rows = tuple(f"b/stack.npy/00000{row}" for row in range(3))
    assert folder.files[:6] == ("a/grey.npy", "a/rgb.npy", "a/sixteen.npy", *rows)
    assert [folder.labels.count(label) for label in range(3)] == [3, 3, 4]
    assert [int(folder.read(index, 8).float().mean()) for index in range(6)] == [1, 2, 3, 4, 5, 6]
    expected = r"expected uint8 or uint16 \(H, W\), \(H, W, 3\) or \(N, H, W, 3\)"
    for index, message in enumerate(
        (r"\(0, 8, 8, 3\); " + expected, "float64 .*; " + expected, "Python objects", r"\(3, 8, 8\); ")
    ):
        with pytest.raises(UnreadableImageError, match=message):
            folder.read(6 + index, 8)
    assert list_images(root / "b" / "stack.npy").labels == (0, 0, 0)
