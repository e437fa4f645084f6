"""Lightning checkpoints: what is read from them, what never runs, and what is written for the original code."""

import argparse
import collections
import datetime
import functools
import io
import json
import os
import pathlib
import pickle
import sys
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import golden_data as golden
from ddt_fast import FusedDDT, load_model
from ddt_fast.model.lightning import check_projector, read_lightning, write_lightning

NAME = "tiny_h48_d24"
CONFIG = golden.model_config(NAME)


def state_dict(ema="ema_denoiser.", raw="denoiser.", projector="diffusion_trainer.proj.0.") -> dict[str, Tensor]:
    """A checkpoint's, its raw weights one above the averaged."""
    weights = golden.weights(NAME)
    state = {raw + name: tensor + 1 for name, tensor in weights.items()}
    state |= {ema + name: tensor for name, tensor in weights.items()}
    return state | {projector + name: tensor for name, tensor in repa_projector().items()}


def repa_projector(widths=(48, 48, 48, 7)) -> dict[str, Tensor]:
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
    return {f"{2 * i}.{name}": tensor for i, layer in enumerate(layers) for name, tensor in layer.state_dict().items()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor) for name, tensor in expected.items()
    )


def test_the_released_keys_make_an_xl_of_either_weights(tmp_path):
    shapes = json.loads((golden.GOLDEN / "ddt_xl2_22en6de_keys.json").read_text())
    state = {}
    for prefix, value in (("denoiser.", 1.0), ("ema_denoiser.", 2.0)):
        # Strides of 0: a file of 200 kB has all the names and shapes.
        filled = torch.full((), value, dtype=torch.bfloat16)
        state |= {prefix + name: filled.expand(shape) for name, shape in shapes.items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "xl.ckpt")
    assert (tmp_path / "xl.ckpt").stat().st_size < 1e6
    for weights, value in (("raw", 1), ("ema", 2)):
        with pytest.warns(UserWarning, match=r"xl\.ckpt does not record patch size 2, 22 encoder blocks"):
            model = load_model(tmp_path / "xl.ckpt", dtype=torch.bfloat16, weights=weights)
        assert sum(parameter.numel() for parameter in model.parameters()) == 674_646_352
        assert all(parameter.flatten()[0] == value for parameter in model.parameters())


@pytest.mark.parametrize(
    ("ema", "raw"),
    [
        ("ema_denoiser.", "denoiser."),
        ("ema_denoiser._orig_mod.", "denoiser._orig_mod."),
        ("module.ema_denoiser.", "denoiser.module._orig_mod."),
        ("_orig_mod.ema_denoiser.", "_fsdp_wrapped_module.denoiser._checkpoint_wrapped_module."),
    ],
)
def test_everything_is_read_whatever_it_was_wrapped_in(tmp_path, ema, raw):
    state = state_dict(ema, raw, "module.diffusion_trainer.proj.0.") | {"vae.scale": torch.ones(1)}
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [{"a": torch.ones(2)}]}, tmp_path / "a.ckpt")
    read, weights = read_lightning(tmp_path / "a.ckpt"), golden.weights(NAME)
    assert same(read.ema, weights)
    assert same(read.raw, {name: tensor + 1 for name, tensor in weights.items()})
    assert check_projector(read.projector, 48, tmp_path) == (48, 48, 48, 7)
    assert read.other == ["epoch", "optimizer_states", "vae.scale"]


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("skip", [[], ["builtins", "pathlib", "posix", "os", "exec"]])
@pytest.mark.parametrize("place", ["beside", "inside", "alone", "blocked"])
def test_a_malicious_pickle_does_not_run(tmp_path, place, skip):
    mark = tmp_path / "it_ran"
    bad = Calls(exec, f"open({str(mark)!r}, 'w')")
    content = {"beside": {"state_dict": state_dict(), "hyper_parameters": bad}, "alone": bad}
    content["inside"] = {"state_dict": state_dict() | {"denoiser.more": bad}}
    content["blocked"] = {"state_dict": state_dict(), "callbacks": Calls(os.system, f"touch {mark}")}
    torch.save(content[place], tmp_path / "bad.ckpt")
    for read in (lambda path: read_lightning(path, skip), load_model):
        with pytest.raises(ValueError, match="holds more than tensors, and was not executed") as refusal:
            read(tmp_path / "bad.ckpt")
        name = r"(posix|nt)\.system" if place == "blocked" else "builtins.exec"
        assert refusal.match(rf"it would call or make {name}; .* do not trust this file$")
    assert not mark.exists()
    torch.load(tmp_path / "bad.ckpt", weights_only=False)
    assert mark.exists(), "the pickle is not malicious: the test says nothing"


class Unusual:
    """Of a package that nobody has heard of."""

    made = 0

    def __setstate__(self, state):
        Unusual.made += 1


def test_unusual_objects_are_named_and_can_be_passed_over(tmp_path, monkeypatch):
    package = types.ModuleType("mylab")
    package.Unusual = Unusual
    monkeypatch.setitem(sys.modules, "mylab", package)
    monkeypatch.setattr(Unusual, "__module__", "mylab")
    unusual = Unusual()
    unusual.size = 3
    torch.save({"state_dict": state_dict(), "hyper_parameters": {"config": unusual}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"was not executed: .* mylab\.Unusual; .*a\.ckpt OUT --skip mylab$"):
        read_lightning(tmp_path / "a.ckpt")
    for skip in (["mylab"], ["mylab.Unusual"]):
        assert same(read_lightning(tmp_path / "a.ckpt", skip).ema, golden.weights(NAME))
    with pytest.raises(ValueError, match="was not executed"):
        read_lightning(tmp_path / "a.ckpt", ["mylab.Un", "my"])
    assert Unusual.made == 0


def test_usual_hyperparameters_are_passed_over(tmp_path, monkeypatch):
    # As lightning.fabric.utilities.data.AttributeDict, which need not be installed to be passed over.
    package = types.ModuleType("lightning")
    package.AttributeDict = type("AttributeDict", (dict,), {"__module__": "lightning"})
    monkeypatch.setitem(sys.modules, "lightning", package)
    usual = [np.float64(0.5), np.arange(3), pathlib.Path("x"), argparse.Namespace(a=1), functools.partial(int, 3)]
    usual += [collections.defaultdict(list, {"a": [1]}), collections.OrderedDict(a=1), datetime.date(2025, 4, 8)]
    hyper_parameters = {"usual": usual, "attributes": package.AttributeDict(a=1)}
    torch.save({"state_dict": state_dict(), "hyper_parameters": hyper_parameters}, tmp_path / "a.ckpt")
    monkeypatch.delitem(sys.modules, "lightning")
    allowed = set(torch.serialization.get_safe_globals())
    read = read_lightning(tmp_path / "a.ckpt")
    assert same(read.ema, golden.weights(NAME))
    assert read.other == ["hyper_parameters"]
    assert set(torch.serialization.get_safe_globals()) == allowed


NOT_CHECKPOINTS = {
    "empty": lambda content: b"",
    "text": lambda content: b"hello",
    "half": lambda content: content[: len(content) // 2],
    "tail": lambda content: content[-1000:],
    "bare pickle": lambda content: pickle.dumps(Calls(exec, "raise SystemExit('it ran')")),
    "legacy": lambda content: saved({"state_dict": state_dict()}, _use_new_zipfile_serialization=False),
    "list": lambda content: saved([1]),
    "no tensors": lambda content: saved({"state_dict": {"conv.weight": torch.zeros(1), "denoiser.x": 3}}),
    "twice": lambda content: saved({"state_dict": state_dict() | {"denoiser._orig_mod.x_embedder.proj.bias": NOTHING}}),
}
NOTHING = torch.zeros(48)
MESSAGES = {
    "list": "is not a Lightning checkpoint: it holds no state_dict",
    "empty": "cannot be read: it is empty; expected a Lightning .ckpt",
    "no tensors": r"no denoiser\.\* tensors; it is not a DDT",
    "twice": r"holds denoiser\.x_embedder\.proj\.bias twice, once as denoiser\._orig_mod",
}


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_other_files_are_refused_in_one_line(tmp_path, kind):
    (tmp_path / "a.ckpt").write_bytes(NOT_CHECKPOINTS[kind](saved({"state_dict": state_dict()})))
    with pytest.raises(ValueError, match=MESSAGES.get(kind, "cannot be read: it is truncated")) as refusal:
        read_lightning(tmp_path / "a.ckpt")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_and_reading_changes_nothing(tmp_path, dtype):
    ema = {name: tensor.to(dtype) for name, tensor in golden.weights(NAME).items()}
    raw = {name: tensor + 1 for name, tensor in ema.items()}
    projector = repa_projector()
    for name, *sets in (("both", ema, raw, projector), ("one", ema, ema, {})):
        write_lightning(tmp_path / f"{name}.ckpt", *(sets if name == "both" else [ema]))
        read = read_lightning(tmp_path / f"{name}.ckpt")
        assert all(same(*pair) for pair in zip((read.ema, read.raw, read.projector), sets, strict=True)), name
    sizes = [(tmp_path / name).stat().st_size for name in ("one.ckpt", "both.ckpt")]
    assert sizes[0] < 0.6 * sizes[1], "equal weights are stored once"


def test_an_export_has_what_the_original_code_asks_for_under_the_released_names(tmp_path):
    weights = FusedDDT.from_reference(golden.model(NAME)).state_dict()
    write_lightning(tmp_path / "a.ckpt", weights, projector=repa_projector())
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    entries = ["epoch", "global_step", "pytorch-lightning_version", "state_dict", "optimizer_states", "lr_schedulers"]
    assert list(content) == entries
    assert content["state_dict"].keys() == state_dict().keys()
    assert same(read_lightning(tmp_path / "a.ckpt").ema, golden.weights(NAME))
    numbers = sum(tensor.nbytes for tensor in (*golden.weights(NAME).values(), *repa_projector().values()))
    assert (tmp_path / "a.ckpt").stat().st_size < 1.5 * numbers, "no part is stored with the whole it is a part of"


def test_projectors_are_three_layers_of_the_models_width(tmp_path):
    assert check_projector(repa_projector((48, 20, 30, 768)), 48, tmp_path) == (48, 20, 30, 768)
    for broken, message in (
        (repa_projector((48, 7)), r"lacks 2\.bias"),
        (repa_projector((48, 48, 48, 48, 7)), r"also has 6\.bias"),
        (repa_projector() | {"2.weight": torch.zeros(48, 9)}, r"2\.weight is \(48, 9\), .* expected an input of 48"),
        (repa_projector() | {"2.weight": torch.zeros(48)}, r"2\.weight is \(48,\)"),
        (repa_projector() | {"4.bias": torch.zeros(8)}, r"4\.bias \(8,\)"),
        (repa_projector((32, 48, 48, 7)), r"0\.weight is \(48, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_projector(broken, 48, tmp_path)
