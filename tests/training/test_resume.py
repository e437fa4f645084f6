"""Runs that are stopped, killed or changed on the way: what continues ends where an unbroken run does."""

import errno
import json
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from tiny_runs import digits, final_state, finish, latents, start
from torch.distributed.checkpoint import FileSystemWriter

from ddt_fast.training.checkpoint import list_checkpoints
from ddt_fast.training.loop import train

CPU = torch.device("cpu")


def assert_same_end(first, second, step):
    ours, theirs = final_state(first, step), final_state(second, step)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_log(first, second):
    """Equal but for what is time and memory."""
    kept = ("step", "loss", "grad_norm", "learning_rate")
    lines = [
        [{name: json.loads(line)[name] for name in kept} for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (first, second)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_a_continued_run_ends_bit_for_bit_as_an_unbroken_one(tmp_path, engine):
    settings = {"engine": engine, "warmup_steps": 8, "max_grad_norm": 0.5}
    train(digits(10, **settings), tmp_path / "broken", CPU)
    train(digits(20, **settings), tmp_path / "broken", CPU, resume="auto")
    train(digits(20, **settings), tmp_path / "whole", CPU)
    assert_same_end(tmp_path / "broken", tmp_path / "whole", 20)
    assert_same_log(tmp_path / "broken", tmp_path / "whole")


def test_auto_starts_where_there_is_nothing_and_a_named_checkpoint_is_taken(tmp_path):
    train(digits(10, keep_checkpoints=0), tmp_path / "a", CPU, resume="auto")
    early = tmp_path / "a" / "checkpoints" / "step_0000005"
    train(digits(10), tmp_path / "b", CPU, resume=str(early))
    assert_same_end(tmp_path / "a", tmp_path / "b", 10)


def test_sigterm_saves_and_exits_cleanly_and_auto_goes_on(tmp_path):
    experiment = digits(400, checkpoint_every=1000, log_every=50)
    process = start(experiment, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "--resume auto continues" in finish(process)
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert 50 <= int(checkpoint.name.removeprefix("step_")) < 400
    finish(start(experiment, tmp_path / "run", "--resume", "auto"))
    train_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(experiment, tmp_path / "whole", CPU)
    torch.set_num_threads(train_threads)
    assert_same_end(tmp_path / "run", tmp_path / "whole", 400)


def test_kills_at_random_moments_change_nothing(tmp_path):
    experiment = digits(60, checkpoint_every=4, log_every=2)
    run, moments, kills = tmp_path / "run", random.Random(int(os.environ.get("KILL_SEED", "0"))), 0
    wanted = int(os.environ.get("KILL_TRIALS", "3"))
    while kills < wanted:
        process = start(experiment, run, "--resume", "auto")
        seen = len(list_checkpoints(run / "checkpoints"))
        while process.poll() is None and len(list_checkpoints(run / "checkpoints")) <= min(seen, 2):
            time.sleep(0.01)
        time.sleep(moments.random() * 0.3)
        process.kill()
        process.communicate()
        kills += 1
    finish(start(experiment, run, "--resume", "auto"))
    train_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(experiment, tmp_path / "whole", CPU)
    torch.set_num_threads(train_threads)
    assert_same_end(run, tmp_path / "whole", 60)
    assert_same_log(run, tmp_path / "whole")
    assert not list((run / "checkpoints").glob(".*"))


def test_changed_settings_are_named(tmp_path):
    train(digits(5), tmp_path, CPU)
    changed = digits(10, learning_rate=0.5, batch_size=32, log_every=1)
    message = r"other settings: training\.batch_size was 16, now 32; training\.learning_rate was 0\.002, now 0\.5; take"
    with pytest.raises(ValueError, match=message):
        train(changed, tmp_path, CPU, resume="auto")
    assert list_checkpoints(tmp_path / "checkpoints")
    assert (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "trainer.json").write_text("{"), r"trainer\.json is damaged"),
        (lambda folder: (folder / "trainer.json").unlink(), r"is no checkpoint of a run, a folder such as"),
        (lambda folder: next((folder / "state").glob("*.distcp")).write_bytes(b"x"), r"step_0000005 cannot be read: "),
        (lambda folder: (folder / "state" / ".metadata").write_bytes(b"x"), r"step_0000005 cannot be read: "),
    ],
    ids=["json", "no json", "tensors", "metadata"],
)
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, damage, message):
    train(digits(5), tmp_path, CPU)
    damage(tmp_path / "checkpoints" / "step_0000005")
    with pytest.raises(ValueError, match=message) as error:
        train(digits(10), tmp_path, CPU, resume="auto")
    assert "\n" not in str(error.value)


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
    assert "No space left on device; training goes on, earlier checkpoints are kept" in capfd.readouterr().err
    found = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert found == ["step_0000005", "step_0000015"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    monkeypatch.undo()
    assert train(digits(20), tmp_path, CPU, resume="auto").step == 20


def test_a_run_starts_from_weights_their_average_and_the_projector(tmp_path, latent_cache, capfd):
    first = train(latents(latent_cache, 5), tmp_path / "a", CPU)
    experiment = latents(latent_cache, 1, init=str(tmp_path / "a" / "model"), learning_rate=1e-12)
    second = train(experiment, tmp_path / "b", CPU)
    assert "averaged weights alone, which training goes on from as well, REPA's projector" in capfd.readouterr().err
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    other = replace(experiment, model=replace(experiment.model, hidden_size=64))
    with pytest.raises(ValueError, match=r"disagree: hidden_size 32 in .*/model, 64 in the config"):
        train(other, tmp_path / "c", CPU)
