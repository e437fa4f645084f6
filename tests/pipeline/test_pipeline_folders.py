"""Pipelines on disk and on the Hub: round trips, shards, released checkpoints, model cards."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import golden_data as golden
from ddt_fast import load_model
from ddt_fast.class_names import ClassNames, imagenet_id2label
from ddt_fast.config import DataConfig, SamplingConfig
from ddt_fast.model.card import write_model_card
from ddt_fast.model.lightning import write_lightning
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT, WEIGHTS_NAME, read_experiment
from ddt_fast.pipeline import DDTPipeline, DDTScheduler, DDTTransformer2DModel
from ddt_fast.presets import PRESETS
from pipeline_cases import LATENT_MODEL, LATENT_SAMPLING, digits, quiet, seeded


def image(pipe, label=1):
    return quiet(pipe)(label, 3, generator=seeded(0), output_type="np").images.tobytes()


@pytest.fixture(scope="module")
def digit(pipe):
    """What the digits' pipeline draws."""
    return image(pipe)


@pytest.fixture(scope="module")
def embedded():
    """The digits' weights."""
    return load_model(EMBEDDED_CHECKPOINT).state_dict()


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_digits_round_trip(saved, digit, embedded):
    folder = saved / "pixels"
    assert image(DDTPipeline.from_pretrained(folder)) == digit
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "model_index.json", "scheduler", "training.json", "transformer")
    ]
    assert load_file(folder / "transformer" / WEIGHTS_NAME).keys() == embedded.keys()
    for place in (folder, folder / "transformer"):
        assert_same(load_model(place).state_dict(), embedded)
        assert read_experiment(place) == read_experiment(EMBEDDED_CHECKPOINT)


@pytest.mark.slow
def test_latents_round_trip(latent_model, latents, tmp_path):
    expected = image(DDTPipeline.from_pretrained(latent_model))
    loaded = DDTPipeline.from_pretrained(str(latents))
    assert isinstance(loaded.vae, AutoencoderKL)
    assert image(loaded) == expected
    loaded.save_pretrained(latents)  # over what it was loaded from
    assert image(DDTPipeline.from_pretrained(latents)) == expected
    assert read_experiment(latents).data.autoencoder == str(latents / "vae")
    assert image(DDTPipeline(**loaded.components)) == expected
    half = DDTPipeline.from_pretrained(latents, torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "b")
    weights = load_file(tmp_path / "b" / "transformer" / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_vae_given_to_a_model_of_latents_is_found_beside_it(latent_model, tmp_path):
    vae = AutoencoderKL.from_pretrained(latent_model.parent / "vae")
    transformer = DDTTransformer2DModel.from_reference(
        golden.model(LATENT_MODEL), DataConfig("latents", 8), LATENT_SAMPLING
    )
    DDTPipeline(transformer, vae, DDTScheduler()).save_pretrained(tmp_path / "a")
    expected = DataConfig("latents", 64, pixels_per_latent=8)
    assert DDTPipeline.from_pretrained(tmp_path / "a").data == expected
    for place in (tmp_path / "a", tmp_path / "a" / "transformer"):
        assert read_experiment(place).data == replace(expected, autoencoder=str(tmp_path / "a" / "vae"))
    assert read_experiment(shutil.copytree(tmp_path / "a" / "transformer", tmp_path / "alone")).data == expected


def test_the_json_files_hold_what_they_always_held(saved):
    index, scheduler = ("model_index.json", "scheduler/scheduler_config.json")
    index, scheduler = (json.loads((saved / "pixels" / name).read_text()) for name in (index, scheduler))
    assert index.pop("_diffusers_version") == scheduler.pop("_diffusers_version")
    assert index == {
        "_class_name": "DDTPipeline",
        "id2label": {str(label): str(label) for label in range(10)},
        "scheduler": ["ddt_fast.pipeline", "DDTScheduler"],
        "transformer": ["ddt_fast.pipeline", "DDTTransformer2DModel"],
        "vae": [None, None],
    }
    settings = asdict(PRESETS["digits"].sampling) | {"guidance_interval": [0.3, 1.0]}
    assert scheduler == {"_class_name": "DDTScheduler", **settings}


def test_large_weights_are_split(pipe, tmp_path, digit, embedded):
    pipe.save_pretrained(tmp_path / "a", max_shard_size="300KB")
    shards = sorted((tmp_path / "a" / "transformer").glob("*.safetensors"))
    assert len(shards) > 3
    assert image(DDTPipeline.from_pretrained(tmp_path / "a")) == digit
    assert_same(load_model(tmp_path / "a").state_dict(), embedded)
    shards[0].unlink()
    for load in (load_model, DDTPipeline.from_pretrained):
        with pytest.raises((ValueError, OSError), match=shards[0].name):
            load(tmp_path / "a")


def test_parts_are_saved_as_diffusers_does(pipe, tmp_path, embedded):
    folder = tmp_path / "transformer"
    pipe.transformer.save_pretrained(folder, variant="fp16", max_shard_size="300KB")
    assert len(list(folder.glob("diffusion_pytorch_model.fp16-*.safetensors"))) > 3
    loaded = DDTTransformer2DModel.from_pretrained(folder, variant="fp16", torch_dtype=torch.float32)
    assert_same(loaded.state_dict(), embedded)
    for part in (pipe.transformer, pipe.scheduler):
        part.save_pretrained(tmp_path / "a", safe_serialization=True)  # so do diffusers' uploads
        upload = {"repo_id": "user/digits", "private": True, "token": None, "commit_message": "x"}
        part.save_pretrained(str(tmp_path / "a"), push_to_hub=False, **upload)
    assert {"config.json", "scheduler_config.json"} <= {path.name for path in (tmp_path / "a").iterdir()}


def test_the_scheduler_travels(pixels):
    pipe = DDTPipeline.from_pretrained(pixels)
    settings = {"num_steps": 7, "guidance_interval": (0.2, 0.9), "refresh_steps": (0, 3), "timeshift": 1.5}
    pipe.scheduler = DDTScheduler(**settings)
    pipe.save_pretrained(pixels)
    assert DDTPipeline.from_pretrained(pixels).scheduler.sampling_config == SamplingConfig(**settings)
    assert read_experiment(pixels).sampling == SamplingConfig(**settings)


def test_labels_travel(latent_model, tmp_path):
    names = {0: "cat, house cat", 3: "dog"}
    DDTPipeline.from_pretrained(latent_model, id2label=names).save_pretrained(tmp_path / "a")
    loaded = DDTPipeline.from_pretrained(tmp_path / "a")
    assert loaded.id2label == names
    assert loaded.get_label_ids(["Dog", "house cat", 5]) == [3, 0, 5]


def test_imagenet_names_belong_to_a_thousand_classes(pipe, latent_model):
    config = replace(golden.model_config(LATENT_MODEL), num_classes=1000)
    transformer = DDTTransformer2DModel(**asdict(config), data=asdict(DataConfig("latents", 64, "some/vae")))
    imagenet = DDTPipeline(transformer, None, DDTScheduler())
    assert imagenet.get_label_ids(["golden retriever", 207]) == [207, 207]
    assert imagenet.id2label == imagenet_id2label()
    assert pipe.id2label == {label: str(label) for label in range(10)}
    assert DDTPipeline.from_pretrained(latent_model).id2label == {}


def test_class_names_and_their_search():
    names, imagenet = imagenet_id2label(), ClassNames(1000, imagenet_id2label())
    assert len(names) == 1000
    assert (names[0], names[207], names[999]) == (
        *("tench, Tinca tinca", "golden retriever", "toilet tissue, toilet paper, bathroom tissue"),
    )
    assert imagenet.labels(["golden retriever", "Golden_Retriever", 207, "Tinca tinca"]) == [207, 207, 207, 0]
    for one in (207, torch.tensor(207).numpy(), torch.tensor([207]).numpy()[0], torch.tensor(207)):
        assert imagenet.labels(one) == [207]
    assert imagenet.labels(["cardigan", "Cardigan"]) == [474, 264], "they differ by case alone"
    assert imagenet.search("golden retriever")[0] == 207
    assert set(range(205, 210)) <= set(imagenet.search("retriever"))
    assert imagenet.search("  ") == []
    assert len(imagenet.search("a", limit=7)) == 7


def test_a_released_checkpoint(latent_model, tmp_path):
    weights = golden.weights(LATENT_MODEL)
    write_lightning(tmp_path / "a.ckpt", weights, {name: tensor + 1 for name, tensor in weights.items()})
    settings = read_experiment(latent_model)
    pipe = DDTPipeline.from_single_file(tmp_path / "a.ckpt", preset=settings)
    assert image(pipe) == image(DDTPipeline.from_pretrained(latent_model))
    raw = DDTPipeline.from_single_file(tmp_path / "a.ckpt", preset=settings, weights="raw")
    name = "x_embedder.proj.bias"
    assert torch.equal(raw.transformer.state_dict()[name], weights[name] + 1)


def test_a_released_checkpoint_of_a_presets_shape(tmp_path, digit, embedded):
    write_lightning(tmp_path / "a.ckpt", embedded)
    with pytest.warns(UserWarning, match="taken from preset digits"):
        guessed = DDTPipeline.from_single_file(tmp_path / "a.ckpt")
    assert guessed.scheduler.sampling_config == PRESETS["digits"].sampling
    named = DDTPipeline.from_single_file(tmp_path / "a.ckpt", preset="digits")
    assert image(guessed) == image(named) == digit
    with pytest.raises(ValueError, match="preset 'huge' does not exist"):
        DDTPipeline.from_single_file(tmp_path / "a.ckpt", preset="huge")


def test_from_the_hubs_cache_without_a_network(saved, tmp_path, digit):
    commit = "1" * 40
    repository = tmp_path / "hub" / "models--user--ddt"
    shutil.copytree(saved / "pixels", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    pipe = DDTPipeline.from_pretrained("user/ddt", cache_dir=tmp_path / "hub", local_files_only=True)
    assert image(pipe) == digit
    with pytest.raises(ValueError, match="user/other does not exist here, and the Hub does not provide it"):
        DDTPipeline.from_pretrained("user/other", cache_dir=tmp_path / "hub", local_files_only=True)


class Repo:
    repo_id = "user/ddt"


def test_uploads_are_what_is_saved(pipe, monkeypatch):
    uploaded = []

    def take(_self, folder, repo, **options):
        readme = Path(folder) / "README.md"
        uploaded.append((repo, {path.name for path in Path(folder).iterdir()}, readme.read_text(), options))

    monkeypatch.setattr("ddt_fast.pipeline.loading.create_repo", lambda *_, **__: Repo)
    monkeypatch.setattr(DDTPipeline, "_upload_folder", take)
    pipe.push_to_hub("ddt", license="mit", create_pr=True)
    ((repo, names, card, options),) = uploaded
    assert repo == "user/ddt"
    assert {"README.md", "model_index.json", "transformer"} <= names
    assert "license: mit" in card
    assert options == {"token": None, "commit_message": None, "create_pr": True}

    def fail(*_, **__):
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr("ddt_fast.pipeline.loading.create_repo", fail)
    with pytest.raises(OSError, match="user/ddt could not be uploaded: Name or service not known"):
        pipe.push_to_hub("user/ddt")


def test_the_card_says_what_is_known_invents_nothing_and_tells_no_paths(pixels, latent_model, saved):
    card = (saved / "latents" / "README.md").read_text()
    for word in ("## Training", "## Scores", "license", str(latent_model.parent)):
        assert word not in card
    assert "| num_steps | 4 |" in card
    card = (pixels / "README.md").read_text()
    assert ModelCard(card).data.to_dict().keys() & {"library_name", "license", "model-index"} == {"library_name"}
    training = json.loads((EMBEDDED_CHECKPOINT / "training.json").read_text())
    for fact in (training["commit"], "| steps | 2800 |", "| batch_size | 128 |", "| class accuracy | 0.996659 |"):
        assert fact in card
    assert "327,492" in card
    DDTPipeline.from_pretrained(pixels).save_pretrained(pixels)
    assert (pixels / "README.md").read_text() == card
    metrics = {
        "metrics": {"fid": 2.5, "inception_score": {"mean": 3}},
        "samples": {"num_images": 50000},
        "reference": {"source": "/data/ref.npz"},
    }
    (pixels / "metrics.json").write_text(json.dumps(metrics))
    card = write_model_card(pixels, license="mit").read_text()
    assert "50,000 samples, against ref.npz:" in card
    assert "| fid | 2.5 |" in card
    assert "/data" not in card
    # The Hub looks for scores in the front matter.
    found = ModelCard(card).data
    (result,) = found.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("fid", 2.5, "ref.npz")
    assert found.license == "mit"


def test_an_older_pipeline_is_replaced(pixels, digit):
    pipe = digits()
    for options in ({"variant": "fp16"}, {"max_shard_size": "200KB"}, {}):
        pipe.save_pretrained(pixels, **options)
        pipe.save_pretrained(pixels)
        assert image(DDTPipeline.from_pretrained(pixels)) == digit
