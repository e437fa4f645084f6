"""The functions behind the commands, as a notebook uses them: typed, documented, cheap to import."""

import importlib
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ddt_fast
from ddt_fast.__main__ import COMMANDS as NAMED
from ddt_fast.__main__ import main as name_commands
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.presets import PRESETS

COMMANDS = {
    "train_model": "ddt_fast.train",
    "generate": "ddt_fast.sample",
    "score_samples": "ddt_fast.evaluate",
    "encode_image_folder": "ddt_fast.cache_latents",
    "convert_checkpoint": "ddt_fast.convert",
    "study_refreshes": "ddt_fast.sharing",
}
SETTINGS = ("Draws", "Engine", "Outputs", "Scoring")


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


def test_importing_the_package_imports_no_more_than_the_model_needs():
    code = "import sys, ddt_fast; print([n for n in ('diffusers', 'sklearn', 'matplotlib') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_there_and_types_are_shipped():
    for name in ddt_fast.__all__:
        assert getattr(ddt_fast, name).__doc__
    assert set(ddt_fast.__all__) <= set(dir(ddt_fast))
    assert (Path(ddt_fast.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="module 'ddt_fast' has no attribute 'train_modle'"):
        ddt_fast.train_modle  # noqa: B018


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

    draws, engine = ddt_fast.Draws(classes=[3, 8], num_images=12), ddt_fast.Engine(device="cpu")
    drawn = ddt_fast.generate(run / "model", tmp_path / "drawn", draws=draws, engine=engine)
    samples = np.load(drawn / "samples.npz")
    assert samples["labels"].tolist() == [3, 8] * 6
    report = ddt_fast.score_samples(
        drawn / "samples.npz", drawn / "samples.npz", features="pixels", metrics=["fid"], output=drawn / "metrics.json"
    )
    assert report["metrics"]["fid"] == pytest.approx(0, abs=1e-4)

    released = ddt_fast.convert_checkpoint(run / "model", tmp_path / "released.ckpt")
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
