"""Damaged folders, and folders made to do harm, are refused with what is wrong; nothing in them is executed."""

import json
import pickle
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden_data as golden
from ddt_fast import load_model, write_model_card
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT, INDEX_NAME, WEIGHTS_NAME
from ddt_fast.pipeline import DDTPipeline, DDTTransformer2DModel
from pipeline_cases import LATENT_MODEL


class Runs:
    """Pickles as a call that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("transformer/config", {"num_blocks": 10**9}, "num_blocks 5 in .*, 1000000000 in the config"),
        ("transformer/config", {"hidden_size": "48"}, "hidden_size is '48'; allowed: a whole number"),
        ("transformer/config", {"data": 3}, r"config\.json is not a valid configuration"),
        ("transformer/config", {"sampling": {"num_steps": 10**9}}, "num_steps is 1000000000; allowed: a whole number"),
        ("transformer/config", {"quantization_config": {"quant_method": "gguf"}}, "quantization_config is set; expec"),
        ("transformer/config", {"_use_default_values": 3}, r"config\.json is not a valid configuration"),
        ("vae/config", {"scaling_factor": 0}, "the vae has scaling_factor 0; expected a positive number"),
        ("vae/config", {"block_out_channels": []}, "could not be loaded: IndexError"),
        ("vae/config", {"block_out_channels": [10**6] * 4}, "could not be loaded: RuntimeError: .*memory"),
        ("vae/config", {"down_block_types": ["os.system"] * 4}, r"os\.system does not exist"),
        ("scheduler/scheduler_config", {"num_steps": 10**9}, "num_steps is 1000000000; allowed: .*, 1 to 100000"),
        ("scheduler/scheduler_config", {"solver": ["euler"]}, r"solver is \['euler'\]; allowed: euler"),
        ("model_index", {"transformer": ["os", "system"]}, r"is \['os', 'system'\]; allowed: ddt_fast.pipeline"),
        ("model_index", {"scheduler": ["diffusers", "DDIMScheduler"]}, "scheduler is .*DDIMScheduler"),
        ("model_index", {"vae": ["mine", "AutoencoderKL"]}, "vae is .*allowed: diffusers.AutoencoderKL or none"),
        ("model_index", {"_class_name": ["pipeline", "Mine"]}, "expected a DDTPipeline"),
        ("model_index", {"id2label": {"77": "x"}}, "id2label names class 77; allowed: 0 to 9"),
    ],
)
def test_wrong_settings_are_refused(latents, file, entries, message):
    change(latents / f"{file}.json", **entries)
    default, started = torch.get_default_dtype(), time.monotonic()
    with pytest.raises(ValueError, match=message):
        DDTPipeline.from_pretrained(latents, torch_dtype=torch.bfloat16)
    assert torch.get_default_dtype() == default
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("model_index.json", b"{"), "is not valid JSON"),
        (("transformer/config.json", b"{}"), "not a valid configuration.*num_heads"),
        ((f"transformer/{WEIGHTS_NAME}", b""), "cannot be read: it is empty"),
        ((f"transformer/{WEIGHTS_NAME}", b"x" * 100), "cannot be read: it is truncated"),
        ((f"transformer/{WEIGHTS_NAME}", (2**62).to_bytes(8, "little") + b"{}"), "cannot be read: it is truncated"),
        ((f"vae/{WEIGHTS_NAME}", b""), r"vae/.*\.safetensors cannot be read: it is empty; expected a whole"),
        (
            (f"vae/{WEIGHTS_NAME}", b"\x80\x02}."),
            "cannot be read: it is a pickle, which may hold code and was not opened",
        ),
        ("final_layer.linear.bias", r"1 missing tensor \(such as final_layer\.linear\.bias\)"),
        (torch.int8, "integer tensors"),
        ("vae", "lacks its folder vae"),
    ],
)
def test_damaged_folders_are_refused(latents, damage, message):
    """Files with other content; without a tensor, or with integers; without a folder."""
    file = latents / "transformer" / WEIGHTS_NAME
    if isinstance(damage, tuple):
        (latents / damage[0]).write_bytes(damage[1])
    elif damage == "vae":
        shutil.rmtree(latents / "vae")
    else:
        dtype = damage if isinstance(damage, torch.dtype) else torch.float32
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items() if name != damage}, file)
    with pytest.raises(ValueError, match=message):
        DDTPipeline.from_pretrained(latents)


PARTS = ("transformer", "vae")
PICKLED = "a pickle, which may hold code and was not opened"
ELSEWHERE = r"index\.json says that weights are in"


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        *((part, "diffusion_pytorch_model.bin", PICKLED) for part in PARTS),
        *(("transformer", name, PICKLED) for name in ("model.ckpt", "pytorch_model.pt")),
        *((part, "ddt_fast.pipeline.py", "is code, and was not executed") for part in ("transformer", "scheduler")),
        *((part, ["evil.bin"], ELSEWHERE) for part in PARTS),
        *((part, ["../evil.safetensors"], ELSEWHERE) for part in PARTS),
        *((part, ["/evil.safetensors"], ELSEWHERE) for part in PARTS),
        *((part, [entry], ELSEWHERE) for part in PARTS for entry in (3, ["a"])),
    ],
)
def test_code_is_refused_and_not_run(latents, tmp_path, part, name, message):
    """A pickle in place of safetensors, a module beside them, an index (here its entry, in a list) that leads out."""
    place, mark = latents / part, tmp_path / "it_ran"
    loads = [DDTPipeline.from_pretrained]
    if isinstance(name, list):
        (place / "evil.bin").write_bytes(pickle.dumps({"x": Runs(mark)}))
        (place / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": {"x": name[0]}}))
        loads += [load_model] if part == "transformer" else []
    elif name.endswith(".py"):
        (place / name).write_text(f"open({str(mark)!r}, 'w')")
    else:
        (place / WEIGHTS_NAME).unlink()
        (place / name).write_bytes(pickle.dumps({"x": Runs(mark)}))
    for load in loads:
        with pytest.raises(ValueError, match=message):
            load(latents)
    with pytest.raises(ValueError, match=message):
        DDTPipeline.from_pretrained(latents, trust_remote_code=True)
    if part == "transformer" and message == PICKLED:
        for load in (load_model, DDTTransformer2DModel.from_pretrained, DDTPipeline.from_pretrained):
            with pytest.raises(ValueError, match=r"pickle|holds no"):
                load(place)
    assert not mark.exists()


def test_a_lightning_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "it_ran"
    torch.save({"state_dict": golden.weights(LATENT_MODEL), "hook": Runs(mark)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="was not executed"):
        DDTPipeline.from_single_file(tmp_path / "a.ckpt")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("training.json", {"versions": 5}, r"training\.json: versions is a"),
        ("training.json", {"scores": [1]}, r"training\.json: scores is a list"),
        ("training.json", {"scores": {"guided": 3}}, r"training\.json: guided is a"),
        ("metrics.json", {"metrics": {"fid": 1}, "samples": "x"}, r"metrics\.json: samples is a str"),
        ("metrics.json", {"samples": {"num_images": "x"}}, r"metrics\.json: num_images is 'x'"),
    ],
)
def test_a_record_of_the_past_that_is_malformed(pixels, name, content, message):
    (pixels / name).write_text(json.dumps(content))
    for read in (DDTPipeline.from_pretrained, write_model_card):
        with pytest.raises(ValueError, match=message):
            read(pixels)


def test_words_of_other_people_stay_words_in_the_card(latents):
    evil = "a|b\r\n\n# Heading\u2028[link](http://elsewhere) ![x](http://elsewhere) <script>"
    training = {"commit": evil, "recipe": {evil: evil}, "scores": {evil: {"accuracy": evil}}}
    (latents / "training.json").write_text(json.dumps(training))
    metrics = {"metrics": {evil: evil}, "reference": {"source": evil}, "samples": {"num_images": 3}}
    (latents / "metrics.json").write_text(json.dumps(metrics))
    config = latents / "transformer" / "config.json"
    change(config, data={**json.loads(config.read_text())["data"], "autoencoder": f"user/{evil.split('/')[0]}"})
    card = write_model_card(latents).read_text()
    assert "elsewhere" in card
    assert "\n# Heading" not in card
    for bare in ("[link", "[x", "<script", "|b"):
        assert card.count(bare) == card.count("\\" + bare) > 0, bare


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("[" * 50_000, "valid YAML"),
        ("!!python/object/apply:os.system [touch it_ran]", "valid YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\ntraining: {adam_betas: [*b, *b]}", "adam_betas is nested"),
        ("training: {seed: {a: 1}}", "seed is nested"),
    ],
)
def test_a_malformed_recipe(tmp_path, monkeypatch, recipe, message):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "model")
    (folder / "training.json").write_text('{"steps": 3}')
    (folder / "recipe.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=message):
        write_model_card(folder)
    assert not (tmp_path / "it_ran").exists()
    (folder / "recipe.yaml").write_text("training: {repa_weight: 0.5}")  # without repa_encoder
    assert "repa_weight" in write_model_card(folder).read_text()
