"""What may be continued, from where, and what a checkpoint is never replaced by."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latent_cases import MeanPoolEncoder, PatchMeanFeatures, encode, make_images
from safetensors.torch import load_file, save_file
from tiny_runs import CLIPPED, CPU, digits, latents

from ddt_fast.presets import PRESETS
from ddt_fast.training import checkpoint
from ddt_fast.training.checkpoint import list_checkpoints
from ddt_fast.training.loop import train
from ddt_fast.training.run import Run
from ddt_fast.training.run_folder import check_continuable, settings_of
from sample_jobs import small_autoencoder


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


def test_another_cache_of_the_same_size_is_refused_a_moved_one_is_not(tmp_path):
    class Inverted(MeanPoolEncoder):
        def sha256(self):
            return "another"

    images = make_images(tmp_path / "images", {"a": 14, "b": 10})
    for name, encoder in (("one", MeanPoolEncoder()), ("other", Inverted())):
        encode(images, tmp_path / name, encoder, repa_encoder=PatchMeanFeatures())
    train(latents(tmp_path / "one", 5), tmp_path / "run", CPU)
    with pytest.raises(ValueError, match="other data of the same size"):
        train(latents(tmp_path / "other", 10), tmp_path / "run", CPU, resume="auto")
    (tmp_path / "one").rename(tmp_path / "moved")
    assert train(latents(tmp_path / "moved", 10), tmp_path / "run", CPU, resume="auto").step == 10


def test_a_moved_autoencoder_is_known_by_its_weights(tmp_path, latent_cache, recwarn):
    def experiment(steps, vae, **settings):
        plain = latents(latent_cache, steps, **{"sample_every": 100, "sample_images": 2, **settings})
        return replace(plain, data=replace(plain.data, autoencoder=str(vae)))

    run, vae = tmp_path / "run", Path(small_autoencoder(tmp_path / "vae"))
    train(experiment(5, vae), run, CPU)
    moved = vae.rename(tmp_path / "moved")
    assert train(experiment(10, moved), run, CPU, resume="auto").step == 10
    assert not [warning for warning in recwarn if "the same model" in str(warning.message)]
    message = r"data\.autoencoder was '.*/moved', now '.*/other', with other weights; use the same"
    other = shutil.copytree(moved, tmp_path / "other")
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_in.bias"] += 1
    save_file(weights, other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message):
        train(experiment(15, other), run, CPU, resume="auto")
    # Without grids of samples it is not loaded, so that nothing can be compared.
    with pytest.warns(UserWarning, match=r"data\.autoencoder was '.*/moved', now 'elsewhere': whether it is the same"):
        assert train(experiment(15, "elsewhere", sample_every=0), run, CPU, resume="auto").step == 15


def test_moved_channel_statistics_are_compared_by_content(tmp_path):
    folder, stats = tmp_path / "shards", tmp_path / "stats.pt"
    folder.mkdir()
    save_file({"latents": torch.randn(20, 4, 2, 2), "labels": torch.arange(20) % 2}, folder / "0.safetensors")
    torch.save({"mean": torch.full((4,), 3.0), "std": torch.full((4,), 2.0)}, stats)

    def experiment(steps, path):
        plain = latents(folder, steps)
        training = replace(plain.training, repa_weight=0.0)
        data = replace(plain.data, scaling_factor=1.0, channel_stats=None if path is None else str(path))
        return replace(plain, data=data, training=training)

    train(experiment(5, stats), tmp_path / "run", CPU)
    moved = stats.rename(tmp_path / "moved.pt")
    assert train(experiment(10, moved), tmp_path / "run", CPU, resume="auto").step == 10
    torch.save({"mean": torch.full((4,), 3.0), "std": torch.full((4,), 4.0)}, tmp_path / "other.pt")
    for path in (tmp_path / "other.pt", None):
        with pytest.raises(ValueError, match="other data of the same size"):
            train(experiment(15, path), tmp_path / "run", CPU, resume="auto")


def test_a_moved_encoder_of_features_is_known_by_its_weights():
    experiment = PRESETS["xl2_256"]
    moved = replace(experiment, training=replace(experiment.training, repa_encoder="/new/dinov2"))
    numbers = {"step": 5, "settings": settings_of(experiment), "frozen_sha256": {"training.repa_encoder": "abc"}}
    check_continuable(Path("c"), numbers, moved, {"training.repa_encoder": "abc"})
    with pytest.raises(ValueError, match=r"training\.repa_encoder was .*, now '/new/dinov2', with other weights"):
        check_continuable(Path("c"), numbers, moved, {"training.repa_encoder": "abd"})
    with pytest.warns(UserWarning, match="whether it is the same model is not known here"):
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


def test_ruined_weights_never_replace_a_good_checkpoint(tmp_path):
    # Nothing is logged before step 30, by when all checkpoints would have been replaced.
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) by step 2; use a lower learning_rate"):
        train(digits(30, learning_rate=1e30, checkpoint_every=1, keep_checkpoints=1, log_every=30), tmp_path, CPU)
    assert names(tmp_path) == ["step_0000001"]
