"""Large files of samples: streamed, in flat memory, readable by NumPy and by ADM's reader."""

import hashlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from ddt_fast.generation.npz import open_images, write_npz


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


def test_files_that_are_no_samples_are_one_error(tmp_path):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=images)
    with pytest.raises(ValueError, match="is compressed"):
        open_images(tmp_path / "compressed.npz")
    np.savez(tmp_path / "other.npz", x=images)
    with pytest.raises(ValueError, match="not an npz file with an arr_0"):
        open_images(tmp_path / "other.npz")
    write_npz(tmp_path / "cut.npz", images.shape, [images])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:150])
    with pytest.raises(ValueError, match="not an npz file"):
        open_images(tmp_path / "cut.npz")


MERGE = """
import resource, sys
from pathlib import Path
import numpy as np
from ddt_fast.generation import finish
from ddt_fast.generation.seeds import Assignment
from ddt_fast.generation.shards import ShardFolder

images = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), dtype=np.uint8)
for num_shards in (4, 24):
    output = Path(sys.argv[1], str(num_shards))
    output.mkdir()
    shards = ShardFolder(output, {}, num_shards * 64, 64, 64)
    shards.begin()
    for shard in range(num_shards):
        shards.write(shard, images, {"seconds": 1.0})
    indices = np.arange(num_shards * 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = finish.finish(output, shards, Assignment(indices, indices, indices), {}, 3)
    print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, record["bytes"])
"""


@pytest.mark.slow
def test_memory_of_the_merge_does_not_grow_with_the_number_of_images(tmp_path):
    """12.6 MB a shard; written from 4 and from 24 of them, 302 MB."""
    result = subprocess.run([sys.executable, "-c", MERGE, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (before, peak, _), (_, later, size) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert size > 24 * 64 * 256 * 256 * 3
    assert peak - before < 60_000  # KiB; a shard twice, and the grid
    assert later < 1.05 * peak
    last, first = open_images(tmp_path / "24" / "samples.npz")[-64:], open_images(tmp_path / "4" / "samples.npz")[:64]
    assert hashlib.sha256(last).hexdigest() == hashlib.sha256(first).hexdigest()
