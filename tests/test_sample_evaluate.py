"""`python -m ddt_fast.sample --evaluate`: the scores of `ddt_fast.evaluate`, whoever drew the images."""

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
from ddt_fast.command import run_command
from ddt_fast.data.digits import digits
from ddt_fast.evaluation.features import FeatureAccumulator
from ddt_fast.generation import scored, shards
from ddt_fast.generation.images import to_uint8
from ddt_fast.generation.job import Generation
from ddt_fast.sampling.engine import Sampler
from inception_cases import random_weights, smooth_images
from sample_jobs import JOB, drawn, sample_command, without_ranks

OUTPUTS = ["generation.json", "grid.png", "images", "metrics.json", "samples.npz"]


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    without_ranks(monkeypatch)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> str:
    """Digits and a little noise: some of their pixels never change, and the roots of a singular covariance carry the
    rounding of its zeros, 1e-16, into the distance as 1e-8."""
    file = tmp_path_factory.mktemp("reference") / "digits.npz"
    noise = np.random.default_rng(0).integers(0, 16, (300, 8, 8, 1), dtype=np.uint8)
    np.savez(file, arr_0=to_uint8(digits()[0][:300]) // 2 + noise)
    return str(file)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, reference) -> dict:
    """The scores that the evaluate command finds in samples.npz."""
    folder = tmp_path_factory.mktemp("expected")
    sample_command.main([*JOB, "--output-dir", str(folder)])
    files = ["--samples", str(folder / "samples.npz"), "--reference", reference]
    evaluate_command.main([*files, "--features", "pixels", "--output", str(folder / "metrics.json")])
    return json.loads((folder / "metrics.json").read_text())["metrics"]


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


def as_rank(monkeypatch, folder: Path, rank: int, *arguments: str) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", "2")
        sample_command.main([*arguments, "--output-dir", str(folder)])


def looked_at(monkeypatch) -> list[int]:
    """A list that gets the number of images whenever features are computed from now on, the reference's aside."""
    sizes: list[int] = []
    take = scored.Scoring.take

    def plural(self, positions, images):
        sizes.append(len(images))
        take(self, positions, images)

    monkeypatch.setattr(scored.Scoring, "take", plural)
    return sizes


def test_one_process_scores_what_it_draws_in_one_pass(tmp_path, reference, expected, monkeypatch, capsys):
    sizes = looked_at(monkeypatch)
    seen: list[int] = []
    arguments = [*scoring(reference), "--output-dir", str(tmp_path)]
    sample_command.main(arguments, on_images=lambda positions, _: seen.extend(positions.tolist()))
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
    arguments = [*scoring(str(photos)), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"001\.png has 10x8 pixels, 000\.png 8x8; images must be of one size"):
        sample_command.main(arguments)
    assert not (tmp_path / "out" / "samples.npz").exists()
    sample_command.main([*arguments, "--center-crop", "8"])
    check(tmp_path / "out", expected)


def test_a_singular_reference_costs_digits_and_no_more(tmp_path):
    np.savez(tmp_path / "digits.npz", arr_0=to_uint8(digits()[0]))
    reference, out = str(tmp_path / "digits.npz"), tmp_path / "out"
    sample_command.main([*scoring(reference), "--output-dir", str(out)])
    files = ["--samples", str(out / "samples.npz"), "--reference", reference]
    evaluate_command.main([*files, "--features", "pixels", "--output", str(tmp_path / "metrics.json")])
    found, expected = (json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (out, tmp_path))
    assert found["fid"] == pytest.approx(expected["fid"], rel=2e-7)
    assert (found["precision"], found["recall"]) == (expected["precision"], expected["recall"])


def test_a_finished_job_is_scored_without_drawing(tmp_path, reference, expected, monkeypatch):
    sample_command.main([*JOB, "--output-dir", str(tmp_path)])

    def none(*_: object, **__: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(Sampler, "__init__", none)
    as_rank(monkeypatch, tmp_path, 1, *scoring(reference))
    assert not (tmp_path / "metrics.json").exists(), "one process scores, and that is rank 0"
    as_rank(monkeypatch, tmp_path, 0, *scoring(reference))
    check(tmp_path, expected)


def test_two_processes_at_once(tmp_path, reference, expected):
    command = [sys.executable, "-m", "ddt_fast.sample", *scoring(reference), "--output-dir", str(tmp_path)]
    common = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, env={**common, "RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("\nFID  " in stdout for stdout, _ in outputs) == 1, outputs
    check(tmp_path, expected)


def test_the_features_of_the_other_process_are_merged(tmp_path, reference, expected, monkeypatch, capsys):
    as_rank(monkeypatch, tmp_path, 1, *scoring(reference))
    assert len(list(tmp_path.glob("features-*-rank-1-of-2.npz"))) == 1
    sizes = looked_at(monkeypatch)
    as_rank(monkeypatch, tmp_path, 0, *scoring(reference))
    check(tmp_path, expected)
    assert sum(sizes) == 123 - 60
    assert "missing" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "truncated", "of other images"])
def test_features_that_another_process_did_not_leave_come_from_the_samples(
    tmp_path, reference, expected, monkeypatch, capsys, damage
):
    as_rank(monkeypatch, tmp_path, 1, *scoring(reference))
    (file,) = tmp_path.glob("features-*")
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:500])
    else:  # those of rank 0, as another division of the images would have them
        with np.load(file) as saved:
            np.savez(file, **{**saved, "indices": saved["indices"] - 20})
    if damage == "truncated":
        with pytest.warns(UserWarning, match="cannot be read: .*; its images are taken from samples.npz"):
            as_rank(monkeypatch, tmp_path, 0, *scoring(reference))
    else:
        as_rank(monkeypatch, tmp_path, 0, *scoring(reference))
    check(tmp_path, expected)
    assert "features of 60 of 123 images are taken from " in capsys.readouterr().out


def test_a_process_that_saves_too_late_leaves_nothing(tmp_path, reference, expected, monkeypatch):
    """Rank 1 draws its shards; rank 0 finishes and scores before rank 1 has saved its features."""
    save = scored.Scoring.save

    def late(self):
        with monkeypatch.context() as patch:
            patch.setattr(scored.Scoring, "save", save)
            as_rank(monkeypatch, tmp_path, 0, *scoring(reference))
        save(self)
        assert len(list(tmp_path.glob("features-*"))) == 1

    monkeypatch.setattr(scored.Scoring, "save", late)
    as_rank(monkeypatch, tmp_path, 1, *scoring(reference))
    check(tmp_path, expected)


@pytest.mark.parametrize("moment", ["while drawing", "before scoring"])
def test_a_stopped_job_that_goes_on_has_the_same_scores(tmp_path, reference, expected, monkeypatch, moment):
    write = shards.ShardFolder.write

    def interrupted(self, shard, *rest):
        if shard >= 3:
            raise KeyboardInterrupt
        write(self, shard, *rest)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    arguments = [*scoring(reference), "--output-dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        if moment == "while drawing":
            patch.setattr(shards.ShardFolder, "write", interrupted)
        else:
            patch.setattr(scored.Scoring, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            sample_command.main(arguments)
    assert not (tmp_path / "metrics.json").exists()
    sample_command.main(arguments)
    check(tmp_path, expected)


@pytest.mark.parametrize("moment", ["_is_whole", "_found_images"])
def test_a_process_goes_on_though_another_finishes_the_job_and_removes_the_shards(
    tmp_path, reference, expected, monkeypatch, moment
):
    """All shards are there; rank 1 merges them while rank 0 looks through its own, the last of which is 6."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for rank in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(Generation, "finish", stop)
            with pytest.raises(KeyboardInterrupt):
                as_rank(monkeypatch, tmp_path, rank, *scoring(reference))
    function = getattr(Generation, moment)

    def overtaken(self, shard):
        if self.ranks.rank == 0 and shard == 6:
            monkeypatch.setattr(Generation, moment, function)
            as_rank(monkeypatch, tmp_path, 1, *scoring(reference))
            check(tmp_path, expected)
        return function(self, shard)

    sizes = drawn(monkeypatch)
    monkeypatch.setattr(Generation, moment, overtaken)
    as_rank(monkeypatch, tmp_path, 0, *scoring(reference))
    check(tmp_path, expected)
    assert sizes == []


@pytest.mark.parametrize(("metrics", "kept"), [(["fid"], False), (["fid", "sfid"], False), (["fid", "kid"], True)])
def test_features_are_kept_only_for_metrics_that_need_them(tmp_path, reference, monkeypatch, metrics, kept):
    """FID's statistics do not grow with the number of images."""
    keep: list[object] = []
    finish = FeatureAccumulator.finish

    def noted(self, source):
        keep.append((self.keep_features, len(self._features) > 0))
        return finish(self, source)

    monkeypatch.setattr(FeatureAccumulator, "finish", noted)
    sample_command.main([*scoring(reference), "--metrics", *metrics, "--output-dir", str(tmp_path)])
    assert keep[0] == (kept, kept)


@pytest.mark.filterwarnings("ignore:.*(no published score|is far too high|samples have 8x8)")
def test_inception_features(tmp_path):
    torch.save(random_weights(), tmp_path / "weights.pth")
    np.savez(tmp_path / "reference.npz", arr_0=smooth_images(6, 0, size=8))
    weights = ["--inception-weights", str(tmp_path / "weights.pth"), "--metrics", "sfid", "inception_score"]
    job = ["--num-images", "12", "--num-steps", "1", "--output-dir", str(tmp_path / "out")]
    sample_command.main([*job, "--evaluate", str(tmp_path / "reference.npz"), *weights])
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    files = ["--samples", str(tmp_path / "out" / "samples.npz"), "--reference", str(tmp_path / "reference.npz")]
    evaluate_command.main([*files, *weights, "--output", str(tmp_path / "metrics.json")])
    expected = json.loads((tmp_path / "metrics.json").read_text())
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
    assert found["features"] == expected["features"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluate", "nowhere.npz"], "nowhere.npz does not exist; wanted an npz or a folder of images"),
        (["--evaluate", "{large}"], "samples have 64 features, the reference 256; wanted as many"),
        (["--evaluate", "{statistics}"], "samples have 64 features, the reference 3; wanted as many"),
        (["--evaluate", "{statistics}", "--metrics", "recall"], "recall cannot be computed: reference: "),
        (["--metrics", "sfid"], "sfid cannot be computed: these features have none for sFID"),
        (["--num-images", "1"], "fid cannot be computed: samples: 1 image; 2 or more are needed"),
        (["--evaluate-features", "inception", "--inception-weights", "no.pth"], "Inception weights no.pth do not"),
        (["--inception-weights", "no.pth"], "--inception-weights is for inception features, not for pixels"),
        (["--metrics", "is"], "is"),
    ],
)
def test_mistakes_are_one_line_before_any_work(tmp_path, reference, monkeypatch, capsys, arguments, message):
    files = {"large": tmp_path / "large.npz", "statistics": tmp_path / "statistics.npz"}
    np.savez(files["large"], arr_0=smooth_images(10, 0, size=16))
    np.savez(files["statistics"], mu=np.zeros(3), sigma=np.eye(3))
    output = tmp_path / "out"
    monkeypatch.setattr("ddt_fast.generation.generate.load_model", lambda *_: pytest.fail("the model is loaded first"))
    line = error_line(capsys, output, *scoring(reference), *(word.format(**files) for word in arguments))
    assert message in line
    assert list(output.glob("*")) == []


def test_options_without_evaluate_and_a_folder_in_the_way(tmp_path, reference, capsys):
    for option in (["--metrics", "fid"], ["--center-crop", "8"], ["--inception-weights", "x.pth"]):
        assert f"{option[0]} is for --evaluate, which is not given" in error_line(capsys, tmp_path, *JOB, *option)
    (tmp_path / "metrics.json").mkdir()
    assert "metrics.json is a folder; a file of that name is to be written" in error_line(
        capsys, tmp_path, *scoring(reference)
    )


def error_line(capsys, folder: Path, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: sample_command.main([*arguments, "--output-dir", str(folder)]))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
