"""A run's checkpoints become files for the original code, and model folders, with all that training goes on from."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import digits, final_state, finish, latents, start
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import ddt_fast.convert as convert
from ddt_fast import load_model
from ddt_fast.config import Experiment
from ddt_fast.model.fused import FusedDDT
from ddt_fast.model.lightning import read_lightning
from ddt_fast.model.weights import read_experiment, read_weight_sets
from ddt_fast.training.loop import train

CPU = torch.device("cpu")


def assert_holds_the_run(sets, run, experiment: Experiment, step: int):
    """Trained weights as in the state, the average and the projector as in the model folder."""
    state = final_state(run, step)
    model = load_model(run / "model")
    model.load_state_dict(sets.raw)
    denoiser = model if experiment.training.engine == "reference" else FusedDDT.from_reference(model)
    for name, parameter in denoiser.named_parameters():
        assert torch.equal(parameter, state[f"/weights/denoiser.{name}"]), name
    average = load_model(run / "model").state_dict()
    assert sets.ema.keys() == average.keys()
    assert all(torch.equal(sets.ema[name], average[name]) for name in average)
    assert any(not torch.equal(sets.ema[name], sets.raw[name]) for name in average)
    if experiment.training.repa_weight:
        projector = load_file(run / "model" / "repa_projector.safetensors")
        assert sets.projector.keys() == projector.keys()
        assert all(torch.equal(sets.projector[name], projector[name]) for name in projector)


def test_a_run_is_exported_with_all_that_training_goes_on_from(tmp_path, latent_cache, capsys):
    experiment = latents(latent_cache, 4, checkpoint_every=2)
    train(experiment, tmp_path / "run", CPU)
    convert.main([str(tmp_path / "run"), str(tmp_path / "out.ckpt")])
    said = capsys.readouterr().out
    assert "step_0000004: raw weights" in said
    assert "the same as" not in said
    assert_holds_the_run(read_lightning(tmp_path / "out.ckpt"), tmp_path / "run", experiment, 4)
    train(latents(latent_cache, 1, init=str(tmp_path / "out.ckpt")), tmp_path / "next", CPU)
    assert "trained weights, their average, REPA's projector" in capsys.readouterr().err


def test_of_a_sharded_run_any_checkpoint_and_either_weights(tmp_path, latent_cache):
    experiment = latents(latent_cache, 4, checkpoint_every=2, parallel="fsdp", engine="reference")
    run = tmp_path / "run"
    finish(start(experiment, run, processes=2))
    convert.main([str(run), str(tmp_path / "folder"), "--weights", "both"])
    assert_holds_the_run(read_weight_sets(tmp_path / "folder"), run, experiment, 4)
    saved = read_experiment(tmp_path / "folder")
    assert (saved.model, saved.sampling, saved.data.folder) == (experiment.model, experiment.sampling, None)
    raw, early = read_weight_sets(tmp_path / "folder").raw, run / "checkpoints" / "step_0000002"
    convert.main([str(run), str(tmp_path / "raw.ckpt"), "--weights", "raw"])
    for found in (read_lightning(tmp_path / "raw.ckpt").raw, read_lightning(tmp_path / "raw.ckpt").ema):
        assert all(torch.equal(found[name], raw[name]) for name in raw)
    convert.main([str(early), str(tmp_path / "early"), "--weights", "raw"])
    found = load_model(tmp_path / "early").state_dict()
    state = final_state(run, 2)
    assert all(torch.equal(found[name], state[f"/weights/denoiser.{name}"]) for name in found)
    assert any(not torch.equal(found[name], raw[name]) for name in found)


def test_runs_that_cannot_be_exported_are_refused(tmp_path):
    run, out = tmp_path / "run", str(tmp_path / "out.ckpt")
    train(digits(5), run, CPU)
    checkpoint = run / "checkpoints" / "step_0000005"
    with pytest.raises(ValueError, match="--preset and --config are for a SOURCE without settings"):
        convert.main([str(run), out, "--preset", "digits"])
    for shard in (checkpoint / "state").glob("*.distcp"):
        shard.write_bytes(b"x")
    with pytest.raises(ValueError, match="step_0000005 cannot be read: "):
        convert.main([str(run), out])
    (checkpoint / "state" / ".metadata").write_bytes(b"x")
    with pytest.raises(ValueError, match="step_0000005 cannot be read: "):
        convert.main([str(run), out])
    checkpoint.rename(checkpoint.with_name(".step_0000005"))
    with pytest.raises(ValueError, match="holds a run without a finished checkpoint"):
        convert.main([str(run), out])
    assert not (tmp_path / "out.ckpt").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    run, mark = tmp_path / "run", tmp_path / "it_ran"
    train(digits(2), run, CPU)
    file = run / "checkpoints" / "step_0000002" / "state" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["weights.code"] = BytesStorageMetadata()
    for content, message in (
        (Touch(mark), r"metadata names pathlib\.Path\.touch, which was not executed"),
        (metadata, r"weights\.code is no tensor, and was not opened"),
        ({}, "metadata is a dict"),
    ):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=f"step_0000002 cannot be read: .*{message}"):
            convert.convert_checkpoint(run, tmp_path / "out")
        with pytest.raises(ValueError, match=f"step_0000002 cannot be read: .*{message}"):
            train(digits(4), run, CPU, "auto")
    assert not mark.exists()
