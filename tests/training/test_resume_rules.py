"""What may be continued, from where, and what a checkpoint is never replaced by."""

import shutil

import pytest
import torch
from latent_cases import MeanPoolEncoder, PatchMeanFeatures, encode, make_images
from tiny_runs import digits, latents

from ddt_fast.training import checkpoint
from ddt_fast.training.checkpoint import list_checkpoints
from ddt_fast.training.loop import train
from ddt_fast.training.run import Run

CPU = torch.device("cpu")


def names(run):
    return [path.name for path in list_checkpoints(run / "checkpoints")]


def test_a_run_past_max_steps_is_not_passed_off_as_shorter(tmp_path):
    train(digits(10), tmp_path, CPU)
    with pytest.raises(ValueError, match=r"max_steps is 7, but .*step_0000010 is past it; allowed: 10 or more"):
        train(digits(7), tmp_path, CPU, resume="auto")


def test_an_earlier_checkpoint_is_not_continued_beside_later_ones(tmp_path):
    run = tmp_path / "run"
    train(digits(15), run, CPU)
    early = run / "checkpoints" / "step_0000005"
    with pytest.raises(ValueError, match=r"has come to step_0000015; --resume auto continues it"):
        train(digits(20), run, CPU, resume=str(early))
    assert names(run) == ["step_0000005", "step_0000010", "step_0000015"]
    for later in names(run)[1:]:
        shutil.rmtree(run / "checkpoints" / later)
    assert train(digits(10), run, CPU, resume=str(early)).step == 10
    assert names(run) == ["step_0000005", "step_0000010"]


def test_another_cache_of_as_many_images_is_refused_a_moved_one_not(tmp_path):
    class Inverted(MeanPoolEncoder):
        def sha256(self):
            return "another"

    images = make_images(tmp_path / "images", {"a": 14, "b": 10})
    for name, encoder in (("one", MeanPoolEncoder()), ("other", Inverted())):
        encode(images, tmp_path / name, encoder, repa_encoder=PatchMeanFeatures())
    train(latents(tmp_path / "one", 5), tmp_path / "run", CPU)
    with pytest.raises(ValueError, match="other data, of as many samples"):
        train(latents(tmp_path / "other", 10), tmp_path / "run", CPU, resume="auto")
    (tmp_path / "one").rename(tmp_path / "moved")
    assert train(latents(tmp_path / "moved", 10), tmp_path / "run", CPU, resume="auto").step == 10


def test_a_checkpoint_that_is_there_is_never_taken_away_to_be_written_again(tmp_path, monkeypatch):
    removed, original = [], checkpoint._remove
    monkeypatch.setattr(checkpoint, "_remove", lambda folder: (removed.append(folder.name), original(folder)))
    train(digits(10, keep_checkpoints=1), tmp_path, CPU)
    assert removed == ["step_0000005"]
    written = (tmp_path / "checkpoints" / "step_0000010").stat().st_ino
    assert train(digits(10, keep_checkpoints=1), tmp_path, CPU, resume="auto").step == 10
    assert removed == ["step_0000005"]
    assert (tmp_path / "checkpoints" / "step_0000010").stat().st_ino == written


def test_a_stop_right_after_a_save_keeps_that_checkpoint(tmp_path, monkeypatch):
    original, inodes = Run.save, []

    def saving(run, wait=False):
        original(run, wait)
        run._checkpoints.close()
        inodes.append((tmp_path / "checkpoints" / "step_0000005").stat().st_ino)
        run.stop._told = True

    monkeypatch.setattr(Run, "save", saving)
    assert train(digits(10), tmp_path, CPU).step == 5
    assert len(inodes) == 2
    assert inodes[0] == inodes[1]


def test_weights_that_are_lost_take_no_good_checkpoints_place(tmp_path):
    # Nothing is logged before step 30, by when all checkpoints would have been replaced.
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) by step 2; take a lower learning_rate"):
        train(digits(30, learning_rate=1e30, checkpoint_every=1, keep_checkpoints=1, log_every=30), tmp_path, CPU)
    assert names(tmp_path) == ["step_0000001"]
