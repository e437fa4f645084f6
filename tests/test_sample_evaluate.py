"""`python -m ddt_fast.sample --evaluate`: the scores of `ddt_fast.evaluate`, whichever process drew the images."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddt_fast import evaluate as evaluate_command
from ddt_fast.data.digits import digits
from ddt_fast.evaluation.features import FeatureAccumulator
from ddt_fast.generation import scorer
from ddt_fast.generation.folder import JobFolder
from ddt_fast.generation.images import to_uint8
from ddt_fast.sampling.engine import Sampler
from inception_cases import smooth_images, weights_file
from sample_jobs import JOB, as_rank, begin, drawn, sample, sample_error, whole

OUTPUTS = ["generation.json", "grid.png", "images", "metrics.json", "samples.npz"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> str:
    """Digits and a little noise: some of their pixels never change, and the roots of a singular covariance carry the
    rounding of its zeros, 1e-16, into the distance as 1e-8."""
    file = tmp_path_factory.mktemp("reference") / "digits.npz"
    noise = np.random.default_rng(0).integers(0, 16, (300, 8, 8, 1), dtype=np.uint8)
    np.savez(file, arr_0=to_uint8(digits()[0][:300]) // 2 + noise)
    return str(file)


def evaluated(folder: Path, samples: Path, reference: str) -> dict:
    """The scores that the evaluate command finds in samples.npz."""
    files = ["--samples", str(samples / "samples.npz"), "--reference", reference]
    evaluate_command.main([*files, "--features", "pixels", "--output", str(folder / "metrics.json")])
    return json.loads((folder / "metrics.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, reference) -> dict:
    return evaluated(tmp_path_factory.mktemp("expected"), whole(), reference)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def scoring(reference: str) -> list[str]:
    return [*JOB, "--evaluate", reference, "--evaluate-features", "pixels"]


def check(folder: Path, expected: dict) -> None:
    report = json.loads((folder / "metrics.json").read_text())
    assert report["metrics"].keys() == expected.keys() == {"fid", "precision", "recall", "kid", "kid_std"}
    assert report["metrics"]["fid"] == pytest.approx(expected["fid"], rel=1e-9)
    assert report["metrics"]["kid"] == pytest.approx(expected["kid"], rel=1e-6)
    for name in ("precision", "recall"):
        assert report["metrics"][name] == expected[name]
    assert report["samples"]["num_images"] == 123
    record = json.loads((folder / "generation.json").read_text())
    assert report["generation"] == {"fingerprint": record["fingerprint"], "date": record["date"]}
    assert sorted(path.name for path in folder.iterdir()) == OUTPUTS


def looked_at(monkeypatch) -> list[int]:
    """A list that gets the number of images whenever features are computed from now on, the reference's aside."""
    sizes: list[int] = []
    take = scorer.Scorer.take

    def noted(self, positions, images):
        sizes.append(len(images))
        take(self, positions, images)

    monkeypatch.setattr(scorer.Scorer, "take", noted)
    return sizes


@pytest.mark.slow
def test_one_process_scores_what_it_draws_in_one_pass(tmp_path, reference, expected, monkeypatch, capsys):
    sizes = looked_at(monkeypatch)
    seen: list[int] = []
    sample(tmp_path, *scoring(reference), on_images=lambda positions, _: seen.extend(positions.tolist()))
    check(tmp_path, expected)
    assert sum(sizes) == 123
    assert sorted(seen) == list(range(123)), "a hook of the caller's goes on beside it"
    printed = capsys.readouterr().out
    assert f"FID               {expected['fid']:.4f}\n" in printed
    assert "missing" not in printed
    assert json.loads((tmp_path / "metrics.json").read_text())["seconds"].keys() == {"samples", "reference", "metrics"}


def test_a_folder_of_several_sizes_is_a_reference_when_cropped(tmp_path, reference, expected):
    photos = tmp_path / "photos"
    photos.mkdir()
    with np.load(reference) as archive:
        for i, image in enumerate(archive["arr_0"]):
            Image.fromarray(np.pad(image, ((0, 0), (i % 2, i % 2), (0, 0)))).save(photos / f"{i:03d}.png")
    with pytest.raises(ValueError, match=r"001\.png has 10x8 pixels, 000\.png 8x8; .*; --center-crop crops a folder's"):
        sample(tmp_path / "out", *scoring(str(photos)))
    assert not (tmp_path / "out" / "samples.npz").exists()
    sample(tmp_path / "out", *scoring(str(photos)), "--center-crop", "8")
    check(tmp_path / "out", expected)


def test_a_finished_job_is_scored_without_drawing(tmp_path, reference, expected, monkeypatch):
    sample(tmp_path, *JOB)

    monkeypatch.setattr(Sampler, "__init__", lambda *_, **__: pytest.fail("sampled again"))
    as_rank(monkeypatch, 1, 2, tmp_path, *scoring(reference))
    assert not (tmp_path / "metrics.json").exists(), "one process scores, and that is rank 0"
    as_rank(monkeypatch, 0, 2, tmp_path, *scoring(reference))
    check(tmp_path, expected)


@pytest.mark.slow
def test_two_processes_write_and_score_what_one_does(tmp_path, reference, expected):
    command = [sys.executable, "-m", "ddt_fast.sample", *scoring(reference), "--output-dir", str(tmp_path)]
    common = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, env={**common, "RANK": rank}, **pipes) for rank in "01"]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum("\nFID  " in text for text in said) == 1, said
    assert sum("wrote images/, grid.png, samples.npz" in text for text in said) >= 1, said
    check(tmp_path, expected)
    assert (tmp_path / "samples.npz").read_bytes() == (whole() / "samples.npz").read_bytes()


def test_the_features_of_the_other_process_are_merged(tmp_path, reference, expected, monkeypatch, capsys):
    as_rank(monkeypatch, 1, 2, tmp_path, *scoring(reference))
    assert len(list(tmp_path.glob("features-*-rank-1-of-2.pt"))) == 1
    sizes = looked_at(monkeypatch)
    as_rank(monkeypatch, 0, 2, tmp_path, *scoring(reference))
    check(tmp_path, expected)
    assert sum(sizes) == 123 - 60
    assert "missing" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "truncated", "of other images"])
def test_features_that_another_process_did_not_leave_come_from_the_samples(
    tmp_path, reference, expected, monkeypatch, capsys, damage
):
    as_rank(monkeypatch, 1, 2, tmp_path, *scoring(reference))
    (file,) = tmp_path.glob("features-*")
    warned = contextlib.nullcontext()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:500])
        warned = pytest.warns(UserWarning, match="cannot be read: .*; its images are taken from samples.npz")
    else:  # those of rank 0, as another division of the images would have them
        saved = torch.load(file)
        torch.save({**saved, "_indices": [index - 20 for index in saved["_indices"]]}, file)
    with warned:
        as_rank(monkeypatch, 0, 2, tmp_path, *scoring(reference))
    check(tmp_path, expected)
    assert "features of 60 of 123 images are computed from " in capsys.readouterr().out


def test_a_process_that_saves_too_late_leaves_nothing(tmp_path, reference, expected, monkeypatch):
    """Rank 1 draws its shards; rank 0 finishes and scores before rank 1 has saved its features."""
    save = scorer.Scorer.save

    def late(self):
        with monkeypatch.context() as patch:
            patch.setattr(scorer.Scorer, "save", save)
            as_rank(monkeypatch, 0, 2, tmp_path, *scoring(reference))
        save(self)
        assert len(list(tmp_path.glob("features-*"))) == 1

    monkeypatch.setattr(scorer.Scorer, "save", late)
    as_rank(monkeypatch, 1, 2, tmp_path, *scoring(reference))
    check(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while drawing", "before scoring"])
def test_a_stopped_job_that_is_continued_has_the_same_scores(tmp_path, reference, expected, monkeypatch, moment):
    if moment == "while drawing":
        begin(tmp_path, 3, *scoring(reference))
    else:
        with monkeypatch.context() as patch:
            patch.setattr(scorer.Scorer, "finish", stop)
            with pytest.raises(KeyboardInterrupt):
                sample(tmp_path, *scoring(reference))
    assert not (tmp_path / "metrics.json").exists()
    sample(tmp_path, *scoring(reference))
    check(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["_is_whole", "_found_images"])
def test_a_process_continues_though_another_finishes_the_job_and_removes_the_shards(
    tmp_path, reference, expected, monkeypatch, moment
):
    """All shards are there; rank 1 merges them while rank 0 looks through its own, the last of which is 6."""
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(JobFolder, "finish", stop)
            with pytest.raises(KeyboardInterrupt):
                as_rank(monkeypatch, rank, 2, tmp_path, *scoring(reference))
    function = getattr(JobFolder, moment)

    def overtaken(self, shard):
        if self.ranks.rank == 0 and shard == 6:
            monkeypatch.setattr(JobFolder, moment, function)
            as_rank(monkeypatch, 1, 2, tmp_path, *scoring(reference))
            check(tmp_path, expected)
        return function(self, shard)

    sizes = drawn(monkeypatch)
    monkeypatch.setattr(JobFolder, moment, overtaken)
    as_rank(monkeypatch, 0, 2, tmp_path, *scoring(reference))
    check(tmp_path, expected)
    assert sizes == []


@pytest.mark.slow
@pytest.mark.parametrize(("metrics", "kept"), [(["fid"], False), (["fid", "sfid"], False), (["fid", "kid"], True)])
def test_features_are_kept_only_for_metrics_that_need_them(tmp_path, reference, monkeypatch, metrics, kept):
    """FID's statistics do not grow with the number of images."""
    keep: list[object] = []
    finish = FeatureAccumulator.finish

    def noted(self, source):
        keep.append((self.keep_features, len(self._features) > 0))
        return finish(self, source)

    monkeypatch.setattr(FeatureAccumulator, "finish", noted)
    sample(tmp_path, *scoring(reference), "--metrics", *metrics)
    assert keep[0] == (kept, kept)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(no published score|is far too high|samples have 8x8)")
def test_inception_features(tmp_path):
    np.savez(tmp_path / "reference.npz", arr_0=smooth_images(2, 0, size=8))
    weights = ["--inception-weights", weights_file(), "--metrics", "kid"]  # without the root of a large matrix
    sample(tmp_path / "out", *JOB[2:4], "--num-images", "2", "--evaluate", str(tmp_path / "reference.npz"), *weights)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    files = ["--samples", str(tmp_path / "out" / "samples.npz"), "--reference", str(tmp_path / "reference.npz")]
    evaluate_command.main([*files, *weights, "--output", str(tmp_path / "metrics.json")])
    expected = json.loads((tmp_path / "metrics.json").read_text())
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
    assert found["features"] == expected["features"]


NO_WEIGHTS = ["--inception-weights", "no.pth"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluate", "nowhere.npz"], "nowhere.npz does not exist; expected an npz or a folder of images"),
        (["--evaluate", "{statistics}"], "samples have 64 features, the reference 3; they must match"),
        (["--evaluate", "{statistics}", "--metrics", "recall"], "recall cannot be computed: reference: "),
        (["--metrics", "sfid"], "sfid cannot be computed: these features have no part for sFID"),
        (["--num-images", "1"], "fid cannot be computed: samples: 1 image; 2 or more are needed"),
        (["--evaluate-features", "inception", *NO_WEIGHTS], "Inception weights file no.pth does not exist"),
        (NO_WEIGHTS, "--inception-weights is for inception features, not for pixels"),
        (["--center-crop", "8"], "--center-crop is for folders of images; "),
    ],
)
def test_mistakes_are_one_line_before_any_work(tmp_path, reference, monkeypatch, capsys, arguments, message):
    statistics = tmp_path / "statistics.npz"
    np.savez(statistics, mu=np.zeros(3), sigma=np.eye(3))
    monkeypatch.setattr("ddt_fast.generation.engine.load_model", lambda *_: pytest.fail("the model is loaded first"))
    given = [*scoring(reference), *(word.format(statistics=statistics) for word in arguments)]
    assert message in sample_error(capsys, tmp_path / "out", *given)
    assert list((tmp_path / "out").glob("*")) == []


def test_unreadable_images_of_the_reference_stop_the_job_or_are_listed(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(smooth_images(3, 0, size=8)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "1.png").write_bytes(b"no")
    arguments = [*JOB, "--evaluate", str(tmp_path / "photos"), "--evaluate-features", "pixels", "--metrics", "fid"]
    assert "--skip-unreadable leaves it out" in sample_error(capsys, tmp_path / "out", *arguments)
    with pytest.warns(UserWarning, match=r"1\.png is left out"):
        sample(tmp_path / "out", *arguments, "--skip-unreadable")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["reference"]
    assert found["num_images"] == 2
    assert [image["file"] for image in found["unreadable"]] == ["1.png"]


def test_options_without_evaluate_and_a_folder_in_the_way(tmp_path, reference, capsys):
    alone = "--metrics fid, --center-crop 8, --inception-weights x.pth, --skip-unreadable, --evaluate-features pixels"
    for words in map(str.split, alone.split(",")):
        line = sample_error(capsys, tmp_path, *JOB, *words)
        assert f"{words[0]} is for --evaluate, which is not given" in line
    (tmp_path / "metrics.json").mkdir()
    assert "metrics.json is a folder; a file of that name" in sample_error(capsys, tmp_path, *scoring(reference))
