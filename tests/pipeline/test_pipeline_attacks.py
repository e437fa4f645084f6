"""Folders that were made to do harm are refused with what is wrong, and nothing in them is executed."""

import json
import pickle
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddt_fast import load_model, write_model_card
from ddt_fast.model.weights import EMBEDDED_CHECKPOINT, INDEX_NAME, WEIGHTS_NAME
from ddt_fast.pipeline import DDTPipeline
from pipeline_cases import digits, latent_folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saved pipelines, of pixels and of latents."""
    folder = tmp_path_factory.mktemp("saved")
    digits().save_pretrained(folder / "pixels")
    DDTPipeline.from_pretrained(latent_folder(folder / "latent")).save_pretrained(folder / "latents")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "latents", tmp_path / "latents")


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("transformer", {"num_blocks": 10**9}, "num_blocks 5 in .*, 1000000000 in the config"),
        ("transformer", {"hidden_size": 10**6, "num_heads": 4}, "hidden_size 48 in .*, 1000000 in the config"),
        ("transformer", {"hidden_size": "48"}, "hidden_size is '48'; allowed: a whole number"),
        ("transformer", {"data": 3}, r"config\.json is not a valid configuration"),
        ("transformer", {"sampling": "x"}, r"config\.json is not a valid configuration"),
        ("transformer", {"sampling": {"num_steps": 10**9}}, "num_steps is 1000000000; allowed: a whole number, 1 to"),
        ("transformer", {"quantization_config": {"quant_method": "gguf"}}, "quantization_config is set; wanted"),
        ("transformer", {"_use_default_values": 3}, r"config\.json is not a valid configuration"),
        ("vae", {"scaling_factor": 0}, "the vae has scaling_factor 0; wanted a positive number"),
        ("vae", {"scaling_factor": "x"}, "the vae has scaling_factor 'x'"),
        ("vae", {"block_out_channels": []}, "could not be loaded: IndexError"),
        ("vae", {"block_out_channels": [10**6] * 4}, "could not be loaded: RuntimeError: .*memory"),
        ("vae", {"norm_num_groups": 0}, "could not be loaded: ZeroDivisionError"),
        ("vae", {"down_block_types": ["os.system"] * 4}, r"os\.system does not exist"),
        ("scheduler", {"num_steps": 10**9}, "num_steps is 1000000000; allowed: a whole number, 1 to 100000"),
        ("scheduler", {"solver": ["euler"]}, r"solver is \['euler'\]; allowed: euler"),
    ],
)
def test_settings_that_no_pipeline_has(folder, part, entries, message):
    change(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **entries)
    default, started = torch.get_default_dtype(), time.monotonic()
    with pytest.raises(ValueError, match=message):
        DDTPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert torch.get_default_dtype() == default
    assert time.monotonic() - started < 30


class Runs:
    """Pickles as a call that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("named", ["evil.bin", "../evil.safetensors", "/evil.safetensors", 3, ["a"], None])
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_an_index_of_weights_that_leads_elsewhere(folder, tmp_path, part, named):
    mark = tmp_path / "it_ran"
    (folder / part / "evil.bin").write_bytes(pickle.dumps({"x": Runs(mark)}))
    (folder / part / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": {"x": named}}))
    with pytest.raises(ValueError, match=r"index\.json says that weights are in .*; expected \.safetensors files of"):
        DDTPipeline.from_pretrained(folder)
    if part == "transformer":
        with pytest.raises(ValueError, match=r"index\.json says that weights are in"):
            load_model(folder)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"x" * 100, (2**62).to_bytes(8, "little") + b"{}"])
def test_weights_that_are_none(folder, content):
    (folder / "transformer" / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(ValueError, match="is corrupt or not a checkpoint"):
        DDTPipeline.from_pretrained(folder)


def test_weights_that_are_whole_numbers(folder):
    file = folder / "transformer" / WEIGHTS_NAME
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="integer tensors"):
        DDTPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("training.json", {"versions": 5}, r"training\.json: versions is a int; expected an object"),
        ("training.json", {"recipe": [1]}, r"training\.json: recipe is a list"),
        ("training.json", {"scores": [1]}, r"training\.json: scores is a list"),
        ("training.json", {"scores": {"guided": 3}}, r"training\.json: guided is a int"),
        ("metrics.json", {"metrics": 5}, r"metrics\.json: metrics is a int"),
        ("metrics.json", {"metrics": {"fid": 1}, "samples": "x"}, r"metrics\.json: samples is a str"),
        (
            "metrics.json",
            {"samples": {"num_images": "x"}},
            r"metrics\.json: num_images is 'x'; expected a whole",
        ),
    ],
)
def test_a_past_that_is_none(folder, name, content, message):
    (folder / name).write_text(json.dumps(content))
    for read in (DDTPipeline.from_pretrained, write_model_card):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_words_of_other_people_stay_words_in_the_card(folder):
    evil = "a|b\r\n\n# Heading\u2028[link](http://elsewhere) ![x](http://elsewhere) <script>"
    training = {"commit": evil, "recipe": {evil: evil}, "scores": {evil: {"accuracy": evil}}}
    (folder / "training.json").write_text(json.dumps(training))
    metrics = {"metrics": {evil: evil}, "reference": {"source": evil}, "samples": {"num_images": 3}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    config = folder / "transformer" / "config.json"
    change(config, data={**json.loads(config.read_text())["data"], "autoencoder": f"user/{evil.split('/')[0]}"})
    card = write_model_card(folder).read_text()
    assert "elsewhere" in card
    assert "\n# Heading" not in card
    for bare in ("[link", "[x", "<script", "|b"):
        assert card.count(bare) == card.count("\\" + bare) > 0, bare


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("[" * 50_000, "is not valid YAML"),
        ("!!python/object/apply:os.system [touch it_ran]", "is not valid YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\ntraining: {adam_betas: [*b, *b]}", "adam_betas is neither a value nor a list"),
        ("training: {seed: {a: 1}}", "seed is neither a value nor a list of values"),
    ],
)
def test_a_recipe_that_is_none(tmp_path, monkeypatch, recipe, message):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "model")
    (folder / "training.json").write_text('{"steps": 3}')
    (folder / "recipe.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=message):
        write_model_card(folder)
    assert not (tmp_path / "it_ran").exists()
    (folder / "recipe.yaml").write_text("training: {repa_weight: 0.5}")  # without repa_encoder
    assert "repa_weight" in write_model_card(folder).read_text()
