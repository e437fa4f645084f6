"""Saving and loading: round trips, released checkpoints, and everything that can be wrong with a file."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import golden_data as golden
from ddt_fast import load_model
from ddt_fast.config import DataConfig, SamplingConfig
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import CONFIG_NAME, WEIGHTS_NAME, read_experiment
from ddt_fast.model.weights import save_model
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


def test_shapes_of_a_preset_need_no_config(tmp_path):
    config = replace(PRESETS["digits"].model, num_classes=7)
    save_file(DDT(config).state_dict(), tmp_path / "weights.safetensors")
    with pytest.warns(UserWarning, match="does not record patch size 2, 3 encoder blocks"):
        assert load_model(tmp_path / "weights.safetensors").config == config
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        load_model(tmp_path / "weights.safetensors", dtype=torch.int8)


def shortened(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_other_weights(folder, **changes):
    """A folder whose config.json is that of another model."""
    save_model(DDT(replace(golden.model_config(NAME), **changes)), folder, DATA, SAMPLING)
    save_file(golden.weights(NAME), folder / WEIGHTS_NAME)


def with_order(config, order):
    settings = json.loads(config.read_text())
    settings["sampling"]["order"] = order
    config.write_text(json.dumps(settings))


def resaved(folder, change):
    save_file(change(golden.weights(NAME)), folder / WEIGHTS_NAME)


ODD = {"x_embedder.proj.weight": torch.zeros(3), "blocks.0.attn.q_norm.weight": torch.tensor(1.0)}
# How the folder f of a model is broken; how a single file f is made; and what the error says.
BROKEN_FOLDERS = [
    (lambda f: (f / WEIGHTS_NAME).unlink(), f"holds no {WEIGHTS_NAME}"),
    (lambda f: shortened(f / WEIGHTS_NAME), "cannot be read: it is truncated or not safetensors"),
    (lambda f: (f / CONFIG_NAME).write_text("{"), "not a valid configuration"),
    (lambda f: (f / CONFIG_NAME).write_text("[1]"), "not a valid configuration"),
    (lambda f: (f / CONFIG_NAME).write_text("[" * 100_000), "not a valid configuration"),
    (lambda f: (f / CONFIG_NAME).write_text('{"in_channels": 4}'), "lacks 'patch_size'"),
    (lambda f: with_order(f / CONFIG_NAME, 2.0), r"order is 2\.0"),
    (lambda f: of_other_weights(f, hidden_size=32), "disagree: hidden_size 48 in .*/model, 32 in the config"),
    (lambda f: of_other_weights(f, num_blocks=6), "disagree: num_blocks 5 in .*/model, 6 in the config"),
    (
        lambda f: resaved(f, lambda w: {"extra": w.pop("blocks.0.norm1.weight"), **w}),
        r"1 missing tensor \(such as .*; 1 unexpected tensor \(such as extra\)",
    ),
    (
        lambda f: resaved(f, lambda w: {name: t.to(torch.int8) for name, t in w.items()}),
        r"integer tensors \(such as .*torch.int8",
    ),
]
BROKEN_FILES = [
    ("nothing", lambda f: None, "does not exist"),
    ("weights.bin", lambda f: f.write_bytes(b""), "ends in .bin; allowed: .safetensors, .ckpt"),
    ("raw.ckpt", lambda f: torch.save({"state_dict": {"denoiser.x": torch.zeros(1)}}, f), "holds no ema weights; take"),
    ("odd.ckpt", lambda f: torch.save({"state_dict": [1]}, f), "holds no state_dict"),
    ("bare.safetensors", lambda f: save_file(golden.weights(NAME), f), "pass `config`"),
    ("other.safetensors", lambda f: save_file({"conv1.weight": torch.zeros(1)}, f), "not a DDT"),
    ("odd.safetensors", lambda f: save_file(ODD, f), "holds tensors whose names or shapes no DDT has"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN_FOLDERS)
def test_broken_folders_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize(("name", "make", "message"), BROKEN_FILES)
def test_broken_files_are_refused(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / name)


def test_config_argument_must_agree_with_the_folder(folder):
    with pytest.raises(ValueError, match="leave config out or make them agree"):
        load_model(folder, config=replace(golden.model_config(NAME), num_encoder_blocks=1))
    with pytest.raises(ValueError, match="weights is 'best'; allowed: ema, raw"):
        load_model(folder, weights="best")


def test_hub_ids_that_cannot_be_fetched_are_one_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="does not exist here, and the Hub does not provide it"):
        load_model("nobody/no-such-model")
