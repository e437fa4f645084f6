"""Runs that are stopped, killed or changed on the way: one that continues ends where an unbroken run does."""

import errno
import os
import random
import time
from dataclasses import replace

import pytest
import torch
from tiny_runs import CLIPPED, CPU, assert_same_end, assert_same_log, digits, latents, start, wait_for_log
from torch.distributed.checkpoint import FileSystemWriter

from ddt_fast.training.checkpoint import list_checkpoints
from ddt_fast.training.loop import train


def test_a_continued_run_ends_bit_for_bit_as_an_unbroken_one(ten, tmp_path):
    train(digits(20, **CLIPPED), ten, CPU, resume="auto")
    train(digits(20, **CLIPPED), tmp_path / "whole", CPU)
    assert_same_end(ten, tmp_path / "whole", 20)
    assert_same_log(ten, tmp_path / "whole")


def test_so_does_one_of_the_reference_that_auto_began(tmp_path):
    for steps in (4, 8):
        train(digits(steps, engine="reference"), tmp_path / "broken", CPU, resume="auto")
    train(digits(8, engine="reference"), tmp_path / "whole", CPU)
    assert_same_end(tmp_path / "broken", tmp_path / "whole", 8)


def test_a_named_checkpoint_is_continued_in_another_folder(ten_steps, tmp_path):
    early = ten_steps / "checkpoints" / "step_0000005"
    train(digits(10, **CLIPPED), tmp_path / "run", CPU, resume=str(early))
    assert_same_end(ten_steps, tmp_path / "run", 10)


def test_sigterm_saves_and_exits_cleanly_and_auto_continues(tmp_path):
    experiment = digits(200, checkpoint_every=1000, log_every=25)
    started = start(experiment, tmp_path / "run")
    wait_for_log(started, tmp_path / "run")
    started.processes[0].terminate()
    assert "--resume auto continues" in started.finish()
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert 25 <= int(checkpoint.name.removeprefix("step_")) < 200
    start(experiment, tmp_path / "run", "--resume", "auto").finish()
    train(experiment, tmp_path / "whole", CPU)
    assert_same_end(tmp_path / "run", tmp_path / "whole", 200)


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
    found = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert found == ["step_0000005", "step_0000015"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    monkeypatch.undo()
    assert train(digits(20), tmp_path, CPU, resume="auto").step == 20


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


def first_shard(checkpoint):
    return next((checkpoint / "state").glob("*.distcp"))


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
    checkpoint = ten / "checkpoints" / "step_0000010"
    if damage is not None:
        damage(checkpoint)
    experiment = digits(20, **CLIPPED)
    experiment = replace(experiment, training=replace(experiment.training, **settings))
    with pytest.raises(ValueError, match=message) as error:
        train(experiment, ten, CPU, resume="auto")
    assert "\n" not in str(error.value)
    assert checkpoint.exists()
    assert (ten / "model").exists()
