"""A wrong argument of a public function is a ValueError that says what is allowed, before anything is written."""

import numpy as np
import pytest
import torch

import ddt_fast
from ddt_fast import SamplingConfig
from ddt_fast.model.weights import EMBEDDED_CHECKPOINT
from ddt_fast.presets import PRESETS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 2.5}, r"--num-images is 2\.5; allowed: a whole number, 1 or more"),
        ({"num_images": "3"}, "--num-images is '3'"),
        ({"batch_size": 1.5}, r"--batch-size is 1\.5"),
        ({"classes": [1.5]}, r"--classes is \[1\.5\]; allowed: a list of whole numbers, at least one"),
        ({"classes": [True]}, r"--classes is \[True\]"),
        ({"classes": 3}, "--classes is 3"),
        ({"classes": []}, r"--classes is \[\]"),
        ({"classes": "38"}, "--classes is '38'"),
        ({"seeds": [0.5]}, r"--seeds is \[0\.5\]"),
        ({"class_seeds": ["a"]}, r"--class-seeds is \['a'\]"),
        ({"first_seed": 1.5}, r"--first-seed is 1\.5; allowed: a whole number"),
        ({"quantize": "int4"}, "--quantize is 'int4'; allowed: int8"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: auto, float32, bfloat16, float16"),
        ({"memory_budget": 3}, "3 is no amount of memory"),
        ({"sampling": {}}, "sampling is a dict; expected SamplingConfig"),
        ({"device": None}, "device None cannot be used here"),
        ({"output_dir": None}, "the output folder is a NoneType; expected a path"),
    ],
)
def test_generate(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ddt_fast.generate(**{"output_dir": tmp_path / "out", **arguments})
    assert not list(tmp_path.rglob("*.*"))


def test_generate_takes_numpys_numbers(tmp_path):
    folder = ddt_fast.generate(output_dir=tmp_path, classes=np.array([3, 8]), seeds=np.arange(2), device="cpu")
    samples = np.load(folder / "samples.npz")
    assert (samples["labels"].tolist(), samples["seeds"].tolist()) == ([3, 8], [0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": "vgg"}, "features is 'vgg'; allowed: inception, pixels"),
        ({"batch_size": "x"}, "--batch-size is 'x'; allowed: a whole number, 1 or more"),
        ({"center_crop": "8"}, "--center-crop is '8'; allowed: a whole number, 1 or more"),
    ],
)
def test_score_samples(tmp_path, arguments, message):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    place = {"samples": tmp_path / "images.npz", "reference": tmp_path / "images.npz", "output": tmp_path / "m.json"}
    with pytest.raises(ValueError, match=message):
        ddt_fast.score_samples(**place, **arguments)
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize("out", ["released.ckpt", "folder"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "best"}, "--weights is 'best'; allowed: ema, raw, both"),
        ({"skip": "package"}, "--skip is 'package'; wanted a list of packages"),
    ],
)
def test_convert_checkpoint(tmp_path, out, arguments, message):
    source = EMBEDDED_CHECKPOINT
    if out == "folder":
        source = ddt_fast.convert_checkpoint(EMBEDDED_CHECKPOINT, tmp_path / "source.ckpt")
    with pytest.raises(ValueError, match=message):
        ddt_fast.convert_checkpoint(source, tmp_path / out, **arguments)
    assert not (tmp_path / out).exists()


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
        ("generate", "evaluate", "a source of images"),
        ("score_samples", "samples", "a source of images"),
        ("score_samples", "reference", "a source of images"),
        ("score_samples", "output", "--output"),
        ("score_samples", "save_statistics", "--save-statistics"),
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
    said = "has an empty name; name one" if wrong == "" else f"is a {type(wrong).__name__}; expected a path"
    with pytest.raises(ValueError, match=f"{name} {said}"):
        getattr(ddt_fast, function)(**PLACES[function] | {argument: wrong})
    assert {path.name for path in tmp_path.iterdir()} <= {"images.npz", "images", "out", "latents", "run"}


@pytest.mark.parametrize("name", ["from_pretrained", "from_single_file", "save_pretrained"])
def test_what_is_no_path_to_a_pipeline(name):
    pipe = ddt_fast.DDTPipeline.from_pretrained(EMBEDDED_CHECKPOINT)
    for part in (pipe, pipe.transformer, pipe.scheduler) if name == "save_pretrained" else (pipe, pipe.transformer):
        if hasattr(part, name):
            with pytest.raises(ValueError, match="is a int; expected a path"):
                getattr(part, name)(3)


def test_the_others(tmp_path):
    with pytest.raises(ValueError, match="experiment is a str; expected Experiment"):
        ddt_fast.train_model("digits", tmp_path / "run")
    with pytest.raises(ValueError, match="the output folder is a NoneType"):
        ddt_fast.train_model(PRESETS["digits"], None)
    with pytest.raises(ValueError, match="sampling is a int; expected SamplingConfig"):
        ddt_fast.study_refreshes(output_dir=tmp_path / "study", sampling=3)
    with pytest.raises(ValueError, match=r"num_samples is 1\.5"):
        ddt_fast.study_refreshes(output_dir=tmp_path / "study", num_samples=1.5)
    model = ddt_fast.load_model(EMBEDDED_CHECKPOINT)
    with pytest.raises(ValueError, match="config is a type; expected SamplingConfig"):
        ddt_fast.sampling.sample(model, torch.zeros(1, 1, 8, 8), torch.tensor([1]), SamplingConfig)
    assert list(tmp_path.iterdir()) == []
