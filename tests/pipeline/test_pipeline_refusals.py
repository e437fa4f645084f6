"""A wrong call of a pipeline is refused with what was wrong and what is allowed. Unknown keyword arguments too, with
the nearest named; diffusers alone would ignore them."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

import golden_data as golden
from ddt_fast.class_names import ClassNames, imagenet_id2label
from ddt_fast.config import DataConfig, SamplingConfig
from ddt_fast.model import DDT
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.pipeline import DDTPipeline, DDTScheduler, DDTTransformer2DModel
from ddt_fast.pipeline.scheduler import per_sample
from ddt_fast.presets import PRESETS
from pipeline_cases import LATENT_MODEL, LATENT_SAMPLING, quiet, seeded


class Elsewhere(torch.Generator):
    """Says that it is on a GPU."""

    device = torch.device("cuda:1")


NOISE = torch.ones(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": ["12"]}, "class '12' is unknown; nearest"),
        ({"class_labels": [10]}, "class 10 does not exist; allowed: 0 to 9"),
        ({"class_labels": torch.zeros(2, dtype=torch.int64, device="meta")}, "classes are .* on meta; expected"),
        ({"generator": seeded(1, 2, 3)}, "3 generators for 2 images; expected one, or one per image"),
        ({"generator": 5}, "generator is an int; expected torch.Generator, or a list of them"),
        ({"generator": Elsewhere()}, r"is on cuda:1; expected torch\.Generator\('cpu'\), whose .* machine$"),
        ({"height": 7}, "height is 7; allowed: a positive multiple of 2 pixels"),
        ({"height": 2 * 10**9}, "one 2000000000x8 sample keeps .* between steps"),
        ({"num_images_per_label": 10**9}, "batches of 2000000000 keep .* between steps, the device has"),
        ({"num_images_per_label": 0}, "num_images_per_label is 0"),
        ({"num_inference_steps": 0}, "num_steps is 0"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; allowed: pil, np, pt, latent"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"guidence_scale": 2.0}, "DDTPipeline has no argument 'guidence_scale'; nearest: guidance_scale"),
        ({"num_steps": 2}, "DDTPipeline has no argument 'num_steps'; nearest: num_inference_steps"),
        ({"sampling": {"order": 3}}, "sampling is a dict; expected SamplingConfig"),
        ({"sampling": SamplingConfig(9, refresh_steps=(0, 7))}, "refresh_steps are for 9 steps, not for 2; give"),
        ({"latents": NOISE[:1]}, r"latents are \(1, 1, 8, 8\); expected \(2, 1, 8, 8\)"),
        ({"latents": [1.0]}, r"latents are a list; expected a tensor \(2, 1, 8, 8\) for 2 images"),
        ({"latents": NOISE > 0}, "latents are torch.bool, .* expected dense floats"),
        ({"latents": NOISE.to_sparse()}, r"latents are .*torch\.sparse_coo, .*; expected dense"),
        ({"latents": NOISE * math.nan}, "latents are not finite: they hold NaN or infinity"),
        ({"latents": NOISE / 0}, "latents are not finite"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is an int; expected a function"),
        ({"callback_on_step_end_tensor_inputs": ["embeds"]}, "names 'embeds'; allowed: latents"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "tensor_inputs is 'latents'; expected a list of names"),
        ({"callback_on_step_end": lambda *_: 3}, "callback_on_step_end returned an int; expected None or a dict"),
        ({"callback_on_step_end": lambda *_: {"latents": NOISE[0]}}, r"returned latents \(1, 8, 8\); expected \(2, 1"),
        ({"callback_on_step_end": lambda *_: {"latents": NOISE * math.nan}}, "end returned latents not finite"),
    ],
)
def test_wrong_calls(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [3, 4], "num_inference_steps": 2, **arguments})


def test_moving(pipe):
    with pytest.raises(ValueError, match="to has no argument 'devcie'; nearest: device"):
        pipe.to(devcie="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, the transformer is on cpu"):
            pipe.enable_cuda_graphs()


def test_generators_elsewhere():
    inputs = torch.zeros(1, 1, 8, 8), 0.0, torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="generator is on cuda:1; expected"):
        DDTScheduler(num_steps=9, last_step=None, solver="sde").step(*inputs, generator=Elsewhere())
    own, other = Elsewhere(), seeded(0)[0]
    assert per_sample([own, own], 2, torch.device("cuda:1")) == [own, own]
    assert per_sample([other, other], 2, torch.device("cuda:1")) == [other, other]
    with pytest.raises(ValueError, match=r"on cuda:1; expected .* machine, or one on cuda:0, where samples are drawn"):
        per_sample(own, 2, torch.device("cuda:0"))
    with pytest.raises(ValueError, match="generators are on cpu and cuda:1; expected all on one device"):
        per_sample([own, other], 2, torch.device("cuda:1"))


IMAGENET = ClassNames(1000, imagenet_id2label())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crane", r"'crane' is ambiguous: 134 'crane' \(animal\), 517 'crane' \(object\); give the number"),
        ("golden retreiver", r"'golden retreiver' is unknown; nearest: 207 'golden retriever'"),
        ("qqqq", "'qqqq' is unknown; allowed: 0 to 999, or a name"),
        (1000, "class 1000 does not exist; allowed: 0 to 999"),
        (True, "class True is a bool; expected a label or a name"),
        (1.0, r"class 1\.0 is a float"),
        ([], "no class is given"),
        (torch.tensor([1.0]), "expected .* whole numbers"),
        (b"tench", "class b'tench' is a bytes; expected a label or a name"),
    ],
)
def test_classes(name, message):
    with pytest.raises(ValueError, match=message):
        IMAGENET.labels(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lisence": "x"}, "has no argument 'lisence'; nearest: license"),
        ({"use_flashpack": "x"}, "allowed: save_directory, safe_serialization, variant, max_shard_size, push_to_hub, "),
        ({"variant": "../../x"}, r"variant is '\.\./\.\./x'; allowed: none, or up to 64 letters"),
        ({"max_shard_size": []}, r"max_shard_size is \[\]; allowed: a number of bytes"),
        ({"license": 3}, "license is 3; allowed: none, or its identifier"),
        ({"safe_serialization": False}, "safe_serialization is False; allowed: True"),
    ],
)
def test_saving(pipe, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.save_pretrained(tmp_path / "a", **arguments)
    with pytest.raises(ValueError, match=message):
        pipe.push_to_hub("user/digits", **arguments)
    if arguments.keys() & {"variant", "max_shard_size", "safe_serialization"}:
        with pytest.raises(ValueError, match=message):
            pipe.transformer.save_pretrained(tmp_path / "a", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_saving_parts(pipe, tmp_path):
    (tmp_path / "file").touch()
    for part in (pipe.transformer, pipe.scheduler):
        with pytest.raises(ValueError, match="save_pretrained has no argument 'push_too_hub'; nearest: push_to_hub"):
            part.save_pretrained(tmp_path / "a", push_too_hub=True)
        with pytest.raises(ValueError, match="file is a file; expected a folder"):
            part.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="save_pretrained has no argument 'variant'"):
        pipe.scheduler.save_pretrained(tmp_path / "a", variant="fp16")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("part", ["", "transformer", "scheduler"])
def test_saving_over_anything_but_a_pipeline(pipe, pixels, part):
    (pixels / part / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds mine\.txt, which ddt-fast did not write"):
        pipe.save_pretrained(pixels)
    assert (pixels / part / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pixels", {"variannt": "fp16"}, "from_pretrained has no argument 'variannt'; nearest: variant"),
        ("pixels", {"preset": "digits"}, "from_pretrained of a pipeline has no argument 'preset'"),
        ("pixels", {"torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16'; allowed: torch.float32, torch.bfloat16"),
        ("pixels", {"dtype": {"transformer": torch.int8}}, "dtype is torch.int8; allowed"),
        ("pixels", {"use_safetensors": False}, "use_safetensors is False; allowed: True"),
        ("pixels", {"custom_pipeline": "user/code", "trust_remote_code": True}, "custom_pipeline is 'user/code'; allo"),
        (EMBEDDED_CHECKPOINT, {"vea": None}, "from_pretrained has no argument 'vea'; nearest: vae"),
        (EMBEDDED_CHECKPOINT, {"variant": "x"}, "of a model folder has no argument 'variant'; allowed: torch"),
        ("nowhere", {}, "is not a local folder"),
        ("pixels/model_index.json", {}, "is a file; use from_single_file"),
    ],
)
def test_loading(saved, name, arguments, message):
    for folder in {saved / name, name if name == "nowhere" else saved / name}:
        with pytest.raises(ValueError, match=message):
            DDTPipeline.from_pretrained(folder, **arguments)


def test_options_of_diffusers_are_taken(saved):
    options = {"cache_dir": None, "local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    options |= {"trust_remote_code": False, "custom_pipeline": None, "device_map": None}
    given = {"dtype": {"default": torch.bfloat16}, "scheduler": DDTScheduler(num_steps=3)}
    pipe = DDTPipeline.from_pretrained(saved / "pixels", **given, **options)
    assert pipe.scheduler.config["num_steps"] == 3
    assert pipe.transformer.dtype == torch.bfloat16
    quiet(pipe.to(device="cpu", dtype=torch.float32, silence_dtype_warnings=True))
    assert pipe.transformer.dtype == torch.float32


def test_loading_parts(saved):
    folder = saved / "pixels"
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
    with pytest.raises(ValueError, match="config is a str; expected Mapping"):
        DDTScheduler.from_config(str(folder / "scheduler"))


def test_parts_that_do_not_fit(pipe, latent_model):
    vae = AutoencoderKL.from_pretrained(latent_model.parent / "vae")
    transformer, scheduler = pipe.transformer, DDTScheduler()
    for parts, message in (
        ((transformer, vae, scheduler), "latents have 4 channels, the transformer takes 1; they must match"),
        ((transformer, None, vae), "scheduler is a AutoencoderKL"),
        ((vae, None, scheduler), "transformer is a AutoencoderKL; expected DDTTransformer2DModel"),
        ((transformer, 3, scheduler), "vae is an int; expected AutoencoderKL"),
        ((transformer, None, scheduler, "x"), "id2label is a str; expected a dict"),
        ((transformer, None, scheduler, {"a": "b"}), "id2label names class a; allowed: 0 to 9"),
        ((transformer, None, scheduler, {1: 5}), "id2label names class 1 5; expected a string"),
    ):
        with pytest.raises(ValueError, match=message):
            DDTPipeline(*parts)
    with pytest.raises(ValueError, match=r"solver is 'heun'"):
        DDTScheduler(solver="heun")
    with pytest.raises(ValueError, match="DDTScheduler has no argument 'sovler'; nearest: solver"):
        DDTScheduler(sovler="lms")
    data = DataConfig("latents", 64, "some/vae")
    alone = DDTTransformer2DModel.from_reference(golden.model(LATENT_MODEL), data, LATENT_SAMPLING)
    with pytest.raises(ValueError, match="output_type is 'pil', which needs a vae"):
        DDTPipeline(alone, None, scheduler)([1])


def test_a_single_file_is_refused_by_the_names_of_its_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"^pretrained_model_link_or_path is "):
        DDTPipeline.from_single_file("")
    config = replace(PRESETS["digits"].model, num_heads=4)  # no preset has these shapes
    save_file(DDT(config).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"are unknown; pass an Experiment as `preset`$"):
        DDTPipeline.from_single_file(tmp_path / "other.safetensors")
