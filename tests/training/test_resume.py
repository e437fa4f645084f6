"""Runs that are stopped, killed or changed on the way: one that continues ends where an unbroken run does.

What may be continued, from where, and what a checkpoint is never replaced by."""

import errno
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latent_cases import MeanPoolEncoder, PatchMeanFeatures, encode, make_images
from safetensors.torch import load_file, save_file
from tiny_runs import CLIPPED, CPU, assert_same_end, assert_same_log, digits, latents, start, wait_for_log
from torch.distributed.checkpoint import FileSystemWriter

from ddt_fast.presets import PRESETS
from ddt_fast.training import checkpoint
from ddt_fast.training.checkpoint import list_checkpoints
from ddt_fast.training.loop import train
from ddt_fast.training.run import Run
from ddt_fast.training.run_folder import check_continuable, settings_of
from sample_jobs import small_autoencoder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_a_continued_run_ends_bit_for_bit_as_an_unbroken_one(tmp_path, engine):
    for steps in (5, 10):
        train(digits(steps, engine=engine, **CLIPPED), tmp_path / "broken", CPU, resume="auto")
    train(digits(10, engine=engine, **CLIPPED), tmp_path / "whole", CPU)
    assert_same_end(tmp_path / "broken", tmp_path / "whole", 10)
    assert_same_log(tmp_path / "broken", tmp_path / "whole")


def test_a_named_checkpoint_is_continued_in_another_folder(ten_steps, tmp_path):
    early = ten_steps / "checkpoints" / "step_0000005"
    train(digits(10, **CLIPPED), tmp_path / "run", CPU, resume=str(early))
    assert_same_end(ten_steps, tmp_path / "run", 10)


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly_and_auto_continues(tmp_path):
    experiment, run = digits(80, checkpoint_every=1000, log_every=10), tmp_path / "run"
    started = start(experiment, run)
    wait_for_log(started, run)
    started.processes[0].terminate()
    assert "--resume auto continues" in started.finish()
    (name,) = names(run)
    assert 10 <= int(name.removeprefix("step_")) < 80
    start(experiment, run, "--resume", "auto").finish()
    train(experiment, tmp_path / "whole", CPU)
    assert_same_end(run, tmp_path / "whole", 80)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path):
    experiment = digits(60, checkpoint_every=4, log_every=2)
    run, moments = tmp_path / "run", random.Random(int(os.environ.get("KILL_SEED", "0")))
    for _ in range(int(os.environ.get("KILL_TRIALS", "3"))):
        started = start(experiment, run, "--resume", "auto")
        seen = len(list_checkpoints(run / "checkpoints"))
        while started.running() and len(list_checkpoints(run / "checkpoints")) <= min(seen, 2):
            time.sleep(0.01)
        time.sleep(moments.random() * 0.3)
        started.processes[0].kill()
        started.processes[0].join()
    start(experiment, run, "--resume", "auto").finish()
    train(experiment, tmp_path / "whole", CPU)
    assert_same_end(run, tmp_path / "whole", 60)
    assert_same_log(run, tmp_path / "whole")
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_no_space_is_a_warning_on_the_way_and_an_error_at_the_end(tmp_path, monkeypatch, capfd):
    original, calls = FileSystemWriter.write_data, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) in (2, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", failing)
    with pytest.raises(OSError, match=r"the checkpoint could not be saved: .*No space left on device"):
        train(digits(20), tmp_path, CPU)
    assert "No space left on device; training continues, earlier checkpoints are kept" in capfd.readouterr().err
    assert names(tmp_path) == ["step_0000005", "step_0000015"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    monkeypatch.undo()
    assert train(digits(20), tmp_path, CPU, resume="auto").step == 20


@pytest.mark.slow
def test_a_run_starts_from_weights_their_average_and_the_projector(tmp_path, latent_cache, capfd):
    first = train(latents(latent_cache, 5), tmp_path / "a", CPU)
    experiment = latents(latent_cache, 1, init=str(tmp_path / "a" / "model"), learning_rate=1e-12)
    second = train(experiment, tmp_path / "b", CPU)
    assert "averaged weights only: training starts there too, REPA's projector" in capfd.readouterr().err
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    other = replace(experiment, model=replace(experiment.model, hidden_size=64))
    with pytest.raises(ValueError, match=r"disagree: hidden_size 32 in .*/model, 64 in the config"):
        train(other, tmp_path / "c", CPU)


def first_shard(folder):
    return next((folder / "state").glob("*.distcp"))


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (None, {"max_steps": 7}, r"max_steps is 7, but .*step_0000010 is past it; allowed: 10 or more"),
        (
            None,
            {"learning_rate": 0.5, "batch_size": 32, "log_every": 1},
            r"settings: training\.batch_size was 16, now 32; training\.learning_rate was 0\.002, now 0\.5; use",
        ),
        (lambda folder: (folder / "trainer.json").write_text("{"), {}, r"trainer\.json is not valid JSON"),
        (lambda folder: (folder / "trainer.json").unlink(), {}, r"is not a checkpoint of a run; expected RUN/"),
        (lambda folder: first_shard(folder).write_bytes(b"x"), {}, r"step_0000010 cannot be read: "),
        (lambda folder: (folder / "state" / ".metadata").write_bytes(b"x"), {}, r"step_0000010 cannot be read: "),
    ],
    ids=["max_steps", "settings", "json", "no json", "tensors", "metadata"],
)
def test_what_cannot_be_continued_is_refused_in_one_line(ten, damage, settings, message):
    last = ten / "checkpoints" / "step_0000010"
    if damage is not None:
        damage(last)
    experiment = digits(20, **CLIPPED)
    experiment = replace(experiment, training=replace(experiment.training, **settings))
    with pytest.raises(ValueError, match=message) as error:
        train(experiment, ten, CPU, resume="auto")
    assert "\n" not in str(error.value)
    assert last.exists()
    assert (ten / "model").exists()


def names(run):
    return [path.name for path in list_checkpoints(run / "checkpoints")]


def test_an_earlier_checkpoint_is_not_continued_beside_later_ones(ten):
    early = ten / "checkpoints" / "step_0000005"
    with pytest.raises(ValueError, match=r"has reached step_0000010; `resume` auto continues it"):
        train(digits(20, **CLIPPED), ten, CPU, resume=str(early))
    assert names(ten) == ["step_0000005", "step_0000010"]
    shutil.rmtree(ten / "checkpoints" / "step_0000010")
    assert train(digits(8, **CLIPPED), ten, CPU, resume=str(early)).step == 8
    assert names(ten) == ["step_0000005", "step_0000008"]


@pytest.mark.slow
def test_another_cache_of_the_same_size_is_refused_a_moved_one_is_not(tmp_path):
    class Inverted(MeanPoolEncoder):
        def sha256(self):
            return "another"

    images, run = make_images(tmp_path / "images", {"a": 14, "b": 10}), tmp_path / "run"
    for name, encoder in (("one", MeanPoolEncoder()), ("other", Inverted())):
        encode(images, tmp_path / name, encoder, repa_encoder=PatchMeanFeatures())
    train(latents(tmp_path / "one", 2), run, CPU)
    with pytest.raises(ValueError, match="other data of the same size"):
        train(latents(tmp_path / "other", 4), run, CPU, resume="auto")
    (tmp_path / "one").rename(tmp_path / "moved")
    assert train(latents(tmp_path / "moved", 4), run, CPU, resume="auto").step == 4


@pytest.mark.slow
def test_a_moved_autoencoder_is_known_by_its_weights(tmp_path, latent_cache, recwarn):
    def experiment(steps, vae, **settings):
        plain = latents(latent_cache, steps, **{"sample_every": 100, "sample_images": 2, **settings})
        return replace(plain, data=replace(plain.data, autoencoder=str(vae)))

    run, vae = tmp_path / "run", Path(small_autoencoder(tmp_path / "vae"))
    train(experiment(2, vae), run, CPU)
    moved = vae.rename(tmp_path / "moved")
    assert train(experiment(4, moved), run, CPU, resume="auto").step == 4
    assert not [warning for warning in recwarn if "the same model" in str(warning.message)]
    other = shutil.copytree(moved, tmp_path / "other") / "diffusion_pytorch_model.safetensors"
    weights = load_file(other)
    weights["decoder.conv_in.bias"] += 1
    save_file(weights, other)
    message = r"data\.autoencoder was '.*/moved', now '.*/other', with other weights; use the same"
    with pytest.raises(ValueError, match=message):
        train(experiment(6, other.parent), run, CPU, resume="auto")
    # Without grids of samples it is not loaded, so that nothing can be compared.
    with pytest.warns(UserWarning, match=r"data\.autoencoder was '.*/moved', now 'elsewhere': cannot tell whether"):
        assert train(experiment(6, "elsewhere", sample_every=0), run, CPU, resume="auto").step == 6


@pytest.mark.slow
def test_moved_channel_statistics_are_compared_by_content(tmp_path):
    folder, run = tmp_path / "shards", tmp_path / "run"
    folder.mkdir()
    save_file({"latents": torch.randn(20, 4, 2, 2), "labels": torch.arange(20) % 2}, folder / "0.safetensors")
    for name, std in (("stats", 2.0), ("other", 4.0)):
        torch.save({"mean": torch.full((4,), 3.0), "std": torch.full((4,), std)}, tmp_path / name)

    def experiment(steps, path):
        plain = latents(folder, steps)
        data = replace(plain.data, scaling_factor=1.0, channel_stats=path and str(path))
        return replace(plain, data=data, training=replace(plain.training, repa_weight=0.0))

    train(experiment(2, tmp_path / "stats"), run, CPU)
    moved = (tmp_path / "stats").rename(tmp_path / "moved")
    assert train(experiment(4, moved), run, CPU, resume="auto").step == 4
    for path in (tmp_path / "other", None):
        with pytest.raises(ValueError, match="other data of the same size"):
            train(experiment(6, path), run, CPU, resume="auto")


def test_a_moved_encoder_of_features_is_known_by_its_weights():
    experiment = PRESETS["xl2_256"]
    moved = replace(experiment, training=replace(experiment.training, repa_encoder="/new/dinov2"))
    numbers = {"step": 5, "settings": settings_of(experiment), "frozen_sha256": {"training.repa_encoder": "abc"}}
    check_continuable(Path("c"), numbers, moved, {"training.repa_encoder": "abc"})
    with pytest.raises(ValueError, match=r"training\.repa_encoder was .*, now '/new/dinov2', with other weights"):
        check_continuable(Path("c"), numbers, moved, {"training.repa_encoder": "abd"})
    with pytest.warns(UserWarning, match="cannot tell whether it is the same model"):
        check_continuable(Path("c"), numbers, moved, {"training.repa_encoder": None})


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    written, fsync, rename, named = set(), os.fsync, Path.rename, []

    def noting(descriptor):
        fsync(descriptor)
        written.add(os.fstat(descriptor).st_ino)

    def checking(path, target):
        if Path(target).name == "step_0000005":
            named.extend([path, *path.rglob("*")])
            missing = [entry for entry in named if entry.stat().st_ino not in written]
            assert missing == []
            written.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "rename", checking)
    train(digits(5), tmp_path, CPU)
    assert {"trainer.json", ".metadata", "config.json"} <= {path.name for path in named}
    assert (tmp_path / "checkpoints").stat().st_ino in written


@pytest.mark.slow
def test_a_checkpoint_that_is_there_is_never_taken_away_to_be_written_again(tmp_path, monkeypatch):
    removed, original = [], checkpoint._remove
    monkeypatch.setattr(checkpoint, "_remove", lambda folder: (removed.append(folder.name), original(folder)))
    written = []
    for resume in (None, "auto"):
        assert train(digits(10, keep_checkpoints=1), tmp_path, CPU, resume).step == 10
        assert removed == ["step_0000005"]
        written.append((tmp_path / "checkpoints" / "step_0000010").stat().st_ino)
    assert written[0] == written[1]


def test_a_stop_right_after_a_save_keeps_that_checkpoint(tmp_path, monkeypatch):
    original, inodes = Run.save, []

    def saving(run, wait=False):
        original(run, wait)
        run._checkpoints.close()
        inodes.append((tmp_path / "checkpoints" / "step_0000005").stat().st_ino)
        run.stop._told = True

    monkeypatch.setattr(Run, "save", saving)
    assert train(digits(10), tmp_path, CPU).step == 5
    assert inodes == inodes[:1] * 2


def test_ruined_weights_never_replace_a_good_checkpoint(tmp_path):
    # Nothing is logged before step 30, by when all checkpoints would have been replaced.
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) by step 2; use a lower learning_rate"):
        train(digits(30, learning_rate=1e30, checkpoint_every=1, keep_checkpoints=1, log_every=30), tmp_path, CPU)
    assert names(tmp_path) == ["step_0000001"]
