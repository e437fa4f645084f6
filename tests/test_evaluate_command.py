"""`python -m ddt_fast.evaluate`: what it prints and writes, and its answers to mistakes."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddt_fast import evaluate as command
from ddt_fast.command import run_command
from ddt_fast.data.image_file import read_pixels
from ddt_fast.work import evaluate as work
from inception_cases import smooth_images, weights_file
from sample_jobs import error_line


def run(tmp_path, *arguments: str) -> dict:
    command.main([*arguments, "--output", str(tmp_path / "metrics.json")])
    return json.loads((tmp_path / "metrics.json").read_text())


@pytest.fixture
def files(tmp_path):
    """samples.npz and reference.npz: 40 and 30 images of 8x8."""
    np.savez(tmp_path / "samples.npz", arr_0=smooth_images(40, 0, size=8), labels=np.arange(40) % 10)
    np.savez_compressed(tmp_path / "reference.npz", arr_0=smooth_images(30, 1, size=8))
    return "--samples", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz")


@pytest.mark.slow
def test_without_arguments_it_scores_digits(tmp_path, monkeypatch, capsys):
    assert work._NUM_DIGITS == 1000
    monkeypatch.setattr(work, "_NUM_DIGITS", 300)
    monkeypatch.chdir(tmp_path)
    command.main([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "metrics.png"]
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert (report["samples"]["num_images"], report["reference"]["num_images"]) == (300, 1797)
    # The checkpoint's recorded quality (fewer samples score higher), and far from the 20 and more of noise.
    assert report["digits"]["accuracy"] > 0.99
    assert 0.05 < report["metrics"]["fid"] < 1
    assert report["metrics"]["precision"] > 0.8
    assert report["metrics"]["recall"] > 0.6
    printed = capsys.readouterr().out
    assert "class accuracy" in printed
    assert "not computed: these features have no class probabilities" in printed


def test_files_are_scored_and_the_report_is_whole(tmp_path, files, capsys):
    report = run(tmp_path, *files, "--features", "pixels", "--batch-size", "7")
    assert set(report["metrics"]) == {"fid", "precision", "recall", "kid", "kid_std"}
    assert set(report["not_computed"]) == {"sfid", "inception_score"}
    assert report["samples"]["source"].endswith("samples.npz")
    assert report["samples"]["num_images"] == 40
    assert (report["reference"]["height"], report["reference"]["width"]) == (8, 8)
    assert report["features"]["name"] == "pixels"
    assert set(report["seconds"]) == {"samples", "reference", "metrics"}
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert report["settings"]["kid_subset_size"] == 30
    printed = capsys.readouterr().out
    assert f"FID               {report['metrics']['fid']:.4f}\n" in printed
    assert f"recall            {report['metrics']['recall']:.4f}\n" in printed
    assert "sFID              not computed: " in printed
    assert "40 images of 8x8" in printed
    picture = np.asarray(Image.open(tmp_path / "metrics.png").convert("RGB"))
    for place, image in enumerate(smooth_images(40, 0, size=8)):
        row, column = divmod(place, 10)
        top, left = row * (64 + 18), column * 66
        np.testing.assert_array_equal(picture[top : top + 64, left : left + 64], image.repeat(8, 0).repeat(8, 1))


def test_folder_and_saved_statistics_give_the_same_scores(tmp_path, files, capsys):
    expected = run(tmp_path, *files, "--features", "pixels")["metrics"]
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(smooth_images(40, 0, size=8)):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03d}.png")
    folder = run(tmp_path, "--samples", str(tmp_path / "folder"), *files[2:], "--features", "pixels")["metrics"]
    assert folder == pytest.approx(expected, rel=1e-4)
    statistics = str(tmp_path / "out" / "statistics.npz")
    os.remove(tmp_path / "metrics.json")
    command.main(["--samples", files[3], "--save-statistics", statistics, "--features", "pixels"])
    assert "wrote " + statistics in capsys.readouterr().out
    assert not (tmp_path / "metrics.json").exists()
    report = run(tmp_path, *files[:2], "--reference", statistics, "--features", "pixels")
    assert report["metrics"] == {"fid": pytest.approx(expected["fid"], rel=1e-9)}
    assert report["reference"]["statistics_of"] == 30
    # Along with scores, too.
    both = run(tmp_path, *files, "--save-statistics", statistics, "--features", "pixels", "--metrics", "fid")
    assert both["metrics"] == {"fid": pytest.approx(expected["fid"], rel=1e-9)}
    with np.load(statistics) as archive:
        assert archive["num_images"] == 40


@pytest.fixture
def photos(tmp_path):
    """A folder of 30 images of several sizes."""
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(smooth_images(30, 1, size=20)):
        Image.fromarray(image).resize((8 + i % 3, 9)).save(tmp_path / "photos" / f"{i:03d}.png")
    return str(tmp_path / "photos")


@pytest.mark.parametrize("role", ["--samples", "--reference", "--save-statistics"])
def test_mixed_sizes_are_refused_before_any_features_are_computed(tmp_path, files, photos, monkeypatch, role):
    def read(*_):
        raise AssertionError("images are read")

    monkeypatch.setattr("ddt_fast.evaluation.sources.ImageSource.batches", read)
    given = dict(zip(files[::2], files[1::2], strict=True)) | {role: photos}
    if role == "--save-statistics":
        given = {"--samples": photos, role: str(tmp_path / "statistics.npz")}
    with pytest.raises(ValueError, match=r"001\.png has 9x9 pixels, 000\.png 8x9; .*--center-crop crops a folder's"):
        run(tmp_path, *(word for pair in given.items() for word in pair), "--features", "pixels")


def test_a_folder_of_photos_is_a_reference_when_cropped(tmp_path, files, photos):
    crops = [read_pixels(Path(photos, f"{i:03d}.png"), 8) for i in range(30)]
    np.savez(tmp_path / "cropped.npz", arr_0=np.stack(crops))
    options = ("--features", "pixels", "--metrics", "fid", "kid")
    expected = run(tmp_path, *files[:2], "--reference", str(tmp_path / "cropped.npz"), *options)
    report = run(tmp_path, *files[:2], "--reference", photos, "--center-crop", "8", *options)
    assert report["metrics"] == expected["metrics"]
    assert (report["reference"]["height"], report["reference"]["width"]) == (8, 8)
    statistics = str(tmp_path / "statistics.npz")
    arguments = ["--samples", photos, "--center-crop", "8", "--save-statistics", statistics, "--features", "pixels"]
    command.main(arguments)
    saved = run(tmp_path, *files[:2], "--reference", statistics, "--features", "pixels", "--metrics", "fid")
    assert saved["metrics"]["fid"] == pytest.approx(expected["metrics"]["fid"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no published score")
def test_inception_features_from_a_weights_file(tmp_path, capsys):
    np.savez(tmp_path / "samples.npz", arr_0=smooth_images(10, 0), labels=np.arange(10) // 5)
    arguments = ["--samples", str(tmp_path / "samples.npz"), "--inception-weights", weights_file()]
    with pytest.warns(UserWarning, match="sorted by class"):
        report = run(tmp_path, *arguments, "--metrics", "inception_score")
    assert set(report["metrics"]) == {"inception_score", "inception_score_std"}
    assert len(report["features"]["sha256"]) == 64
    assert report["images_per_second"] > 0
    assert "reference" not in report
    assert "Inception Score   " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "nowhere.npz"], "nowhere.npz does not exist; expected an npz or a folder of images"),
        (["--samples", "{folder}/single.npz"], "fid cannot be computed: samples: 1 image; 2 or more are needed"),
        (["--samples", "{folder}/truncated.npz"], "truncated"),
        (["--samples", ""], "--reference is for --samples, which is not given"),
        (["--samples", "", "--reference", "", "--center-crop", "8"], "--center-crop is for --samples, which"),
        (["--reference", "{folder}/half.npz"], "holds sigma but no mu; expected both"),
        (["--reference", "{folder}/other.npz"], "samples have 64 features, the reference 3"),
        (["--metrics", "is"], "is"),
        (["--batch-size", "0"], "--batch-size is 0; allowed: a whole number, 1 or more"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--output", "metrics"], "--output is 'metrics'; expected the name of a .json file"),
        (["--output", "{folder}/picture.json"], "picture.png is a folder; a file of that name will be written"),
        (["--save-statistics", "statistics"], "--save-statistics is 'statistics'; expected the name of a .npz file"),
        (["--inception-weights", "weights.pth"], "--inception-weights is for inception features, not for pixels"),
        (["--features", "inception", "--inception-weights", "no.pth"], "Inception weights file no.pth does not exist"),
    ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, files, capsys, arguments, message):
    np.savez(tmp_path / "single.npz", arr_0=smooth_images(1, 0, size=8))
    np.savez(tmp_path / "half.npz", sigma=np.eye(3))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "truncated.npz").write_bytes((tmp_path / "samples.npz").read_bytes()[:3000])
    (tmp_path / "picture.png").mkdir()
    given = dict(zip(files[::2], files[1::2], strict=True)) | {"--features": "pixels"}
    given |= {"--output": str(tmp_path / "metrics.json")}
    given |= dict(zip(arguments[::2], (a.format(folder=tmp_path) for a in arguments[1::2]), strict=True))
    words = [word for option, value in given.items() if value for word in (option, value)]
    assert message in error_line(capsys, command.main, words)
    assert not (tmp_path / "metrics.json").exists()


def test_offline_without_weights(tmp_path, files, monkeypatch, capsys):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    line = error_line(capsys, command.main, [*files, "--output", str(tmp_path / "metrics.json")])
    assert line.startswith("error: the Inception weights pt_inception-2015-12-05-6726825d.pth are not in ")
    assert line.endswith("put the file there, or name it with --inception-weights")


def test_unreadable_images_are_listed_when_skipped(tmp_path, files, photos, capsys):
    Path(photos, "005.png").write_bytes(b"not an image")
    given = [*files[:2], "--reference", photos, "--center-crop", "8", "--features", "pixels", "--metrics", "fid"]
    given += ["--output", str(tmp_path / "metrics.json")]
    line = error_line(capsys, command.main, given)
    assert "005.png cannot be read: not an image that Pillow can read; --skip-unreadable leaves it out" in line
    assert not (tmp_path / "metrics.json").exists()
    with pytest.warns(UserWarning, match=r"005\.png is left out"):
        report = run(tmp_path, *given[:-2], "--skip-unreadable")
    assert report["reference"]["num_images"] == 29
    assert report["reference"]["unreadable"] == [{"file": "005.png", "reason": "not an image that Pillow can read"}]
    assert "unreadable" not in report["samples"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_a_terminal_cannot_show_is_escaped_after_the_scores_are_written(tmp_path, files, monkeypatch, encoding):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for i, image in enumerate(smooth_images(12, 0, size=8)):
        Image.fromarray(image).save(os.fsdecode(folder + b"/\xf6%d.png" % i))
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    arguments = ["--samples", os.fsdecode(folder), *files[2:], "--features", "pixels"]
    run_command(lambda: run(tmp_path, *arguments))
    out.flush()
    shown = out.buffer.getvalue()
    assert rb"/caf\xe9: 12 images of 8x8" in shown
    assert ("±" if encoding == "utf-8" else r"\xb1").encode() in shown
    assert os.fsencode(json.loads((tmp_path / "metrics.json").read_text())["samples"]["source"]) == folder
    Path(os.fsdecode(folder + b"/\xf61.png")).write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: run(tmp_path, *arguments))
    errors.flush()
    assert rb"/caf\xe9/\xf61.png cannot be read" in errors.buffer.getvalue()
