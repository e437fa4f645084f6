"""A wrong argument of a public function is a ValueError that says what is allowed, before anything is written."""

import numpy as np
import pytest
import torch

import ddt_fast
from ddt_fast import Draws, Engine, Outputs, SamplingConfig, Scoring
from ddt_fast.model.weights import EMBEDDED_CHECKPOINT
from ddt_fast.presets import PRESETS


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Draws, {"num_images": 2.5}, r"num_images is 2\.5; allowed: a whole number, 1 or more"),
        (Draws, {"num_images": "3"}, "num_images is '3'"),
        (Draws, {"classes": [1.5]}, r"classes is \[1\.5\]; allowed: a list of labels or names, at least one"),
        (Draws, {"classes": [True]}, r"classes is \[True\]"),
        (Draws, {"classes": 3}, "classes is 3"),
        (Draws, {"classes": []}, r"classes is \[\]"),
        (Draws, {"classes": "38"}, "classes is '38'"),
        (Draws, {"seeds": [0.5]}, r"seeds is \[0\.5\]"),
        (Draws, {"class_seeds": ["a"]}, r"class_seeds is \['a'\]"),
        (Draws, {"first_seed": 1.5}, r"first_seed is 1\.5; allowed: a whole number"),
        (
            Draws,
            {"seeds_per_class": 2, "num_images": 20},
            "`seeds_per_class` and `num_images` are both given; give one",
        ),
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
def test_settings(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("generate", {"engine": Engine(dtype="int8")}, "dtype is 'int8'; allowed: auto, float32, bfloat16, float16"),
        ("generate", {"engine": Engine(device=None)}, "device None cannot be used here"),
        ("generate", {"draws": [1]}, r"draws is a list; \w+ Draws"),
        ("generate", {"sampling": {}}, r"sampling is a dict; expected SamplingConfig"),
        ("generate", {"draws": Draws(seeds=[1, 2], num_images=3)}, "`seeds` holds 2 seeds for 3 images"),
        ("score_samples", {"features": "vgg"}, "features is 'vgg'; allowed: inception, pixels"),
        ("score_samples", {"batch_size": "x"}, "batch_size is 'x'; allowed: a whole number, 1 or more"),
        ("score_samples", {"center_crop": "8"}, "center_crop is '8'; allowed: a whole number, 1 or more"),
        ("convert_checkpoint", {"weights": "best"}, "weights is 'best'; allowed: ema, raw, both"),
        ("convert_checkpoint", {"skip": "package"}, r"skip is 'package'; allowed: a list of packages"),
        ("train_model", {"experiment": "digits"}, r"experiment is a str; \w+ Experiment"),
        ("train_model", {"output_dir": None}, "the output folder is a NoneType"),
        ("study_refreshes", {"sampling": 3}, r"sampling is a int; expected SamplingConfig"),
        ("study_refreshes", {"num_samples": 1.5}, r"num.samples is 1\.5"),
    ],
)
def test_functions(tmp_path, monkeypatch, function, arguments, message):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        getattr(ddt_fast, function)(**PLACES[function] | arguments)
    assert [path for path in tmp_path.rglob("*.*") if path.name != "images.npz"] == []


def test_generate_takes_numpys_numbers(tmp_path):
    draws = Draws(classes=np.array([3, 8]), seeds=np.arange(2))
    folder = ddt_fast.generate(output_dir=tmp_path, draws=draws, engine=Engine(device="cpu"))
    samples = np.load(folder / "samples.npz")
    assert (samples["labels"].tolist(), samples["seeds"].tolist()) == ([3, 8], [0, 1])


def test_a_folder_converted_to_a_folder_is_refused_as_well(tmp_path):
    source = ddt_fast.convert_checkpoint(EMBEDDED_CHECKPOINT, tmp_path / "source.ckpt")
    with pytest.raises(ValueError, match="weights is 'best'; allowed: ema, raw, both"):
        ddt_fast.convert_checkpoint(source, tmp_path / "folder", weights="best")
    assert not (tmp_path / "folder").exists()


IMAGES = {"samples": "images.npz", "reference": "images.npz", "features": "pixels", "output": "metrics.json"}
PLACES = {
    "load_model": {"path": EMBEDDED_CHECKPOINT},
    "generate": {"checkpoint": EMBEDDED_CHECKPOINT, "output_dir": "out"},
    "score_samples": IMAGES,
    "convert_checkpoint": {"source": EMBEDDED_CHECKPOINT, "out": "released.ckpt"},
    "encode_image_folder": {"images": "images", "output": "latents"},
    "study_refreshes": {"checkpoint": EMBEDDED_CHECKPOINT, "output_dir": "study"},
    "write_model_card": {"folder": "model"},
    "train_model": {"experiment": PRESETS["digits"], "output_dir": "run"},
}


@pytest.mark.parametrize("wrong", [3, b"place", ["place"], ""], ids=repr)
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        ("load_model", "path", "checkpoint"),
        ("generate", "checkpoint", "checkpoint"),
        ("generate", "output_dir", "the output folder"),
        ("score_samples", "samples", "a source of images"),
        ("score_samples", "reference", "a source of images"),
        ("score_samples", "output", "output"),
        ("score_samples", "save_statistics", "save_statistics"),
        ("convert_checkpoint", "source", "source"),
        ("convert_checkpoint", "out", "out"),
        ("convert_checkpoint", "config", "config"),
        ("encode_image_folder", "images", "images"),
        ("encode_image_folder", "output", "output"),
        ("encode_image_folder", "autoencoder", "autoencoder"),
        ("encode_image_folder", "repa_encoder", "repa_encoder"),
        ("study_refreshes", "checkpoint", "checkpoint"),
        ("study_refreshes", "output_dir", "the output folder"),
        ("write_model_card", "folder", "folder"),
        ("train_model", "output_dir", "the output folder"),
        ("train_model", "resume", "resume"),
    ],
)
def test_what_is_no_path(tmp_path, monkeypatch, function, argument, name, wrong):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.png").touch()
    monkeypatch.chdir(tmp_path)
    said = "is empty; expected a path" if wrong == "" else f"is a {type(wrong).__name__}; expected a path"
    with pytest.raises(ValueError, match=f"{name} {said}"):
        getattr(ddt_fast, function)(**PLACES[function] | {argument: wrong})
    assert {path.name for path in tmp_path.iterdir()} <= {"images.npz", "images", "out", "latents", "run"}


@pytest.mark.parametrize("name", ["from_pretrained", "from_single_file", "save_pretrained"])
def test_what_is_no_path_to_a_pipeline(name):
    pipe = ddt_fast.DDTPipeline.from_pretrained(EMBEDDED_CHECKPOINT)
    for part in (pipe, pipe.transformer, pipe.scheduler) if name == "save_pretrained" else (pipe, pipe.transformer):
        if hasattr(part, name):
            with pytest.raises(ValueError, match=r"is a int; expected a path"):
                getattr(part, name)(3)


def test_sample_and_scoring(tmp_path):
    model = ddt_fast.load_model(EMBEDDED_CHECKPOINT)
    with pytest.raises(ValueError, match=r"config is a type; expected SamplingConfig"):
        ddt_fast.sampling.sample(model, torch.zeros(1, 1, 8, 8), torch.tensor([1]), SamplingConfig)
    with pytest.raises(ValueError, match=r"a source of images is a int; expected a path"):
        ddt_fast.generate(output_dir=tmp_path, scoring=Scoring(3))
    assert list(tmp_path.iterdir()) == []
