"""Keyword arguments that there are not are refused, with the nearest named; diffusers alone would pass over them."""

import json
from pathlib import Path

import pytest
import torch

from ddt_fast.model.weights import EMBEDDED_CHECKPOINT
from ddt_fast.pipeline import DDTPipeline, DDTScheduler, DDTTransformer2DModel
from pipeline_cases import digits, quiet


@pytest.fixture(scope="module")
def pipe():
    return digits()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "digits"
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("lisence", "nearest: license"),
        ("max_shard_sise", "nearest: max_shard_size"),
        ("repo", "nearest: repo_id"),
        ("use_flashpack", "allowed: save_directory, safe_serialization, variant, max_shard_size, push_to_hub, license"),
    ],
)
def test_saving_a_pipeline(pipe, tmp_path, argument, hint):
    with pytest.raises(ValueError, match=f"save_pretrained has no argument '{argument}'; {hint}"):
        pipe.save_pretrained(tmp_path / "a", **{argument: "x"})
    with pytest.raises(ValueError, match=f"has no argument '{argument}'; {hint}"):
        pipe.push_to_hub("user/digits", **{argument: "x"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "../../x"}, r"variant is '\.\./\.\./x'; allowed: none, or up to 64 letters"),
        ({"variant": 3}, "variant is 3"),
        ({"max_shard_size": []}, r"max_shard_size is \[\]; allowed: a number of bytes"),
        ({"max_shard_size": 0}, "max_shard_size is 0"),
        ({"license": 3}, "license is 3; allowed: none, or its identifier"),
    ],
)
def test_saving_with_values_that_are_not_allowed(pipe, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.save_pretrained(tmp_path / "a", **arguments)
    if "license" not in arguments:
        with pytest.raises(ValueError, match=message):
            pipe.transformer.save_pretrained(tmp_path / "a", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_upload_without_a_network(pipe, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr("ddt_fast.pipeline.loading.create_repo", fail)
    with pytest.raises(OSError, match="user/ddt could not be uploaded: Name or service not known"):
        pipe.push_to_hub("user/ddt")


@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_saving_a_part(pipe, tmp_path, part):
    save = getattr(pipe, part).save_pretrained
    with pytest.raises(ValueError, match="save_pretrained has no argument 'push_too_hub'; nearest: push_to_hub"):
        save(tmp_path / "a", push_too_hub=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; wanted a folder"):
        save(tmp_path / "file")
    assert not (tmp_path / "a").exists()
    save(str(tmp_path / "a"), push_to_hub=False, repo_id="user/digits", private=True, token=None, commit_message="x")
    assert any((tmp_path / "a").iterdir())


def test_a_transformer_is_saved_as_diffusers_does(pipe, tmp_path):
    model = pipe.transformer
    with pytest.raises(ValueError, match="safe_serialization is False; allowed: True"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="300KB")
    assert len(list(tmp_path.glob("diffusion_pytorch_model.fp16-*.safetensors"))) > 3
    loaded = DDTTransformer2DModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_uploads_of_parts_go_through_diffusers(pipe, monkeypatch):
    uploaded = []

    class Repo:
        repo_id = "user/ddt"

    class Card:
        save = staticmethod(lambda file: Path(file).touch())

    for place in ("diffusers.utils.hub_utils", "diffusers.models.modeling_utils", "diffusers.configuration_utils"):
        monkeypatch.setattr(f"{place}.create_repo", lambda *_, **__: Repo)
    monkeypatch.setattr("diffusers.utils.hub_utils.populate_model_card", lambda card: card)
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *_, **__: Card())

    def take(_self, folder, repo, **_):
        uploaded.append((repo, sorted(path.name for path in Path(folder).iterdir())))

    for part in (pipe.transformer, pipe.scheduler):
        monkeypatch.setattr(type(part), "_upload_folder", take)
        part.push_to_hub("ddt", private=True, commit_message="x")
    assert [repo for repo, _ in uploaded] == ["user/ddt", "user/ddt"]
    assert ["config.json" in uploaded[0][1], "scheduler_config.json" in uploaded[1][1]] == [True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variannt": "fp16"}, "from_pretrained has no argument 'variannt'; nearest: variant"),
        ({"torch_dtyp": torch.float32}, "nearest: torch_dtype"),
        ({"id2labels": {}}, "nearest: id2label"),
        ({"revison": "x"}, "nearest: revision"),
        ({"preset": "digits"}, "from_pretrained of a pipeline has no argument 'preset'"),
        ({"torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16'; allowed: torch.float32, torch.bfloat16"),
        ({"dtype": {"transformer": torch.int8}}, "dtype is torch.int8; allowed"),
    ],
)
def test_loading_a_pipeline(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        DDTPipeline.from_pretrained(folder, **arguments)


def test_loading_a_model_folder():
    with pytest.raises(ValueError, match="from_pretrained has no argument 'vea'; nearest: vae"):
        DDTPipeline.from_pretrained(EMBEDDED_CHECKPOINT, vea=None)
    with pytest.raises(ValueError, match="from_pretrained of a model folder has no argument 'variant'; allowed: torch"):
        DDTPipeline.from_pretrained(EMBEDDED_CHECKPOINT, variant="fp16")


def test_what_diffusers_knows_is_taken(folder):
    pipe = DDTPipeline.from_pretrained(
        folder,
        dtype={"default": torch.bfloat16},
        scheduler=DDTScheduler(num_steps=3),
        cache_dir=None,
        local_files_only=True,
        use_safetensors=True,
        low_cpu_mem_usage=False,
        trust_remote_code=False,
        custom_pipeline=None,
        device_map=None,
    )
    assert pipe.scheduler.config["num_steps"] == 3
    assert pipe.transformer.dtype == torch.bfloat16
    quiet(pipe.to(device="cpu", dtype=torch.float32, silence_dtype_warnings=True))
    assert pipe.transformer.dtype == torch.float32


def test_loading_parts(folder):
    with pytest.raises(ValueError, match="DDTScheduler has no argument 'sovler'; nearest: solver"):
        DDTScheduler.from_pretrained(folder, subfolder="scheduler", sovler="lms")
    with pytest.raises(ValueError, match="DDTTransformer2DModel has no argument 'num_block'; nearest: num_blocks"):
        DDTTransformer2DModel.from_pretrained(folder / "transformer", num_block=2)
    assert DDTScheduler.from_pretrained(folder, subfolder="scheduler", solver="lms").config["solver"] == "lms"
    scheduler, unused = DDTScheduler.from_pretrained(folder, subfolder="scheduler", return_unused_kwargs=True, x=3)
    assert unused["x"] == 3
    assert DDTScheduler.from_config(scheduler.config, order=3).config["order"] == 3
    with pytest.raises(ValueError, match="DDTScheduler has no argument 'ordre'; nearest: order"):
        DDTScheduler.from_config(scheduler.config, ordre=3)
    with pytest.raises(ValueError, match="config is a str; wanted Mapping"):
        DDTScheduler.from_config(str(folder / "scheduler"))
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert DDTScheduler.from_config(settings).sampling_config == scheduler.sampling_config


def test_moving_a_pipeline(pipe):
    with pytest.raises(ValueError, match="to has no argument 'devcie'; nearest: device"):
        pipe.to(devcie="cpu")
