"""The functions behind the commands, as a notebook uses them: typed, documented, cheap to import.

A wrong argument is a ValueError that says what is allowed, before anything is written."""

import importlib
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ddt_fast
from ddt_fast import Draws, Engine, Outputs, SamplingConfig, Scoring
from ddt_fast.__main__ import COMMANDS as NAMED
from ddt_fast.__main__ import main as name_commands
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.presets import PRESETS
from ddt_fast.wording import kind_of

COMMANDS = {
    "train_model": "ddt_fast.train",
    "generate": "ddt_fast.sample",
    "score_samples": "ddt_fast.evaluate",
    "encode_image_folder": "ddt_fast.cache_latents",
    "convert_checkpoint": "ddt_fast.convert",
    "study_refreshes": "ddt_fast.sharing",
    "fit_schedule": "ddt_fast.tune_sampler",
}
SETTINGS = ("Draws", "Engine", "Outputs", "Scoring")
IMAGES = {"samples": "images.npz", "reference": "images.npz", "features": "pixels", "output": "metrics.json"}
PLACES = {
    "load_model": {"path": EMBEDDED_CHECKPOINT},
    "generate": {"checkpoint": EMBEDDED_CHECKPOINT, "output_dir": "out"},
    "score_samples": IMAGES,
    "convert_checkpoint": {"source": EMBEDDED_CHECKPOINT, "out": "released.ckpt"},
    "encode_image_folder": {"images": "images", "output": "latents"},
    "study_refreshes": {"checkpoint": EMBEDDED_CHECKPOINT, "output_dir": "study"},
    "fit_schedule": {"checkpoint": EMBEDDED_CHECKPOINT, "output": "tuned.json"},
    "write_model_card": {"folder": "model"},
    "train_model": {"experiment": PRESETS["digits"], "output_dir": "run"},
}


def test_without_a_command_the_commands_are_named(monkeypatch, capsys):
    for arguments, said in (([], "no command"), (["train"], "'train' is not a command")):
        monkeypatch.setattr(sys, "argv", ["ddt_fast", *arguments])
        with pytest.raises(SystemExit, match="2"):
            name_commands()
        line = capsys.readouterr().err
        assert line.startswith(f"error: {said}; expected python -m ddt_fast.COMMAND, one of train, sample, ")
        assert line.count("\n") == 1
    assert {f"ddt_fast.{name}" for name in NAMED} == {*COMMANDS.values(), "ddt_fast.demo"}


def parser_of(module):
    build = importlib.import_module(module).build_parser
    return build("digits") if inspect.signature(build).parameters else build()


@pytest.mark.parametrize("name", [*COMMANDS, "write_model_card", *SETTINGS])
def test_help_says_what_every_argument_is(name):
    function = getattr(ddt_fast, name)
    signature = inspect.signature(function)
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation is not signature.empty
    text = inspect.getdoc(function)
    documented = text[text.index("Args:") :].partition("Raises:")[0]
    assert [name for name in signature.parameters if f"    {name}: " not in documented] == []


@pytest.mark.parametrize(
    ("name", "module"), [*COMMANDS.items(), *((name, "ddt_fast.sample") for name in SETTINGS[:-1])]
)
def test_the_functions_defaults_are_the_commands(name, module):
    given = parser_of(module).get_defaults()
    parameters = inspect.signature(getattr(ddt_fast, name)).parameters
    shared = {p for p in parameters if p in given and p not in ("checkpoint", "output_dir", "source", "out")}
    if name in SETTINGS:
        assert shared == {*parameters}
    elif name not in ("train_model", "study_refreshes", "generate"):
        assert len(shared) >= 4
    for parameter in shared:
        default = parameters[parameter].default
        default = list(default) if isinstance(default, tuple) else default
        assert default is inspect.Parameter.empty or given[parameter] == default, parameter


IMPORTED = """
import sys, ddt_fast
print([name for name in ("diffusers", "sklearn", "matplotlib") if name in sys.modules])
import ddt_fast.cache_latents, ddt_fast.dinov2
print([name for name in ("transformers",) if name in sys.modules])
"""


@pytest.mark.slow
def test_packages_are_imported_where_they_are_needed():
    found = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["[]", "[]"]


def test_every_public_name_is_there_and_types_are_shipped():
    for name in ddt_fast.__all__:
        assert getattr(ddt_fast, name).__doc__
    assert set(ddt_fast.__all__) <= set(dir(ddt_fast))
    assert (Path(ddt_fast.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="module 'ddt_fast' has no attribute 'train_modle'"):
        ddt_fast.train_modle  # noqa: B018


@pytest.mark.slow
def test_a_notebooks_day(tmp_path, capsys):
    """Train, draw, score, convert, study: each one call, each reading what the one before wrote."""
    digits = PRESETS["digits"]
    training = replace(digits.training, max_steps=3, batch_size=16, sample_images=10, score_samples=65, sample_every=5)
    quick = replace(digits, training=training, sampling=replace(digits.sampling, num_steps=3))
    run = tmp_path / "run"
    excepthook = sys.excepthook
    assert ddt_fast.train_model(quick, run, device="cpu").step == 3
    assert sys.excepthook is excepthook
    with pytest.raises(ValueError, match="holds an earlier run"):
        ddt_fast.train_model(quick, run)
    with pytest.raises(ValueError, match=r"run: the folder holds no .*; name .*/run/model"):
        ddt_fast.load_model(run)
    card = (run / "model" / "README.md").read_text()
    score = json.loads((run / "training.json").read_text())["scores"]["guided"]["frechet"]
    for fact in ("| steps | 3 |", "| batch_size | 16 |", f"| pixel Fréchet distance | {score:.6g} |"):
        assert fact in card
    assert str(tmp_path) not in card

    draws, engine = Draws(classes=np.array([3, 8]), seeds=np.arange(12)), Engine(device="cpu")
    drawn = ddt_fast.generate(run / "model", tmp_path / "drawn", draws=draws, engine=engine)
    samples = np.load(drawn / "samples.npz")
    assert (samples["labels"].tolist(), samples["seeds"].tolist()) == ([3, 8] * 6, list(range(12)))
    report = ddt_fast.score_samples(
        drawn / "samples.npz", drawn / "samples.npz", features="pixels", metrics=["fid"], output=drawn / "metrics.json"
    )
    assert report["metrics"]["fid"] == pytest.approx(0, abs=1e-4)

    released = ddt_fast.convert_checkpoint(run / "model", tmp_path / "released.ckpt")
    with pytest.raises(ValueError, match="weights is 'best'; allowed: ema, raw, both"):
        ddt_fast.convert_checkpoint(released, tmp_path / "again", weights="best")
    again = ddt_fast.convert_checkpoint(released, tmp_path / "again", preset="digits")
    first, second = (ddt_fast.load_model(place).state_dict() for place in (run / "model", again))
    assert all(first[name].equal(tensor) for name, tensor in second.items())
    assert "## Training" not in (again / "README.md").read_text()

    study = ddt_fast.study_refreshes(EMBEDDED_CHECKPOINT, tmp_path / "study", num_refreshes=3, num_samples=2)
    assert len(study.chosen) == 3
    assert (tmp_path / "study" / "similarity.png").is_file()
    pipe = ddt_fast.DDTPipeline.from_pretrained(run / "model")
    assert pipe.provenance.training["steps"] == 3
    capsys.readouterr()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Draws, {"num_images": 2.5}, r"num_images is 2\.5; allowed: a whole number, 1 or more"),
        (Draws, {"classes": [1.5]}, r"classes is \[1\.5\]; allowed: a list of labels or names, at least one"),
        (Draws, {"classes": "38"}, "classes is '38'"),
        (Draws, {"seeds": [0.5]}, r"seeds is \[0\.5\]"),
        (Draws, {"class_seeds": ["a"]}, r"class_seeds is \['a'\]"),
        (Draws, {"seeds_per_class": 2, "num_images": 20}, "`seeds_per_class` and `num_images` are both given; give"),
        (Engine, {"batch_size": 1.5}, r"batch_size is 1\.5"),
        (Engine, {"quantize": "int4"}, "quantize is 'int4'; allowed: int8"),
        (Engine, {"memory_budget": 3}, "memory_budget is 3; allowed: a number and a unit"),
        (Engine, {"reference": True, "compile": True}, "`reference` is plain PyTorch; it excludes `quantize`"),
        (Outputs, {"num_png": -1}, "num_png is -1; allowed: a whole number, 0 or more"),
        (Outputs, {"shard_size": 0}, "shard_size is 0"),
        (Scoring, {"reference": "x.npz", "features": "vgg"}, "features is 'vgg'; allowed: inception, pixels"),
        (Scoring, {"reference": "x.npz", "metrics": ["is"]}, "metric 'is' does not exist; allowed: fid, sfid"),
        (Scoring, {"reference": "x.npz", "center_crop": "8"}, "center_crop is '8'; allowed: a whole number, 1 or more"),
    ],
)
def test_wrong_settings_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("generate", {"engine": Engine(dtype="int8")}, "dtype is 'int8'; allowed: auto, float32, bfloat16, float16"),
        ("generate", {"engine": Engine(device=None)}, "device None cannot be used here"),
        ("generate", {"draws": [1]}, r"draws is a list; \w+ Draws"),
        ("generate", {"sampling": {}}, r"sampling is a dict; expected SamplingConfig"),
        ("generate", {"scoring": Scoring(3)}, "a source of images is an int; expected a path"),
        ("score_samples", {"batch_size": "x"}, "batch_size is 'x'; allowed: a whole number, 1 or more"),
        ("convert_checkpoint", {"weights": "best"}, "weights is 'best'; allowed: ema, raw, both"),
        ("convert_checkpoint", {"skip": "package"}, r"skip is 'package'; allowed: a list of packages"),
        ("train_model", {"experiment": "digits"}, r"experiment is a str; \w+ Experiment"),
        ("train_model", {"output_dir": None}, "the output folder is a NoneType"),
        ("study_refreshes", {"sampling": 3}, r"sampling is an int; expected SamplingConfig"),
        ("study_refreshes", {"num_samples": 1.5}, r"num.samples is 1\.5"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, monkeypatch, function, arguments, message):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        getattr(ddt_fast, function)(**PLACES[function] | arguments)
    assert [path for path in tmp_path.rglob("*.*") if path.name != "images.npz"] == []


PATHS = {
    "load_model": ["path"],
    "generate": ["checkpoint", "output_dir"],
    "score_samples": ["samples", "reference", "output", "save_statistics"],
    "convert_checkpoint": ["source", "out", "config"],
    "encode_image_folder": ["images", "output", "autoencoder", "repa_encoder"],
    "study_refreshes": ["checkpoint", "output_dir"],
    "write_model_card": ["folder"],
    "train_model": ["output_dir", "resume"],
}
SAID = {"path": "checkpoint", "output_dir": "the output folder"}
SAID |= dict.fromkeys(("samples", "reference"), "a source of images")


@pytest.mark.parametrize("wrong", [["place"], ""], ids=repr)
@pytest.mark.parametrize(("function", "argument"), [(name, path) for name, paths in PATHS.items() for path in paths])
def test_anything_but_a_path_is_refused(tmp_path, monkeypatch, function, argument, wrong):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.png").touch()
    monkeypatch.chdir(tmp_path)
    said = "is empty; expected a path" if wrong == "" else f"is {kind_of(wrong)}; expected a path"
    with pytest.raises(ValueError, match=f"{SAID.get(argument, argument)} {said}"):
        getattr(ddt_fast, function)(**PLACES[function] | {argument: wrong})
    assert {path.name for path in tmp_path.iterdir()} <= {"images.npz", "images", "out", "latents", "run"}


def test_wrong_arguments_of_pipelines_and_of_sample_are_refused():
    pipe, model = (load(EMBEDDED_CHECKPOINT) for load in (ddt_fast.DDTPipeline.from_pretrained, ddt_fast.load_model))
    saves = [part.save_pretrained for part in (pipe, pipe.transformer, pipe.scheduler)]
    for function in (pipe.from_pretrained, pipe.from_single_file, pipe.transformer.from_pretrained, *saves):
        with pytest.raises(ValueError, match=r"is an int; expected a path"):
            function(3)
    with pytest.raises(ValueError, match=r"config is a type; expected SamplingConfig"):
        ddt_fast.sampling.sample(model, torch.zeros(1, 1, 8, 8), torch.tensor([1]), SamplingConfig)
