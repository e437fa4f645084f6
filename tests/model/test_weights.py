"""Saving and loading: round trips, released checkpoints, and everything that can be wrong with a file."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import golden_data as golden
from ddt_fast import load_model
from ddt_fast.config import DataConfig, SamplingConfig
from ddt_fast.model.reference import DDT
from ddt_fast.model.weights import CONFIG_NAME, WEIGHTS_NAME, read_experiment, save_model
from ddt_fast.presets import PRESETS

NAME = "tiny_h48_d24"
DATA, SAMPLING = DataConfig("latents", 64, "some/vae"), SamplingConfig(num_steps=7, refresh_steps=(0, 3))


@pytest.fixture
def folder(tmp_path):
    save_model(golden.model(NAME), tmp_path / "model", DATA, SAMPLING)
    return tmp_path / "model"


def test_folder_round_trips(folder):
    loaded = load_model(folder)
    for name, expected in golden.weights(NAME).items():
        assert torch.equal(loaded.state_dict()[name], expected)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    experiment = read_experiment(folder)
    assert (experiment.model, experiment.data, experiment.sampling) == (golden.model_config(NAME), DATA, SAMPLING)


def test_saving_replaces_an_older_folder_and_leaves_nothing_else(folder):
    save_model(golden.model(NAME), folder, DATA, replace(SAMPLING, num_steps=9))
    assert read_experiment(folder).sampling.num_steps == 9
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_replaces_nothing_but_a_model(tmp_path):
    (tmp_path / "mine.py").write_text("precious")
    with pytest.raises(ValueError, match=r"holds mine\.py, which ddt-fast did not write"):
        save_model(golden.model(NAME), tmp_path, DATA, SAMPLING)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_dtype_and_the_weights_file_inside_the_folder(folder):
    loaded = load_model(folder / WEIGHTS_NAME, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in loaded.parameters())


def lightning_checkpoint(path, model, **more):
    state = {f"ema_denoiser.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"denoiser.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    state["diffusion_trainer.proj.0.0.weight"] = torch.zeros(3)
    torch.save({"epoch": 3, "state_dict": state, **more}, path)


def test_released_checkpoint_gives_its_ema_weights_or_the_raw_ones(tmp_path):
    model, config = golden.model(NAME), golden.model_config(NAME)
    lightning_checkpoint(tmp_path / "released.ckpt", model)
    loaded = load_model(tmp_path / "released.ckpt", config=config)
    raw = load_model(tmp_path / "released.ckpt", config=config, weights="raw")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert torch.equal(raw.state_dict()[name], tensor + 1)
    with pytest.raises(ValueError, match="weights is 'best'; allowed: ema, raw"):
        load_model(tmp_path / "released.ckpt", config=config, weights="best")


def test_shapes_of_a_preset_need_no_config(tmp_path):
    config = replace(PRESETS["digits"].model, num_classes=7)
    save_file(DDT(config).state_dict(), tmp_path / "weights.safetensors")
    with pytest.warns(UserWarning, match="says nothing of patch size 2, 3 encoder blocks"):
        assert load_model(tmp_path / "weights.safetensors").config == config
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        load_model(tmp_path / "weights.safetensors", dtype=torch.int8)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def corrupt(folder, tmp_path, case):
    """Break one thing; return what to load and what the error must say."""
    weights = golden.weights(NAME)
    if case == "missing path":
        return tmp_path / "nothing", "does not exist"
    if case == "missing weights":
        (folder / WEIGHTS_NAME).unlink()
        return folder, f"holds no {WEIGHTS_NAME}"
    if case == "truncated":
        content = (folder / WEIGHTS_NAME).read_bytes()
        (folder / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])
        return folder, "corrupt"
    if case == "no safetensors":
        (folder / WEIGHTS_NAME).write_bytes(b"hello")
        return folder, "corrupt"
    if case == "broken json":
        (folder / CONFIG_NAME).write_text("{")
        return folder, "not a valid configuration"
    if case == "json of the wrong kind":
        (folder / CONFIG_NAME).write_text("[1]")
        return folder, "not a valid configuration"
    if case == "json lacks a key":
        (folder / CONFIG_NAME).write_text(json.dumps({"in_channels": 4}))
        return folder, "lacks 'patch_size'"
    if case == "other shapes":
        save_model(DDT(replace(golden.model_config(NAME), hidden_size=32)), folder, DATA, SAMPLING)
        save_file(weights, folder / WEIGHTS_NAME)
        return folder, "disagree: hidden_size 48 in .*/model, 32 in the config"
    if case == "more blocks":
        save_model(DDT(replace(golden.model_config(NAME), num_blocks=6)), folder, DATA, SAMPLING)
        save_file(weights, folder / WEIGHTS_NAME)
        return folder, "disagree: num_blocks 5 in .*/model, 6 in the config"
    if case == "other names":
        save_file({"extra": weights.pop("blocks.0.norm1.weight"), **weights}, folder / WEIGHTS_NAME)
        return folder, r"disagree: 1 tensor missing \(such as .*; 1 tensor unexpected \(such as extra\)"
    if case == "malicious pickle":
        (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(Malicious()))
        return tmp_path / "bad.ckpt", "corrupt or no checkpoint, nothing of it was run"
    if case == "malicious checkpoint":
        lightning_checkpoint(tmp_path / "bad.ckpt", golden.model(NAME), surprise=Malicious())
        return tmp_path / "bad.ckpt", r"more than tensors, and was not executed: it would call or make builtins\.exec"
    if case == "checkpoint without ema":
        torch.save({"state_dict": {"denoiser.x": torch.zeros(1)}}, tmp_path / "other.ckpt")
        return tmp_path / "other.ckpt", "holds no ema weights; take its raw weights"
    if case == "unsettled shapes":
        save_file(weights, tmp_path / "bare.safetensors")
        return tmp_path / "bare.safetensors", "pass config"
    if case == "another model":
        save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
        return tmp_path / "other.safetensors", "not a DDT"
    if case == "integer weights":
        save_file({name: tensor.to(torch.int8) for name, tensor in weights.items()}, folder / WEIGHTS_NAME)
        return folder, r"tensors without fractions \(such as .*torch.int8"
    if case == "integer order":
        settings = json.loads((folder / CONFIG_NAME).read_text())
        settings["sampling"]["order"] = 2.0
        (folder / CONFIG_NAME).write_text(json.dumps(settings))
        return folder, r"order is 2\.0"
    if case == "deep json":
        (folder / CONFIG_NAME).write_text("[" * 100_000)
        return folder, "not a valid configuration"
    if case == "state_dict of the wrong kind":
        torch.save({"state_dict": [1]}, tmp_path / "odd.ckpt")
        return tmp_path / "odd.ckpt", "corrupt"
    if case == "odd keys":
        torch.save({"state_dict": {1: torch.zeros(1), "ema_denoiser.x": 3}}, tmp_path / "odd.ckpt")
        return tmp_path / "odd.ckpt", r"no ema_denoiser\.\* and no denoiser\.\* tensors"
    if case == "odd shapes":
        odd = {"x_embedder.proj.weight": torch.zeros(3), "blocks.0.attn.q_norm.weight": torch.tensor(1.0)}
        save_file(odd, tmp_path / "odd.safetensors")
        return tmp_path / "odd.safetensors", r"odd\.safetensors holds tensors of names or shapes that no DDT has"
    assert case == "unknown ending"
    (tmp_path / "weights.bin").write_bytes(b"")
    return tmp_path / "weights.bin", "ends in .bin; allowed: .safetensors, .ckpt"


@pytest.mark.parametrize(
    "case",
    [
        "missing path",
        "missing weights",
        "truncated",
        "no safetensors",
        "broken json",
        "json of the wrong kind",
        "json lacks a key",
        "other shapes",
        "more blocks",
        "other names",
        "malicious pickle",
        "malicious checkpoint",
        "checkpoint without ema",
        "unsettled shapes",
        "another model",
        "integer weights",
        "integer order",
        "deep json",
        "state_dict of the wrong kind",
        "odd keys",
        "odd shapes",
        "unknown ending",
    ],
)
def test_broken_checkpoints_are_refused(folder, tmp_path, case):
    path, message = corrupt(folder, tmp_path, case)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_config_argument_must_agree_with_the_folder(folder):
    with pytest.raises(ValueError, match="leave config out or make them agree"):
        load_model(folder, config=replace(golden.model_config(NAME), num_encoder_blocks=1))


def test_hub_ids_that_cannot_be_fetched_are_one_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="no local path and could not be had from the Hub"):
        load_model("nobody/no-such-model")
