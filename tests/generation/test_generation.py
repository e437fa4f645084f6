"""Pictures, labels, and files that are never half-written."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ddt_fast.files import atomic_file, atomic_folder, check_replaceable, output_folder
from ddt_fast.generation.images import labelled_grid, to_uint8
from ddt_fast.generation.seeds import assign_labels


def test_uint8_follows_the_released_rounding():
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.9999, 1.0, 3.0]).view(1, 1, 1, 7)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]
    colour = torch.rand(2, 3, 4, 5)
    assert to_uint8(colour).shape == (2, 4, 5, 3)
    np.testing.assert_array_equal(to_uint8(colour)[..., 1], to_uint8(colour[:, 1:2])[..., 0])


def test_labels_cycle_through_the_classes():
    assert assign_labels(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert assign_labels(3, 10, [7, 2]).tolist() == [7, 2, 7]
    with pytest.raises(ValueError, match="class 10 does not exist; allowed: 0 to 9"):
        assign_labels(3, 10, [1, 10])


def test_grid_holds_every_image_above_its_caption():
    images = np.zeros((5, 8, 8, 3), np.uint8)
    images[3] = 255
    grid = labelled_grid(images, list("01234"), columns=2)
    pixels = np.asarray(grid)
    cell_height, cell_width = grid.height // 3, grid.width // 2
    assert (pixels[cell_height : cell_height + 64, cell_width : cell_width + 64] == 255).all()
    assert (pixels[:64, :64] == 0).all()
    caption = pixels[64 : 64 + 16, :64]
    assert (caption < 128).any()
    assert (caption == 255).any()


def test_files_appear_whole_or_not_at_all(tmp_path):
    def failing(kind):
        with kind as temporary:
            (temporary / "x" if temporary.is_dir() else temporary).write_text("half")
            raise RuntimeError("stopped")

    for kind in (atomic_file(tmp_path / "out.png"), atomic_folder(tmp_path / "out", "x")):
        with pytest.raises(RuntimeError, match="stopped"):
            failing(kind)
        assert list(tmp_path.iterdir()) == []
    with atomic_file(tmp_path / "out.png") as temporary:
        Image.new("RGB", (2, 2)).save(temporary)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def noting(descriptor):
        fsync(descriptor)
        events.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("named"), replace(*names)))
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("content")
    assert events == [(tmp_path / "file").stat().st_ino, "named", tmp_path.stat().st_ino]
    events.clear()
    with atomic_folder(tmp_path / "folder", "x") as temporary:
        (temporary / "x").write_text("content")
    places = (tmp_path / "folder" / "x", tmp_path / "folder", tmp_path)
    assert events == [place.stat().st_ino for place in places]


def test_outputs_have_the_rights_of_any_new_file(tmp_path):
    with atomic_folder(tmp_path / "folder", "private") as temporary:
        (temporary / "private").touch(mode=0o600)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder" / "private").stat().st_mode == (tmp_path / "plain" / "file").stat().st_mode


def test_folders_of_the_user_are_never_replaced(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds mine\.txt, which ddt-fast did not write"):
        atomic_folder(tmp_path / "images", r"\d+\.png").__enter__()
    assert (tmp_path / "images" / "mine.txt").read_text() == "precious"
    (tmp_path / "link").symlink_to(tmp_path / "images")
    for name in ("link", "images/mine.txt"):
        with pytest.raises(ValueError, match="exists and is not a folder"):
            check_replaceable(tmp_path / name, ".*")
    with atomic_folder(tmp_path / "images", r".*\.txt") as temporary:
        (temporary / "new.txt").touch()
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["new.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "link"]


def test_unwritable_folders_are_found_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        output_folder(str(tmp_path / "file" / "folder"))
    with pytest.raises(ValueError, match="cannot be written"):
        output_folder(str(tmp_path / "file"))
    with pytest.raises(ValueError, match="empty name"):
        output_folder("")
    assert output_folder(str(tmp_path / "new" / "folder")).is_dir()
