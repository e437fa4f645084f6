"""A run's checkpoints become files for the original code, and model folders, with all that training needs."""

import io
import pickle
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CLIPPED, CPU, digits, final_state, latents, start
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import ddt_fast.convert as convert
from ddt_fast import load_model
from ddt_fast.config import Experiment
from ddt_fast.model.fused import FusedDDT
from ddt_fast.model.lightning import read_lightning
from ddt_fast.model.settings import read_experiment
from ddt_fast.model.weights import read_weight_sets
from ddt_fast.training.loop import train


def assert_holds_the_run(sets, run, experiment: Experiment, step: int):
    """Trained weights as in the state, the average and the projector as in the model folder."""
    state = final_state(run, step)
    model = load_model(run / "model")
    model.load_state_dict(sets.raw)
    denoiser = model if experiment.training.engine == "reference" else FusedDDT.from_reference(model)
    for name, parameter in denoiser.named_parameters():
        assert torch.equal(parameter, state[f"weights.denoiser.{name}"]), name
    average = load_model(run / "model").state_dict()
    assert sets.ema.keys() == average.keys()
    assert all(torch.equal(sets.ema[name], average[name]) for name in average)
    assert any(not torch.equal(sets.ema[name], sets.raw[name]) for name in average)
    if experiment.training.repa_weight:
        projector = load_file(run / "model" / "repa_projector.safetensors")
        assert sets.projector.keys() == projector.keys()
        assert all(torch.equal(sets.projector[name], projector[name]) for name in projector)


@pytest.mark.slow
def test_a_run_is_exported_with_all_that_training_needs(tmp_path, latent_cache, capsys):
    experiment, run, out = latents(latent_cache, 4, checkpoint_every=2), tmp_path / "run", str(tmp_path / "out.ckpt")
    train(experiment, run, CPU)
    convert.main([str(run), out])
    said = capsys.readouterr().out
    assert "step_0000004: raw weights" in said
    assert "the same as" not in said
    assert_holds_the_run(read_lightning(out), run, experiment, 4)
    train(latents(latent_cache, 1, init=out), tmp_path / "next", CPU)
    assert "trained weights, their average, REPA's projector" in capsys.readouterr().err


@pytest.mark.slow
def test_of_a_sharded_run_any_checkpoint_and_either_weights(tmp_path, latent_cache):
    experiment = latents(latent_cache, 4, checkpoint_every=2, parallel="fsdp", engine="reference")
    run = tmp_path / "run"
    start(experiment, run, processes=2).finish()
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
    assert all(torch.equal(found[name], state[f"weights.denoiser.{name}"]) for name in found)
    assert any(not torch.equal(found[name], raw[name]) for name in found)


@pytest.mark.slow
def test_runs_that_cannot_be_exported_are_refused(ten, tmp_path):
    out = str(tmp_path / "out.ckpt")
    checkpoint = ten / "checkpoints" / "step_0000010"
    with pytest.raises(ValueError, match="--preset and --config are for a source without settings"):
        convert.main([str(ten), out, "--preset", "digits"])
    for file in (next((checkpoint / "state").glob("*.distcp")), checkpoint / "state" / ".metadata"):
        file.write_bytes(b"x")
        with pytest.raises(ValueError, match="step_0000010 cannot be read: "):
            convert.main([str(ten), out])
    for folder in (ten / "checkpoints").iterdir():
        folder.rename(folder.with_name(f".{folder.name}"))
    with pytest.raises(ValueError, match="holds a run without a finished checkpoint"):
        convert.main([str(ten), out])
    assert not (tmp_path / "out.ckpt").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


class Attribute:
    """Pickled as an attribute of a class that a checkpoint may name."""

    def __reduce__(self):
        return getattr, (torch.Size, "mro")


class PicklerOfPython3112(pickle.Pickler):
    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


@pytest.mark.parametrize("names", ["getattr", "pathlib._local"])
def test_a_checkpoint_of_any_python_is_read(ten, tmp_path, names):
    """Debian 12's 3.11.2 pickles an enum's member through getattr; 3.13 has another module for paths."""
    file = ten / "checkpoints" / "step_0000010" / "state" / ".metadata"
    found, content = pickle.loads(file.read_bytes()), io.BytesIO()
    if names == "getattr":
        PicklerOfPython3112(content).dump(found)
    else:  # protocol 3 spells names out
        pickle.dump(found, content, 3)
    own = f"c{type(Path()).__module__}\nPosixPath".encode()
    file.write_bytes(content.getvalue().replace(own, b"cpathlib._local\nPosixPath"))
    assert names.encode() in file.read_bytes()
    convert.convert_checkpoint(ten, tmp_path / "out")
    assert load_model(tmp_path / "out").config == load_model(ten / "model").config


def test_code_in_a_checkpoint_is_refused_and_not_run(ten, tmp_path):
    mark, file = tmp_path / "it_ran", ten / "checkpoints" / "step_0000010" / "state" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["weights.code"] = BytesStorageMetadata()
    for content, message in (
        (Touch(mark), r"metadata names pathlib[._a-z]*\.Path\.touch, which was not executed"),
        (Attribute(), r"metadata names builtins\.getattr, which was not executed"),
        (metadata, r"weights\.code is not a tensor, and was not opened"),
        ({}, "metadata is a dict"),
    ):
        file.write_bytes(pickle.dumps(content))
        for use in (
            lambda: convert.convert_checkpoint(ten, tmp_path / "out"),
            lambda: train(digits(20, **CLIPPED), ten, CPU, "auto"),
        ):
            with pytest.raises(ValueError, match=f"step_0000010 cannot be read: .*{message}"):
                use()
    assert not mark.exists()
