"""Pipelines on disk and on the Hub: round trips, shards, released checkpoints, model cards, and what is refused."""

import json
import pickle
import shutil
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import golden_data as golden
from ddt_fast import load_model
from ddt_fast.config import DataConfig, Experiment, SamplingConfig
from ddt_fast.model.card import write_model_card
from ddt_fast.model.lightning import write_lightning
from ddt_fast.model.reference import DDT
from ddt_fast.model.weights import EMBEDDED_CHECKPOINT, WEIGHTS_NAME, read_experiment
from ddt_fast.pipeline import DDTPipeline, DDTScheduler, DDTTransformer2DModel
from ddt_fast.presets import PRESETS
from pipeline_cases import LATENT_MODEL, LATENT_SAMPLING, digits, latent_folder, quiet, seeded


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    return latent_folder(tmp_path_factory.mktemp("latent"))


@pytest.fixture(scope="module")
def saved_digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "digits"
    digits().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_digits, tmp_path):
    return shutil.copytree(saved_digits, tmp_path / "digits")


def image(pipe, label=1):
    return quiet(pipe)(label, 3, generator=seeded(0), output_type="np").images.tobytes()


def test_digits_round_trip(folder):
    assert image(DDTPipeline.from_pretrained(folder)) == image(digits())
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "model_index.json", "scheduler", "training.json", "transformer"),
    ]


def test_latents_round_trip(latent_model, tmp_path):
    pipe = DDTPipeline.from_pretrained(latent_model)
    pipe.save_pretrained(tmp_path / "a")
    loaded = DDTPipeline.from_pretrained(str(tmp_path / "a"))
    assert isinstance(loaded.vae, AutoencoderKL)
    assert image(loaded) == image(pipe)
    loaded.save_pretrained(tmp_path / "a")  # over what it was loaded from
    assert image(DDTPipeline.from_pretrained(tmp_path / "a")) == image(pipe)
    assert read_experiment(tmp_path / "a").data.autoencoder == str(tmp_path / "a" / "vae")
    assert image(DDTPipeline(**loaded.components)) == image(pipe)
    half = DDTPipeline.from_pretrained(tmp_path / "a", torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "b")
    weights = load_file(tmp_path / "b" / "transformer" / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_weights_keep_the_released_names_and_load_model_reads_them(folder):
    weights = load_file(folder / "transformer" / WEIGHTS_NAME)
    expected = load_model(EMBEDDED_CHECKPOINT).state_dict()
    assert weights.keys() == expected.keys()
    for place in (folder, folder / "transformer"):
        loaded = load_model(place).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        assert read_experiment(place) == read_experiment(EMBEDDED_CHECKPOINT)


def test_large_weights_are_split(tmp_path):
    digits().save_pretrained(tmp_path / "a", max_shard_size="300KB")
    shards = sorted((tmp_path / "a" / "transformer").glob("*.safetensors"))
    assert len(shards) > 3
    assert image(DDTPipeline.from_pretrained(tmp_path / "a")) == image(digits())
    loaded = load_model(tmp_path / "a").state_dict()
    assert all(torch.equal(loaded[n], tensor) for n, tensor in load_model(EMBEDDED_CHECKPOINT).state_dict().items())
    shards[0].unlink()
    for load in (load_model, DDTPipeline.from_pretrained):
        with pytest.raises((ValueError, OSError), match=shards[0].name):
            load(tmp_path / "a")


def test_the_scheduler_travels(folder):
    pipe = DDTPipeline.from_pretrained(folder)
    pipe.scheduler = DDTScheduler(num_steps=7, guidance_interval=(0.2, 0.9), refresh_steps=(0, 3), timeshift=1.5)
    pipe.save_pretrained(folder)
    expected = SamplingConfig(num_steps=7, guidance_interval=(0.2, 0.9), refresh_steps=(0, 3), timeshift=1.5)
    assert DDTPipeline.from_pretrained(folder).scheduler.sampling_config == expected
    assert read_experiment(folder).sampling == expected


def test_labels_travel(latent_model, tmp_path):
    names = {0: "cat, house cat", 3: "dog"}
    pipe = DDTPipeline.from_pretrained(latent_model, id2label=names)
    assert pipe.get_label_ids(["dog", "house cat", 5]) == [3, 0, 5]
    pipe.save_pretrained(tmp_path / "a")
    loaded = DDTPipeline.from_pretrained(tmp_path / "a")
    assert loaded.id2label == names
    assert loaded.get_label_ids(["Dog"]) == [3]


def test_imagenet_names_belong_to_a_thousand_classes(latent_model):
    config = replace(golden.model_config(LATENT_MODEL), num_classes=1000)
    transformer = DDTTransformer2DModel(**asdict(config), data=asdict(DataConfig("latents", 64, "some/vae")))
    pipe = DDTPipeline(transformer, None, DDTScheduler())
    assert pipe.get_label_ids(["golden retriever", 207]) == [207, 207]
    assert len(pipe.id2label) == 1000
    assert digits().id2label == {label: str(label) for label in range(10)}
    assert DDTPipeline.from_pretrained(latent_model).id2label == {}


def test_a_released_checkpoint(latent_model, tmp_path):
    weights = golden.weights(LATENT_MODEL)
    write_lightning(tmp_path / "a.ckpt", weights, {name: tensor + 1 for name, tensor in weights.items()})
    settings = read_experiment(latent_model)
    pipe = DDTPipeline.from_single_file(tmp_path / "a.ckpt", preset=settings)
    assert image(pipe) == image(DDTPipeline.from_pretrained(latent_model))
    raw = DDTPipeline.from_single_file(tmp_path / "a.ckpt", preset=settings, weights="raw")
    name = "x_embedder.proj.bias"
    assert torch.equal(raw.transformer.state_dict()[name], weights[name] + 1)


def test_a_released_checkpoint_of_a_presets_shape(tmp_path):
    weights = load_model(EMBEDDED_CHECKPOINT).state_dict()
    write_lightning(tmp_path / "a.ckpt", weights)
    with pytest.warns(UserWarning, match="taken from preset digits"):
        guessed = DDTPipeline.from_single_file(tmp_path / "a.ckpt")
    assert guessed.scheduler.sampling_config == PRESETS["digits"].sampling
    named = DDTPipeline.from_single_file(tmp_path / "a.ckpt", preset="digits")
    assert image(guessed) == image(named) == image(digits())
    with pytest.raises(ValueError, match="preset 'huge' does not exist"):
        DDTPipeline.from_single_file(tmp_path / "a.ckpt", preset="huge")


def test_from_the_hubs_cache_without_a_network(saved_digits, tmp_path, monkeypatch):
    commit = "1" * 40
    repository = tmp_path / "hub" / "models--user--ddt"
    shutil.copytree(saved_digits, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    pipe = DDTPipeline.from_pretrained("user/ddt", cache_dir=tmp_path / "hub", local_files_only=True)
    assert image(pipe) == image(digits())
    with pytest.raises(ValueError, match="user/other is no local folder, and could not be had from the Hub"):
        DDTPipeline.from_pretrained("user/other", cache_dir=tmp_path / "hub", local_files_only=True)


def test_uploads_are_what_is_saved(monkeypatch):
    uploaded = []

    class Repo:
        repo_id = "user/ddt"

    def take(self, folder, repo_id, **_):
        uploaded.append((repo_id, sorted(path.name for path in folder.iterdir()), (folder / "README.md").read_text()))

    monkeypatch.setattr("ddt_fast.pipeline.loading.create_repo", lambda *_, **__: Repo)
    monkeypatch.setattr(DDTPipeline, "_upload_folder", take)
    digits().push_to_hub("ddt", license="mit")
    repo_id, names, card = uploaded[0]
    assert repo_id == "user/ddt"
    assert {"README.md", "model_index.json", "transformer"} <= set(names)
    assert "license: mit" in card


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def test_the_card_says_what_is_known(folder):
    card = (folder / "README.md").read_text()
    assert front_matter(card)["library_name"] == "ddt-fast"
    assert "license" not in front_matter(card)
    training = json.loads((EMBEDDED_CHECKPOINT / "training.json").read_text())
    for fact in (training["commit"], "| steps | 2800 |", "| batch_size | 128 |", "| class accuracy | 0.996659 |"):
        assert fact in card
    assert "327,492" in card
    again = DDTPipeline.from_pretrained(folder)
    again.save_pretrained(folder)
    assert (folder / "README.md").read_text() == card
    metrics = {"metrics": {"fid": 2.5}, "samples": {"num_images": 50000}, "reference": {"source": "/data/ref.npz"}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    card = write_model_card(folder, license="mit").read_text()
    assert front_matter(card)["license"] == "mit"
    assert "50,000 samples, against ref.npz:" in card
    assert "| fid | 2.5 |" in card


def test_the_card_invents_nothing_and_tells_no_paths(latent_model, tmp_path):
    DDTPipeline.from_pretrained(latent_model).save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    for word in ("## Training", "## Scores", "license", str(latent_model.parent)):
        assert word not in card
    assert "| num_steps | 4 |" in card


class Runs:
    """Pickles as a call that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "pytorch_model.pt"])
@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_a_pickle_in_place_of_safetensors_is_refused_and_not_run(latent_model, tmp_path, name, component):
    DDTPipeline.from_pretrained(latent_model).save_pretrained(tmp_path / "a")
    place, mark = tmp_path / "a" / component, tmp_path / "it_ran"
    (place / WEIGHTS_NAME).unlink()
    (place / name).write_bytes(pickle.dumps({"x": Runs(mark)}))
    with pytest.raises(ValueError, match=rf"{name}, a pickle, which may hold code and was not opened"):
        DDTPipeline.from_pretrained(tmp_path / "a")
    if component == "transformer":
        for load in (load_model, DDTTransformer2DModel.from_pretrained, DDTPipeline.from_pretrained):
            with pytest.raises(ValueError, match=r"pickle|holds no"):
                load(place)
    assert not mark.exists()
    with pytest.raises(ValueError, match="use_safetensors is False; allowed: True"):
        DDTPipeline.from_pretrained(tmp_path / "a", use_safetensors=False)


def test_a_lightning_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "it_ran"
    torch.save({"state_dict": golden.weights(LATENT_MODEL), "hook": Runs(mark)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="was not executed"):
        DDTPipeline.from_single_file(tmp_path / "a.ckpt")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer": ["os", "system"]}, r"transformer is \['os', 'system'\]; allowed: ddt_fast.pipeline"),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "scheduler is .*DDIMScheduler"),
        ({"vae": ["mine", "AutoencoderKL"]}, "vae is .*allowed: diffusers.AutoencoderKL or none"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "lacks its folder vae"),
        ({"_class_name": "DiTPipeline"}, "holds a DiTPipeline; wanted a DDTPipeline"),
        ({"_class_name": ["pipeline", "Mine"]}, "wanted a DDTPipeline"),
        ({"id2label": {"77": "x"}}, "id2label names class 77; allowed: 0 to 9"),
    ],
)
def test_an_index_that_names_other_classes_is_refused(folder, change, message):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        DDTPipeline.from_pretrained(folder)


@pytest.mark.parametrize("place", ["transformer/ddt_fast.pipeline.py", "scheduler/ddt_fast.pipeline.py"])
def test_code_beside_the_weights_is_refused_and_not_run(folder, tmp_path, place):
    mark = tmp_path / "it_ran"
    (folder / place).write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(ValueError, match=r"ddt_fast\.pipeline\.py is code, and was not executed"):
        DDTPipeline.from_pretrained(folder, trust_remote_code=True)
    assert not mark.exists()


def test_damaged_folders_are_refused(folder, tmp_path):
    weights = load_file(folder / "transformer" / WEIGHTS_NAME)
    del weights["final_layer.linear.bias"]
    save_file(weights, folder / "transformer" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"1 tensor missing \(such as final_layer\.linear\.bias\)"):
        DDTPipeline.from_pretrained(folder)
    config = folder / "transformer" / "config.json"
    entries = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in entries.items() if name != "num_heads"}))
    with pytest.raises(ValueError, match="num_heads"):
        DDTPipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        DDTPipeline.from_pretrained(folder)
    for name in (str(tmp_path / "nowhere"), "nowhere"):
        with pytest.raises(ValueError, match="is no local folder"):
            DDTPipeline.from_pretrained(name)
    with pytest.raises(ValueError, match="from_single_file reads those"):
        DDTPipeline.from_pretrained(config)


def test_saving_replaces_nothing_but_a_pipeline(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds mine\.txt, which ddt-fast did not write"):
        digits().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safe_serialization is False"):
        digits().save_pretrained(tmp_path / "a", safe_serialization=False)


@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_what_lies_in_a_pipelines_parts_is_kept_too(folder, part):
    (folder / part / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=rf"{part} would be replaced, but holds mine\.txt"):
        digits().save_pretrained(folder)
    assert (folder / part / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "200KB"}, {}])
def test_an_older_pipeline_is_replaced(folder, options):
    pipe = digits()
    pipe.save_pretrained(folder, **options)
    pipe.save_pretrained(folder)
    assert image(DDTPipeline.from_pretrained(folder)) == image(pipe)


def test_pipelines_of_other_people_are_not_fetched(folder):
    with pytest.raises(ValueError, match="custom_pipeline is 'user/code'; allowed: none"):
        DDTPipeline.from_pretrained(folder, custom_pipeline="user/code", trust_remote_code=True)


def test_weights_of_another_shape_are_refused(folder):
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 96}))
    with pytest.raises(ValueError, match=r"transformer: weights and config\.json disagree|shape"):
        DDTPipeline.from_pretrained(folder)


def test_parts_that_do_not_fit_are_refused(latent_model):
    vae = AutoencoderKL.from_pretrained(latent_model.parent / "vae")
    transformer = digits().transformer
    with pytest.raises(ValueError, match="latents have 4 channels, the transformer takes 1"):
        DDTPipeline(transformer, vae, DDTScheduler())
    with pytest.raises(ValueError, match="scheduler is a AutoencoderKL"):
        DDTPipeline(transformer, None, vae)
    with pytest.raises(ValueError, match="transformer is a AutoencoderKL; wanted DDTTransformer2DModel"):
        DDTPipeline(vae, None, DDTScheduler())
    with pytest.raises(ValueError, match="vae is a int; wanted AutoencoderKL"):
        DDTPipeline(transformer, 3, DDTScheduler())
    for id2label, message in (
        ("x", "id2label is a str; wanted a dict"),
        ({"a": "b"}, "id2label names class a; allowed: 0 to 9"),
        ({1: 5}, "id2label names class 1 5; wanted a string"),
        ({1.5: "b"}, r"id2label names class 1\.5; allowed: 0 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            DDTPipeline(transformer, None, DDTScheduler(), id2label)
    with pytest.raises(ValueError, match=r"solver is 'heun'"):
        DDTScheduler(solver="heun")
    experiment = Experiment(
        golden.model_config(LATENT_MODEL), DataConfig("latents", 64, "some/vae"), sampling=LATENT_SAMPLING
    )
    alone = DDTTransformer2DModel.from_reference(DDT(experiment.model), experiment.data, experiment.sampling)
    with pytest.raises(ValueError, match="output_type is 'pil', which needs a vae"):
        DDTPipeline(alone, None, DDTScheduler())([1])
