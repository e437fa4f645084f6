"""Classes by name: from the image folder, through cache and run, to the model, its pipeline, grids and samples."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from latent_cases import encode, make_images

from ddt_fast.class_names import ClassNames, class_order, default_id2label, imagenet_id2label
from ddt_fast.config import DataConfig, DDTConfig, SamplingConfig
from ddt_fast.data.cached_images import CachedImages
from ddt_fast.data.image_folder import list_images
from ddt_fast.data.latent_dataset import LatentDataset
from ddt_fast.data.source import open_source
from ddt_fast.generation.seeds import assign
from ddt_fast.generation.settings import Draws
from ddt_fast.model.reference import DDT
from ddt_fast.model.settings import read_experiment
from ddt_fast.model.weights import save_model
from ddt_fast.pipeline import DDTPipeline
from ddt_fast.training.loop import train
from ddt_fast.work.cache_latents import _open_folders
from sample_jobs import sample, sample_error, small_autoencoder
from test_latent_models import CPU, experiment

IMAGENET = imagenet_id2label()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["dog", "cat"], ("cat", "dog")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["010", "9", "2"], ("2", "9", "010")),
        (["10", "9", "2a"], ("10", "2a", "9")),
        (["10", "9", "²"], ("10", "9", "²")),
    ],
)
def test_folders_are_in_the_order_of_names_or_of_whole_numbers(names, expected):
    assert class_order(names) == expected


@pytest.mark.parametrize(
    ("names", "num_classes", "expected"),
    [
        (None, 1000, IMAGENET),
        (None, 3, {}),
        (tuple(map(str, range(1000))), 1000, {label: str(label) for label in range(1000)}),
        (("n01443537", "n01440764"), 2, {0: IMAGENET[1], 1: IMAGENET[0]}),
        (("n01443537", "dog"), 3, {0: "n01443537", 1: "dog"}),
    ],
)
def test_imagenets_names_are_for_its_wordnet_ids_or_where_none_are_known(names, num_classes, expected):
    assert default_id2label("latents", num_classes, names) == expected


def test_a_name_with_commas_is_found_whole_and_in_parts():
    names = ClassNames(3, {0: "cat, black", 1: "cat, white", 2: "dog"})
    assert names.labels(["cat, white", "black", "Dog"]) == [1, 0, 2]
    assert [names.short(label) for label in range(3)] == ["cat", "cat", "dog"]
    assert ClassNames(2, {0: "caf\udce9"}).short(0) == "caf\\udce9"
    with pytest.raises(ValueError, match="class 'cat' is ambiguous"):
        names.label("cat")


def test_a_label_that_is_another_classes_name_is_said(capsys):
    names = ClassNames(3, dict(enumerate(("2", "5", "7"))))
    drawn = assign(Draws(classes=["2", 1]), names, 2)
    assert (drawn.labels.tolist(), drawn.words["classes"]) == ([2, 1], [2, 1])
    assert "class 2 is label 2, '7'; the class named 2 is 0" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("ddt_fast.training.run.plot_runs", lambda logs, output: None)


@pytest.mark.slow
def test_names_go_from_the_image_folder_to_samples(tmp_path, capsys, monkeypatch):
    encode(make_images(tmp_path / "images", {"cat": 3, "dog": 3, "horse, brown": 3}), tmp_path / "cache")
    data = DataConfig("latents", 16, small_autoencoder(tmp_path / "vae"), folder=str(tmp_path / "cache"))
    captions: list[list[str]] = []
    for module in ("training.samples", "generation.finish"):
        grid = __import__(f"ddt_fast.{module}", fromlist=["x"]).labelled_grid
        monkeypatch.setattr(
            f"ddt_fast.{module}.labelled_grid",
            lambda images, texts, *more, grid=grid: captions.append(list(texts)) or grid(images, texts, *more),
        )
    train(experiment(data, sample_every=5, sample_images=3), tmp_path / "run", CPU)
    assert captions.pop() == ["cat", "dog", "horse"]
    model = tmp_path / "run" / "model"
    assert read_experiment(model).data.class_names == ("cat", "dog", "horse, brown")
    assert "images of 3 classes (cat, dog, horse, brown), in latents" in (model / "README.md").read_text()

    pipe = DDTPipeline.from_pretrained(model)
    assert pipe.id2label == {0: "cat", 1: "dog", 2: "horse, brown"}
    assert pipe.get_label_ids(["dog", 2]) == [1, 2]
    pipe.save_pretrained(tmp_path / "pipeline")
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["id2label"]["1"] == "dog"
    for source in (model, tmp_path / "pipeline"):
        job = ["--checkpoint", str(source), "--num-images", "4", "--num-steps", "1", "--last-step", "0"]
        sample(tmp_path / "out" / source.name, *job, "--classes", "dog", "0", "Horse")
        assert captions.pop() == ["dog", "cat", "horse", "dog"]
        assert np.load(tmp_path / "out" / source.name / "samples.npz")["labels"].tolist() == [1, 0, 2, 1]
        assert "class 'dgo' is unknown; nearest: 1 'dog'" in sample_error(capsys, tmp_path, *job, "--classes", "dgo")
    assert json.loads((tmp_path / "out" / "model" / "generation.json").read_text())["settings"]["classes"] == [1, 0, 2]


def test_a_model_whose_names_are_not_known_says_so(tmp_path, capsys):
    config = DDTConfig(1, 2, 32, 2, 3, 2, 3)
    save_model(DDT(config), tmp_path / "model", DataConfig("latents", 8), SamplingConfig(num_steps=1))
    said = sample_error(capsys, tmp_path / "out", "--checkpoint", str(tmp_path / "model"), "--classes", "dog")
    assert "class 'dog': this model's classes have no names; allowed: 0 to 2" in said


def test_a_cache_of_before_keeps_its_order_and_is_warned_of(tmp_path, monkeypatch, capsys):
    images = make_images(tmp_path / "images", {"2": 2, "9": 2, "10": 2})
    with monkeypatch.context() as patch:
        patch.setattr("ddt_fast.data.image_folder.class_order", lambda names: tuple(sorted(names)))
        encode(images, tmp_path / "before")
    encode(images, tmp_path / "now")
    orders = {"before": ("10", "2", "9"), "now": ("2", "9", "10")}
    for name, order in orders.items():
        assert LatentDataset(tmp_path / name).settings.class_names == order
        assert _open_folders(images, tmp_path / name)[0].class_names == order  # a second call continues
        CachedImages(images, LatentDataset(tmp_path / name))
    assert list_images(images, ("a", "b")).class_names == orders["now"]

    made = experiment(DataConfig("latents", 16, "none", folder=str(tmp_path / "before")))
    with pytest.warns(UserWarning, match=re.escape("in the order of text: label 0 is folder '10', not '2'")):
        open_source(made)
    train(replace(made, data=replace(made.data, folder=str(tmp_path / "now"))), tmp_path / "run", CPU)
    assert "order of text" not in capsys.readouterr().err
    assert read_experiment(tmp_path / "run" / "model").data.class_names == orders["now"]


def test_captions_are_cut_to_the_width_of_their_image():
    from ddt_fast.generation.images import labelled_grid

    images = np.zeros((2, 64, 64, 3), np.uint8)
    grids = [np.asarray(labelled_grid(images, [long, "a"])) for long in ("W" * 300, "W")]
    assert grids[0].shape == grids[1].shape
    np.testing.assert_array_equal(grids[0][:, 66:], grids[1][:, 66:])
