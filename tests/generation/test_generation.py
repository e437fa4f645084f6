"""Pictures, labels, their order in a file (mixed, and fixed for all time), and files that are never half-written."""

import hashlib
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddt_fast.files import atomic_file, atomic_folder, check_replaceable, output_folder
from ddt_fast.generation.images import grid_columns, labelled_grid, to_uint8
from ddt_fast.generation.npz import open_images, write_npz
from ddt_fast.generation.seeds import Assignment, assign_labels, shuffled_order


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
    for name, message in ((tmp_path / "file" / "folder", "cannot be written: Not a directory"), ("", "is empty")):
        with pytest.raises(ValueError, match=message):
            output_folder(str(name))
    assert output_folder(str(tmp_path / "new" / "folder")).is_dir()


def test_the_permutation_never_changes_and_is_nested():
    assert shuffled_order(12).tolist() == [2, 4, 6, 8, 5, 10, 1, 11, 7, 0, 9, 3]
    digest = hashlib.sha256(shuffled_order(50_000).astype("<i8").tobytes()).hexdigest()
    assert digest == "d622806430ecc5bef7f2b1028f2d7f3ce52a44cde5e23d44bda036f5213a72db"
    order = shuffled_order(5000)
    assert sorted(order.tolist()) == list(range(5000))
    np.testing.assert_array_equal(order[order < 700], shuffled_order(700))


def test_contiguous_splits_hold_all_classes_about_equally():
    """What ADM's Inception Score needs of 50,000 samples in 10 splits: as mixed as drawing at random."""
    drawn = Assignment.of_draws(assign_labels(50_000, 1000), range(50_000), shuffle=True)
    assert np.bincount(drawn.labels).tolist() == [50] * 1000
    for split in np.split(drawn.labels, 10):
        counts = np.bincount(split, minlength=1000)
        assert (counts > 0).sum() > 980
        assert 1.9 < counts.std() < 2.4  # hypergeometric: sqrt(50 · 0.1 · 0.9) = 2.12
    np.testing.assert_array_equal(drawn.labels, drawn.seeds % 1000)


def test_first_draws_are_found_wherever_they_lie():
    drawn = Assignment.of_draws(assign_labels(200, 10), range(300, 500), shuffle=True)
    positions = drawn.first_draws(20)
    assert drawn.seeds[positions].tolist() == list(range(300, 320))
    assert drawn.labels[positions].tolist() == [*range(10), *range(10)]
    assert len(drawn.first_draws(1000)) == 200
    plain = Assignment.of_draws(torch.tensor([3, 1]), [5, 2**63 - 1], shuffle=False)
    assert plain.seeds.tolist() == [5, 2**63 - 1]


def test_grids_of_few_classes_have_whole_rounds_in_a_row():
    assert [grid_columns(classes) for classes in (1, 2, 3, 4, 6, 7, 10, 1000)] == [10, 10, 9, 8, 6, 7, 10, 10]


def test_numpy_reads_what_was_streamed_and_the_same_images_make_the_same_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
    for name in "ab":
        parts = (images[:3], images[3:][:, ::-1][:, ::-1])
        write_npz(tmp_path / f"{name}.npz", images.shape, iter(parts), labels=np.arange(7))
    with np.load(tmp_path / "a.npz") as saved:
        np.testing.assert_array_equal(saved["arr_0"], images)
        assert saved["labels"].tolist() == list(range(7))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive, archive.open("arr_0.npy") as stream:
        assert archive.testzip() is None
        assert np.lib.format.read_magic(stream) == (1, 0)  # the only version ADM's reader takes
    opened = open_images(tmp_path / "a.npz")
    assert isinstance(opened, np.memmap)
    np.testing.assert_array_equal(opened, images)


def test_wrong_parts_are_refused(tmp_path):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="4 samples; expected 3"):
        write_npz(tmp_path / "x.npz", (3, 4, 4, 3), [images, images])
    with pytest.raises(ValueError, match=r"samples are \(4, 4, 3\) float32; expected \(4, 4, 3\) uint8"):
        write_npz(tmp_path / "x.npz", (2, 4, 4, 3), [images.astype(np.float32)])


def test_other_files_are_refused(tmp_path):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=images)
    np.savez(tmp_path / "other.npz", x=images)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:150])
    for name, message in (("compressed", "is compressed"), ("other", "with an arr_0"), ("cut", "not an npz file")):
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / f"{name}.npz")


MERGE = """
import resource, sys
from pathlib import Path
import numpy as np
from ddt_fast.generation import finish
from ddt_fast.generation.seeds import Assignment
from ddt_fast.generation.shards import ShardFolder

images = np.random.default_rng(0).integers(0, 256, (32, 256, 256, 3), dtype=np.uint8)
for num_shards in (4, 12):
    output = Path(sys.argv[1], str(num_shards))
    output.mkdir()
    shards = ShardFolder(output, {}, num_shards * 32, 32, 32)
    shards.begin()
    for shard in range(num_shards):
        shards.write(shard, images, {"seconds": 1.0})
    indices = np.arange(num_shards * 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = finish.finish(output, shards, Assignment(indices, indices, indices), {}, 3)
    print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, record["bytes"])
"""


@pytest.mark.slow
def test_memory_of_the_merge_does_not_grow_with_the_number_of_images(tmp_path):
    """6.3 MB a shard; written from 4 and from 12 of them, 75 MB."""
    result = subprocess.run([sys.executable, "-c", MERGE, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (before, peak, _), (_, later, size) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert size > 12 * 32 * 256 * 256 * 3
    assert peak - before < 40_000  # KiB; a shard twice, and the grid
    assert later < 1.05 * peak
    last, first = open_images(tmp_path / "12" / "samples.npz")[-32:], open_images(tmp_path / "4" / "samples.npz")[:32]
    assert hashlib.sha256(last).hexdigest() == hashlib.sha256(first).hexdigest()
