"""`python -m benchmarks.scaling`: counts and simulations at known points, a tiny run, and its answers to mistakes."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks import scaling, scaling_measured
from benchmarks.rank_simulation import SamplingJob, TrainingStep, ring_seconds
from benchmarks.scaling_counts import by_batch, by_depth, by_image_size, by_refresh, num_parameters
from benchmarks.scaling_measured import CPU_SIZES, GPU_SIZES, Work, measure, sweeps
from ddt_fast.command import run_command
from ddt_fast.config import DDTConfig
from ddt_fast.presets import PRESETS

TINY = replace(
    CPU_SIZES,
    model=DDTConfig(4, 2, 16, 2, 3, 2, num_classes=5),
    image_sizes=(128, 64),
    pixels=64,
    batches=(1, 2),
    depths=((2, 1), (1, 1)),
    refreshes=(1, 2),
    sampling_steps=6,
    sampling_batch=2,
    training_batches=(1, 2),
    calls=1,
)


def test_counts_are_the_papers_and_the_readmes():
    sizes = {row["image_size"]: row for row in by_image_size(790e12)}
    assert [sizes[p]["tokens"] for p in (128, 256, 512, 1024)] == [64, 256, 1024, 4096]
    assert sizes[256]["gflop_per_forward"] == pytest.approx(263, rel=0.01)
    assert sizes[512]["gflop_per_forward"] == pytest.approx(1152, rel=0.01)
    assert sizes[256]["attention_share"] == pytest.approx(0.03, abs=0.005)
    assert sizes[512]["attention_share"] == pytest.approx(0.12, abs=0.01)
    assert sizes[256]["tflop_per_image published"] == pytest.approx(111.0, abs=0.05)
    assert sizes[256]["tflop_per_image --fast"] == pytest.approx(26.3, abs=0.05)
    assert 1 / sizes[256]["floor_seconds_per_image published"] == pytest.approx(7.1, abs=0.05)
    # Modulations of two branches, one state each.
    assert sizes[256]["cache_megabytes_per_image K 6"] == pytest.approx(2 * 22.4, abs=0.1)
    refresh = {row["refresh_every"]: row for row in by_refresh(790e12)}
    assert refresh[6]["tflop_per_image"] == pytest.approx(36.5, abs=0.05)
    assert (refresh[1]["network_evaluations"], refresh[1]["encoder_evaluations"]) == (422, 422)
    depth = {row["model"]: row for row in by_depth(790e12)}
    assert depth["XL/2"]["parameters"] == num_parameters(PRESETS["xl2_256"].model) == 674_646_352
    batches = by_batch(790e12, 4.3e12)
    assert batches[-1]["weights_read_share"] == pytest.approx(batches[0]["weights_read_share"] / batches[-1]["batch"])
    assert batches[0]["weights_gigabytes"] == pytest.approx(1.349, abs=1e-3)


def test_a_job_ends_with_the_rank_that_has_the_most_batches():
    job = SamplingJob(images=1000, shard_size=100, batch_size=40, batch_seconds=2.0, start_seconds=5.0)
    # 10 shards of 40 + 40 + 20 images: three batches each.
    assert job.batches(1) == [30]
    assert job.seconds(1) == 65
    assert job.batches(4) == [9, 9, 6, 6]
    assert job.seconds(4) == 23
    assert job.efficiency(4) == pytest.approx(65 / 92)
    assert max(job.batches(64)) == 3
    assert sum(job.batches(64)) == 30
    # The last shard is smaller: 50 images, two batches.
    assert replace(job, images=950).batches(4) == [9, 8, 6, 6]
    assert replace(job, images=70).batches(2) == [2, 0]


def test_a_ring_sends_nearly_twice_the_bytes():
    assert ring_seconds(1, 1e9, 1e9) == 0
    assert ring_seconds(2, 1e9, 1e9) == 1
    assert ring_seconds(8, 8e9, 2e9) == 7
    assert ring_seconds(10**6, 1e9, 1e9) == pytest.approx(2, rel=1e-5)


def test_an_overlapped_exchange_is_waited_for_only_where_it_outlasts_backward():
    step = TrainingStep(batches=[2, 4, 8], seconds=[3.0, 4.0, 6.0], gradient_bytes=1000)
    assert [step.compute_seconds(batch) for batch in (1, 2, 3, 4, 6, 8, 16)] == [None, 3, 3.5, 4, 5, 6, 12]
    # Two ranks send all bytes once: 1 s at 1000 bytes/s, less than the 4 s of backward.
    assert step.step_seconds(2, 8, 1000, overlapped=False) == 7
    assert step.step_seconds(2, 8, 1000, overlapped=True) == pytest.approx(6)
    # 10 s at 100 bytes/s: 2 s of forward, then the exchange.
    assert step.step_seconds(2, 8, 100, overlapped=True) == pytest.approx(12)
    assert step.efficiency(2, 1000, False, batch=8) == pytest.approx(6 / 7)
    assert step.efficiency(1, 1000, False, batch=8) == 1
    # Eight images on two ranks: 4 s and 1 s, against 6 s on one.
    assert step.efficiency(2, 1000, False, total=8) == pytest.approx(6 / 10)
    assert step.efficiency(8, 1000, False, total=8) is None
    assert step.efficiency(3, 1000, False, total=8) is None


def work(at: str, flops: float, error: Exception | None = None) -> Work:
    def run() -> None:
        if error is not None:
            raise error

    return Work(at, flops, 1, lambda: run)


def test_what_does_not_fit_is_skipped_and_said():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    rows = measure([work("1", 10), work("2", 20, error), work("3", 30)], calls=1)
    assert [row["at"] for row in rows] == ["1", "2", "3"]
    assert rows[1] == {"at": "2", "skipped": "does not fit the memory: CUDA out of memory"}
    assert (rows[0]["measured_ratio"], rows[0]["counted_ratio"], rows[2]["counted_ratio"]) == (1, 1, 3)
    with pytest.raises(ValueError, match="the base case 2 does not fit the memory"):
        measure([work("2", 20, error), work("3", 30)], calls=1)
    with pytest.raises(RuntimeError, match="something else"):
        measure([work("1", 10), work("2", 20, RuntimeError("something else"))], calls=1)


@pytest.mark.parametrize("sizes", [CPU_SIZES, GPU_SIZES], ids=["CPU", "GPU"])
def test_sweeps_count_what_they_run(sizes):
    points = dict(sweeps(sizes, torch.device("cpu")))
    assert list(points) == ["image size", "batch", "depth", "refresh", "training batch"]
    assert all(len({point.at for point in sweep}) == len(sweep) for sweep in points.values())
    batches = points["batch"]
    assert batches[-1].flops == batches[0].flops * batches[-1].images
    assert max(sizes.image_sizes) == 1024
    assert min(point.flops for point in points["refresh"]) < points["refresh"][0].flops / 2


def test_a_tiny_run_counts_measures_and_simulates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "start_seconds", lambda calls: 2.0)
    scaling.main(["--output-dir", str(tmp_path), "--device", "cpu"], TINY)
    record = json.loads((tmp_path / "scaling.json").read_text())
    measured = record["measured"]
    for name in ("image size", "batch", "depth", "refresh", "training batch"):
        assert measured[name][0]["measured_ratio"] == 1
        assert all(row["measured_ratio"] > 0 and row["seconds"]["calls"] == 1 for row in measured[name])
    assert [row["at"] for row in measured["refresh"]] == ["K 1", "K 2", "--fast"]
    here, floor = record["simulated"]
    assert here["label"] == floor["label"] == "simulated"
    assert here["sampling_inputs"]["batch_seconds"] == measured["refresh"][0]["seconds"]["median"]
    assert here["sampling_inputs"]["start_seconds"] == 2
    assert here["training_inputs"]["batches"] == [1, 2]
    assert [row["ranks"] for row in floor["sampling"]] == [1, 2, 4, 8, 16, 32, 64]
    for source in (here, floor):
        assert source["sampling"][0]["efficiency"] == 1
        assert all(0 < row["weak_efficiency"] <= 1 for row in source["training"])
    output = capsys.readouterr().out
    for words in ("## Counted", "## Measured here: cpu", "## Simulated, not measured", *scaling.ASSUMPTIONS):
        assert words in output
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > 1000


def test_a_rank_starts_with_what_a_new_process_takes():
    assert 0.1 < scaling_measured.start_seconds(1) < 120


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ceiling-tflops", "0"], "--ceiling-tflops is 0.0; allowed: a number above 0"),
        (["--copy-terabytes", "-1"], "--copy-terabytes is -1.0"),
        (["--threads", "0"], "--threads is 0; allowed: a whole number, 1 or more"),
        (["--device", "abacus"], "'abacus'"),
        (["--ceiling-tflops", "fast"], "fast"),
    ],
)
def test_scaling_answers_mistakes_in_one_line(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: scaling.main([*arguments, "--output-dir", str(tmp_path / "new")]))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
