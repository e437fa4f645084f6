"""What can be scored: npz files, statistics and folders, read in batches; what is wrong with others; and statistics,
exact whatever the batches, mergeable, kept in ADM's format."""

import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddt_fast.data.image_file import read_pixels
from ddt_fast.evaluation.sources import open_source, open_sources
from ddt_fast.evaluation.statistics import RunningStatistics, load_statistics, save_statistics
from inception_cases import smooth_images


def write_folder(folder, images, pattern="{:04d}.png"):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / pattern.format(i))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_npz_is_read_in_batches(tmp_path, save, batch_size):
    images = smooth_images(10, 0, size=6)
    save(tmp_path / "samples.npz", arr_0=images, labels=np.arange(10))
    source = open_source(tmp_path / "samples.npz")
    assert (source.images.count, source.images.size, source.pool) == (10, (6, 6), None)
    batches = list(source.images.batches(batch_size))
    assert max(map(len, batches)) == min(batch_size, 10)
    np.testing.assert_array_equal(np.concatenate(batches), images)
    np.testing.assert_array_equal(np.concatenate(list(source.images.batches(3))), images)  # again, from the start


def test_folder_is_read_in_order_of_names(tmp_path):
    images = smooth_images(7, 0, size=6)
    write_folder(tmp_path / "set" / "b", images[4:])
    write_folder(tmp_path / "set" / "a", images[:4])
    Image.fromarray(images[0][..., 0]).save(tmp_path / "set" / "c.png")  # grey becomes RGB
    (tmp_path / "set" / "notes.txt").write_text("no image")
    (tmp_path / "set" / ".hidden.png").write_text("no image")
    with pytest.warns(UserWarning, match="set: passed over 2 files not named like images: 1 .txt, 1 hidden"):
        source = open_source(tmp_path / "set").images
    assert source.count == 8
    read = np.concatenate(list(source.batches(3)))
    np.testing.assert_array_equal(read[:7], images)
    np.testing.assert_array_equal(read[7], images[0][..., :1].repeat(3, axis=2))


@pytest.mark.parametrize(
    ("labels", "is_sorted"),
    [([0, 0, 1, 1, 2], True), ([0, 1, 0, 1, 2], False), ([1, 1, 1, 1, 1], False), (None, False)],
)
def test_labels_say_whether_a_file_is_sorted(tmp_path, labels, is_sorted):
    images = smooth_images(5, 0, size=4)
    for name in ("labels", "arr_1"):
        extra = {} if labels is None else {name: np.array(labels)}
        np.savez(tmp_path / "samples.npz", arr_0=images, **extra)
        assert open_source(tmp_path / "samples.npz").images.sorted_by_class == is_sorted
    if labels is not None:
        folder = tmp_path / "folder"
        folder.mkdir()
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(folder / f"{i:05d}_class_{label}_seed_{i}.png")
        assert open_source(folder).images.sorted_by_class == is_sorted


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"arr_0 is float64 \(2, 4, 4, 3\); expected uint8 \(N, H, W, 3\)"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"expected uint8 \(N, H, W, 3\)"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 4, 5, 3), np.uint8))}, "Fortran"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, int)}, r"labels \(labels\) is int64 \(3,\)"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "holds images; expected arr_0"),
        ({"mu_s": np.zeros(2), "sigma_s": np.eye(2)}, "holds mu_s, sigma_s; expected"),
    ],
)
def test_other_contents_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "wrong.npz")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "samples.npz"
    (tmp_path / "empty").mkdir()
    np.savez(path, arr_0=smooth_images(20, 0, size=16))
    np.save(tmp_path / "arr_0.npy", smooth_images(20, 0, size=16))
    whole, middle = path.read_bytes(), path.stat().st_size // 2
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "arr_0.npy").read_bytes()[: -5 * 16 * 16 * 3])
    (tmp_path / "cut.npz").write_bytes(whole[:middle])
    (tmp_path / "cut.npy").write_bytes((tmp_path / "arr_0.npy").read_bytes()[:-5])
    (tmp_path / "flipped.npz").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    for name, message in (
        ("missing.npz", "does not exist; expected an npz or a folder of images"),
        ("cut.npz", "is not an npz, or is truncated"),
        ("cut.npy", "cut.npy cannot be read: ValueError: mmap length is greater than file size"),
        ("flipped.npz", "cannot be read"),
        ("short.npz", "arr_0 ends at image 15"),
        ("empty", "holds no images"),
    ):
        with pytest.raises(ValueError, match=message):
            list(open_source(tmp_path / name).images.batches(4))


def test_damaged_and_mixed_folders(tmp_path):
    write_folder(tmp_path / "mixed", smooth_images(5, 0, size=6))
    Image.new("RGB", (7, 6)).save(tmp_path / "mixed" / "0003.png")
    mixed = r"0003.png has 7x6 pixels, 0000.png 6x6; expected one size"
    for message in (mixed, r"0003.png cannot be read"):
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "mixed")
        (tmp_path / "mixed" / "0003.png").write_text("not an image")


def test_images_of_a_folder_are_cropped_as_those_of_a_cache(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, (width, height) in enumerate([(40, 30), (16, 25), (100, 37)]):
        image = Image.fromarray(smooth_images(1, i, size=100)[0]).resize((width, height))
        image.save(tmp_path / "photos" / f"{i}.png")
    source = open_source(tmp_path / "photos", crop=16).images
    assert source.size == (16, 16)
    expected = np.stack([read_pixels(tmp_path / "photos" / f"{i}.png", 16) for i in range(3)])
    np.testing.assert_array_equal(np.concatenate(list(source.batches(2))), expected)
    np.savez(tmp_path / "whole.npz", arr_0=smooth_images(2, 0, size=20))
    assert open_source(tmp_path / "whole.npz", crop=16).images.size == (20, 20)
    with pytest.raises(ValueError, match="center_crop is 0; allowed: a whole number, 1 or more"):
        open_source(tmp_path / "photos", crop=0)
    with pytest.raises(ValueError, match=r"center_crop is for folders of images; .*whole\.npz is not one"):
        open_sources([str(tmp_path / "whole.npz"), None], 16)


def rows(count: int = 500, dims: int = 12, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(dims, dims, generator=generator)
    return torch.randn(count, dims, generator=generator) @ mix + offset


def running(parts) -> RunningStatistics:
    statistics = RunningStatistics()
    for part in parts:
        statistics.add(part)
    return statistics


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_batches_do_not_matter(batch):
    # An offset that would take seven digits from a sum of squares.
    data = rows(offset=1e5)
    gaussian = running(data.split(batch)).gaussian()
    assert gaussian.mu.dtype == gaussian.sigma.dtype == np.float64
    np.testing.assert_allclose(gaussian.mu, data.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(gaussian.sigma, np.cov(data.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_files_have_adms_names(tmp_path):
    pool, spatial = (running([rows(dims=dims)]).gaussian() for dims in (4, 6))
    save_statistics(tmp_path / "both.npz", pool, spatial, 500)
    with np.load(tmp_path / "both.npz") as archive:
        assert sorted(archive.files) == ["mu", "mu_s", "num_images", "sigma", "sigma_s"]
    found_pool, found_spatial, count = load_statistics(tmp_path / "both.npz")
    assert count == 500
    np.testing.assert_array_equal(found_pool.sigma, pool.sigma)
    np.testing.assert_array_equal(found_spatial.mu, spatial.mu)
    save_statistics(tmp_path / "pool.npz", pool, None, None)
    assert load_statistics(tmp_path / "pool.npz")[1:] == (None, None)
    # Other programmes save float32 too.
    np.savez(tmp_path / "float32.npz", mu=pool.mu.astype(np.float32), sigma=pool.sigma.astype(np.float32))
    assert load_statistics(tmp_path / "float32.npz")[0].mu.dtype == np.float64
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    assert load_statistics(tmp_path / "images.npz") == (None, None, None)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([rows(dims=4), torch.zeros(3, 5)], "features have 5 numbers, those before 4"),
        ([torch.full((3, 4), torch.nan)], "not finite"),
        ([torch.zeros(4)], r"expected \(B, D\)"),
        ([torch.zeros(1, 4)], "covariance of 1 row "),
    ],
)
def test_wrong_rows_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        running(parts).gaussian()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sigma": np.eye(3)}, "holds sigma but no mu; expected both"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu has shape \(3,\), sigma \(4, 4\)"),
        ({"mu": np.zeros(3, dtype=int), "sigma": np.eye(3)}, "mu is int64; expected floating point"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "mu holds numbers that are not finite"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "num_images": np.array(0.5)}, "num_images is float64"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "num_images": np.array(-3)}, "num_images is -3; .* 2 or more"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu has shape \(0,\), .* with D of 1 or more"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0.1, 1]])}, "sigma is not a .* differs from its transpose"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 2.0], [2, 1]])}, "sigma is not a .* lowest eigenvalue is -1"),
        ({"mu_s": np.zeros(1), "sigma_s": -np.eye(1)}, "sigma_s is not a .* lowest eigenvalue is -1"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "sigma holds numbers that are not finite"),
        ({"mu": np.array([{}, 1]), "sigma": np.eye(2)}, "mu cannot be read: it holds Python objects, "),
    ],
)
def test_wrong_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=rf"wrong\.npz.*{message}") as refusal:
        load_statistics(tmp_path / "wrong.npz")
    assert "allow_pickle" not in str(refusal.value)


@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.99])
def test_damaged_statistics_are_refused(tmp_path, kept):
    file = tmp_path / "wrong.npz"
    np.savez(file, mu=np.zeros(9), sigma=np.eye(9))
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"wrong\.npz cannot be read: .*; expected an npz with mu and sigma"):
        load_statistics(file)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rounded_and_singular_covariances_are_read(tmp_path, dtype):
    gaussian = running([rows(count=20, dims=200)]).gaussian()
    np.savez(tmp_path / "rounded.npz", mu=gaussian.mu.astype(dtype), sigma=gaussian.sigma.astype(dtype))
    found = load_statistics(tmp_path / "rounded.npz")[0]
    np.testing.assert_allclose(found.sigma, gaussian.sigma, rtol=1e-3, atol=1e-3)


def test_unreadable_images_stop_or_are_left_out(tmp_path):
    images = smooth_images(5, 0, size=6)
    write_folder(tmp_path / "set", images)
    (tmp_path / "set" / "0001.png").write_bytes((tmp_path / "set" / "0001.png").read_bytes()[:-40])
    Image.fromarray(np.zeros((6, 6), np.float32)).save(tmp_path / "set" / "0003.tif")
    for crop in (None, 6):  # the sizes of cropped images need not be known, but they must be readable
        with pytest.raises(ValueError, match=r"0001\.png cannot be read: .*truncated.*`skip_unreadable` leaves it out"):
            open_source(tmp_path / "set", crop)
        with pytest.warns(UserWarning, match=r"000[13]\.\w+ is left out: ") as said:
            source = open_source(tmp_path / "set", crop, skip_unreadable=True).images
        assert len(said) == 2
        assert [name for name, _ in source.unreadable] == ["0001.png", "0003.tif"]
        np.testing.assert_array_equal(np.concatenate(list(source.batches(3))), images[[0, 2, 3, 4]])
    for file in (tmp_path / "set").iterdir():
        file.write_bytes(b"no")
    nothing = pytest.raises(ValueError, match="set holds 6 images, none of which can be read")
    with pytest.warns(UserWarning, match="is left out: not an image"), nothing:
        open_source(tmp_path / "set", skip_unreadable=True)


@pytest.mark.filterwarnings("ignore:.*not named like images")
def test_the_folder_of_a_sampling_job_is_its_samples(tmp_path):
    images = smooth_images(5, 0, size=6)
    write_folder(tmp_path / "job" / "images", images[:2])
    Image.fromarray(images[0]).save(tmp_path / "job" / "grid.png")
    (tmp_path / "job" / "generation.json").write_text("{}")
    with pytest.warns(UserWarning, match="job: passed over 1 picture drawn by ddt-fast, such as grid.png"):
        assert open_source(tmp_path / "job").images.count == 2  # its samples.npz was deleted
    np.savez(tmp_path / "job" / "samples.npz", arr_0=images, labels=np.arange(5))
    for source in (open_source(tmp_path / "job"), *open_sources([tmp_path / "job"], 6)):
        assert source.path == tmp_path / "job" / "samples.npz"
        assert source.images.count == 5
    with pytest.raises(ValueError, match="center_crop is for folders of images"):
        open_sources([tmp_path / "job"], 4)
    # A class's picture may have such a name.
    write_folder(tmp_path / "other", images[:1], "grid.png")
    assert open_source(tmp_path / "other").images.count == 1


@pytest.mark.parametrize(
    ("picture", "beside"),
    [
        ("scores.png", "scores.json"),
        ("sub/metrics.png", "sub/metrics.json"),
        ("similarity.png", "similarity.json"),
        ("samples.png", "recipe.yaml"),
        ("curves.png", "log.jsonl"),
        ("samples/samples_step_0000100.png", "recipe.yaml"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*not named like images")
def test_pictures_drawn_by_the_commands_are_not_samples(tmp_path, picture, beside):
    for name in ("0.png", picture):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 6)).save(tmp_path / name)
    assert open_source(tmp_path).images.count == 2
    (tmp_path / beside).write_text('{"metrics": {}, "not_computed": {}}')
    with pytest.warns(UserWarning, match=f"passed over 1 picture drawn by ddt-fast, such as {picture}"):
        assert open_source(tmp_path).images.count == 1


@pytest.mark.filterwarnings("ignore:.*not named like images")
@pytest.mark.parametrize("content", ['{"metrics": 1}', "[]", "{", '{"cls": 3}'])
def test_images_with_a_json_of_their_own_are_samples(tmp_path, content):
    write_folder(tmp_path / "set", smooth_images(2, 0, size=6))
    (tmp_path / "set" / "0000.json").write_text(content)
    assert open_source(tmp_path / "set").images.count == 2


def test_tars_and_arrays_are_folders_of_images(tmp_path):
    images = smooth_images(6, 0, size=6)
    (tmp_path / "set").mkdir()
    np.save(tmp_path / "set" / "a.npy", images[:3])
    np.save(tmp_path / "set" / "b.npy", images[3])
    write_folder(tmp_path / "loose", images[4:], "0{}.png")
    with tarfile.open(tmp_path / "set" / "c.tar", "w") as archive:
        archive.add(tmp_path / "loose", "")
    source = open_source(tmp_path / "set").images
    np.testing.assert_array_equal(np.concatenate(list(source.batches(4))), images)
    for name, expected in (("a.npy", images[:3]), ("c.tar", images[4:])):
        source = open_source(tmp_path / "set" / name).images
        np.testing.assert_array_equal(np.concatenate(list(source.batches(4))), expected)
