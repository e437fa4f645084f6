"""The convert command: released checkpoint to model folder and back, bit for bit, and every way it can go wrong."""

import errno
import json
import os
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import ddt_fast.convert as convert
import ddt_fast.work.convert as work
import golden_data as golden
from ddt_fast import load_model
from ddt_fast.config import DataConfig, SamplingConfig
from ddt_fast.model.lightning import read_lightning, write_lightning
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import CONFIG_NAME, WEIGHTS_NAME, read_experiment
from ddt_fast.model.weights import read_weight_sets, save_model
from ddt_fast.presets import PRESETS
from sample_jobs import error_line, files_up_to

NAME = "tiny_h48_d24"
CONFIG = golden.model_config(NAME)
DATA, SAMPLING = DataConfig("latents", 64, "some/vae"), SamplingConfig(num_steps=7, guidance_interval=(0.2, 0.9))
EMA = golden.weights(NAME)
RAW = {name: tensor + 1 for name, tensor in EMA.items()}
PROJECTOR = {
    name: tensor.detach()
    for name, tensor in torch.nn.Sequential(
        *(torch.nn.Linear(48, 48), torch.nn.SiLU(), torch.nn.Linear(48, 48), torch.nn.SiLU(), torch.nn.Linear(48, 7))
    ).named_parameters()
}


def same(actual, expected) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.fixture
def place(tmp_path):
    """A folder with released.ckpt and, as a training run leaves it, recipe.yaml."""
    write_lightning(tmp_path / "released.ckpt", EMA, RAW, PROJECTOR)
    recipe = {"model": asdict(CONFIG), "data": asdict(DATA), "training": {"max_steps": 5}}
    recipe["sampling"] = asdict(SAMPLING) | {"guidance_interval": [0.2, 0.9]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def run(place, *arguments: str) -> None:
    convert.main([argument.format(place) for argument in arguments])


TO_FOLDER = ("{0}/released.ckpt", "{0}/model", "--config", "{0}/recipe.yaml")


def test_a_released_checkpoint_becomes_a_folder_of_its_average(place, capsys):
    run(place, *TO_FOLDER)
    folder = place / "model"
    assert {path.name for path in folder.iterdir()} == {
        *(CONFIG_NAME, WEIGHTS_NAME, "repa_projector.safetensors", "README.md")
    }
    assert same(load_model(folder).state_dict(), EMA)
    assert same(load_file(folder / "repa_projector.safetensors"), PROJECTOR)
    experiment = read_experiment(folder)
    assert (experiment.model, experiment.data, experiment.sampling) == (CONFIG, DATA, SAMPLING)
    said = capsys.readouterr().out
    count = sum(tensor.numel() for tensor in EMA.values())
    for kind in ("EMA", "raw"):
        assert f"{kind} weights, {len(EMA)} tensors, {count:,} parameters, float32" in said
    assert "REPA projector, 6 tensors" in said
    assert "ignored: epoch, global_step, pytorch-lightning_version, optimizer_states, lr_schedulers\n" in said
    assert "guessed" not in said
    with pytest.raises(ValueError, match="holds no raw weights; take its ema weights"):
        load_model(folder, weights="raw")


def test_a_recipes_data_are_what_the_model_beside_it_remembers(place):
    names = tuple(f"class {i}" for i in range(CONFIG.num_classes))
    data = replace(DATA, pixels_per_latent=8, scaling_factor=0.5, class_names=names)
    save_model(golden.model(NAME), place / "model", data, SamplingConfig(num_steps=3))
    run(place, "{0}/released.ckpt", "{0}/out", "--config", "{0}/recipe.yaml")
    experiment = read_experiment(place / "out")
    assert (experiment.data, experiment.sampling) == (data, SAMPLING)


def test_weights_can_be_the_raw_ones_or_both_and_there_and_back_again_is_exact(place):
    run(place, *TO_FOLDER, "--weights", "raw")
    assert same(load_model(place / "model").state_dict(), RAW)
    run(place, *TO_FOLDER, "--weights", "both")
    assert same(load_model(place / "model").state_dict(), EMA)
    for source in ("model", "released.ckpt"):
        config = CONFIG if source == "released.ckpt" else None
        assert same(load_model(place / source, weights="raw", config=config).state_dict(), RAW)
    run(place, "{0}/model", "{0}/back.ckpt")
    run(place, "{0}/model", "{0}/raw.ckpt", "--weights", "raw")
    raw = read_lightning(place / "raw.ckpt")
    assert same(raw.ema, RAW)
    assert same(raw.raw, RAW)
    read = [read_weight_sets(place / source, CONFIG) for source in ("model", "released.ckpt")]
    for sets in (*read, read_lightning(place / "back.ckpt")):
        assert same(sets.ema, EMA)
        assert same(sets.raw, RAW)
        assert same(sets.projector, PROJECTOR)


def test_what_training_starts_from_must_fit_its_model(place):
    for name, value in (("num_blocks", 6), ("hidden_size", 96), ("num_classes", 3)):
        message = rf"released\.ckpt .* disagree: {name} {getattr(CONFIG, name)} in .*\.ckpt, {value} in the config"
        with pytest.raises(ValueError, match=message):
            read_weight_sets(place / "released.ckpt", replace(CONFIG, **{name: value}))
    save_model(golden.model(NAME), place / "model", DATA, SAMPLING)
    with pytest.raises(ValueError, match=r"disagree: num_encoder_blocks 3 in .*/model, 2 in the config$"):
        read_weight_sets(place / "model", replace(CONFIG, num_encoder_blocks=2))
    write_lightning(place / "raw.ckpt", EMA, {name: tensor[:1] for name, tensor in RAW.items()})
    with pytest.raises(ValueError, match=r"raw\.ckpt and its configuration disagree: hidden_size 1 in"):
        read_weight_sets(place / "raw.ckpt", CONFIG)
    odd_projector(place)
    with pytest.raises(ValueError, match=r"the REPA projector in .* does not fit: 4\.weight is \(7, 9\)"):
        read_weight_sets(place / "released.ckpt", CONFIG)


def test_an_export_without_raw_weights_says_so(place, capsys):
    save_model(golden.model(NAME), place / "model", DATA, SAMPLING)
    run(place, "{0}/model", "{0}/back.ckpt")
    assert "there are no raw weights: denoiser.* are the same as ema_denoiser.*" in capsys.readouterr().out
    back = read_lightning(place / "back.ckpt")
    assert same(back.raw, EMA)
    assert same(back.ema, EMA)
    run(place, "{0}/model/" + WEIGHTS_NAME, "{0}/bare.ckpt")
    assert same(read_lightning(place / "bare.ckpt").ema, EMA)


def test_shapes_of_a_preset_need_no_settings(tmp_path, capsys):
    model = DDT(PRESETS["digits"].model)
    write_lightning(tmp_path / "digits.ckpt", model.state_dict())
    run(tmp_path, "{0}/digits.ckpt", "{0}/model")
    assert "settings: guessed from the shapes, preset digits (image size 8, 3 of 4 blocks" in capsys.readouterr().out
    assert read_experiment(tmp_path / "model").sampling == PRESETS["digits"].sampling
    run(tmp_path, "{0}/digits.ckpt", "{0}/model", "--preset", "digits")
    assert "guessed" not in capsys.readouterr().out
    run(tmp_path, "{0}/digits.ckpt", "{0}/again", "--config", "{0}/model/config.json")
    assert (tmp_path / "again" / CONFIG_NAME).read_text() == (tmp_path / "model" / CONFIG_NAME).read_text()


def test_presets_of_the_same_shapes_are_both_named(tmp_path, capsys):
    shapes = json.loads((golden.GOLDEN / "ddt_xl2_22en6de_keys.json").read_text())
    shapes["y_embedder.embedding_table.weight"] = [101, 1152]
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    guessed = work._settings(tmp_path / "xl.ckpt", weights, work.Settings(None, None))
    said = capsys.readouterr().out
    assert "guessed from the shapes, preset xl2_256" in said
    assert "if this is xl2_512, which has the same shapes, add --preset xl2_512" in said
    assert "settings: 100 classes, from the shapes" in said
    assert guessed.model == replace(PRESETS["xl2_256"].model, num_classes=100)
    named = work._settings(tmp_path / "xl.ckpt", weights, work.Settings("xl2_512", None))
    assert named.data.image_size == 512


def released(*weights, **projector):
    """Replaces released.ckpt by these weights, their raw ones and their projector."""
    return lambda place: write_lightning(place / "released.ckpt", *(make() for make in weights), **projector)


def of_config(**changes):
    return lambda: DDT(replace(CONFIG, **changes)).state_dict()


def fewer_names():
    return {name: tensor for name, tensor in EMA.items() if "norm1" not in name} | {"pos_embed": torch.zeros(1)}


other_architecture = released(of_config(hidden_size=32))
raw_of_another_model = released(lambda: EMA, of_config(num_blocks=6))
odd_projector = released(lambda: EMA, projector=PROJECTOR | {"4.weight": torch.zeros(7, 9)})


def foreign_files(place):
    (place / "model").mkdir()
    (place / "model" / "thesis.tex").write_text("precious")


def a_folder(place):
    save_model(golden.model(NAME), place / "model", DATA, SAMPLING)


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (other_architecture, TO_FOLDER, "disagree: hidden_size 32 in {0}/released.ckpt, 48 in the config"),
        (other_architecture, TO_FOLDER[:2], "blocks of width 32, head dimension 16, which no preset has"),
        (released(fewer_names), TO_FOLDER, "missing tensors (such as blocks.0.norm1.weight); 1 unexpected tensor"),
        (raw_of_another_model, (*TO_FOLDER, "--weights", "both"), "num_blocks 6 in {0}/released.ckpt, 5 in the config"),
        (odd_projector, TO_FOLDER, "the REPA projector in {0}/released.ckpt does not fit: 4.weight is (7, 9)"),
        (lambda place: (place / "released.ckpt").write_text("hello"), TO_FOLDER, "cannot be read: it is truncated"),
        (foreign_files, TO_FOLDER, "holds thesis.tex, which ddt-fast did not write"),
        (a_folder, ("{0}/model", "{0}/model"), "is both SOURCE and OUT; name another OUT"),
        (a_folder, ("{0}/model", "{0}/model/x.ckpt"), "x.ckpt lies inside {0}/model; name another place"),
        (a_folder, ("{0}/model", "{0}/released.ckpt"), "released.ckpt exists; remove it or name another"),
        (a_folder, ("{0}/model", "{0}/other"), "SOURCE or OUT must be one, or SOURCE a training run"),
        (a_folder, ("{0}/model", "{0}/x.ckpt", "--skip", "omegaconf"), "--skip is for a source that is a .ckpt"),
        (a_folder, ("{0}/model", "{0}/x.ckpt", "--weights", "raw"), "holds no raw weights; take its ema weights"),
        (a_folder, ("{0}/model", "{0}/x.ckpt", "--weights", "both"), "holds no raw weights; take its ema weights"),
        (a_folder, ("{0}/model", "{0}/x.ckpt", "--preset", "digits"), "preset is for checkpoints without config"),
        (a_folder, ("{0}/model", "{0}/x.ckpt", "--config", "{0}/recipe.yaml"), "--config is for checkpoints without"),
        (None, ("{0}/released.ckpt", "{0}/released.ckpt"), "is both SOURCE and OUT"),
        (None, ("{0}/released.ckpt", "{0}/other.ckpt"), "is named like a file; name a folder"),
        (None, ("{0}/released.ckpt", "{0}/recipe.yaml"), "exists and is not a folder"),
        (None, ("{0}/released.ckpt", "{0}"), "released.ckpt, which ddt-fast did not write"),
        (None, ("{0}/released.ckpt", ""), "OUT is empty"),
        (None, ("{0}/nowhere.ckpt", "{0}/model"), "nowhere.ckpt does not exist"),
        (None, (*TO_FOLDER, "--preset", "digits"), "--preset and --config are both given"),
        (None, (*TO_FOLDER[:2], "--preset", "xxl"), "preset 'xxl' does not exist; allowed: digits"),
        (None, (*TO_FOLDER[:2], "--preset", "b2_256"), "which preset b2_256 does not have"),
        (None, (*TO_FOLDER[:2], "--config", "{0}/nowhere.yaml"), "nowhere.yaml does not exist"),
        (None, (*TO_FOLDER[:2], "--config", "{0}/released.ckpt"), "is not a valid configuration"),
        (None, (*TO_FOLDER, "--weights", "best"), "--weights"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place, capsys, prepare, arguments, message):
    if prepare is not None:
        prepare(place)
    before = sorted(place.rglob("*"))
    assert message.format(place) in error_line(capsys, convert.main, [argument.format(place) for argument in arguments])
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("arguments", [(*TO_FOLDER, "--weights", "raw"), ("{0}/model", "{0}/out.ckpt")])
def test_a_full_disk_leaves_nothing_half_written_and_keeps_the_older_folder(place, capsys, arguments):
    run(place, *TO_FOLDER)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with files_up_to(100_000):
        error = error_line(capsys, convert.main, [argument.format(place) for argument in arguments])
    assert "could not be written" in error
    assert os.strerror(errno.EFBIG) in error
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
