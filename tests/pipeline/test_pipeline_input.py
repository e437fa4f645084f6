"""A wrong call of a pipeline is refused with what was wrong and what is allowed."""

import numpy as np
import pytest
import torch

from ddt_fast.class_names import ClassNames, imagenet_id2label
from ddt_fast.pipeline.scheduler import DDTScheduler, per_sample
from pipeline_cases import digits, seeded


@pytest.fixture(scope="module")
def pipe():
    return digits()


IMAGENET = ClassNames(1000, imagenet_id2label())


def test_imagenets_names():
    names = imagenet_id2label()
    assert len(names) == 1000
    assert (names[0], names[207], names[999]) == (
        "tench, Tinca tinca",
        "golden retriever",
        "toilet tissue, toilet paper, bathroom tissue",
    )
    assert IMAGENET.labels(["golden retriever", "Golden_Retriever", 207, "Tinca tinca"]) == [207, 207, 207, 0]
    assert (
        IMAGENET.labels(np.array(207)) == IMAGENET.labels(np.int64(207)) == IMAGENET.labels(torch.tensor(207)) == [207]
    )
    assert IMAGENET.labels(["cardigan", "Cardigan"]) == [474, 264], "they differ by case alone"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crane", r"'crane' is ambiguous: 134 'crane' \(animal\), 517 'crane' \(object\); give the number"),
        ("golden retreiver", r"'golden retreiver' is unknown; nearest: 207 'golden retriever'"),
        ("retriever", r"unknown; nearest: 205 'flat-coated retriever'.*, 207 'golden retriever'"),
        ("qqqq", "'qqqq' is unknown; allowed: 0 to 999, or a name"),
        (1000, "class 1000 does not exist; allowed: 0 to 999"),
        (-1, "class -1 does not exist"),
        (True, "class True is a bool; wanted a label or a name"),
        (1.0, r"class 1\.0 is a float"),
        ([], "no class is given"),
        (torch.tensor([1.0]), "wanted .* whole numbers"),
        (np.array(1.0), r"class .*1\.0.* is a float64"),
        (b"tench", "class b'tench' is a bytes; wanted a label or a name"),
    ],
)
def test_classes_that_there_are_not(name, message):
    with pytest.raises(ValueError, match=message):
        IMAGENET.labels(name)


def test_search_finds_what_contains_or_resembles_the_words():
    assert IMAGENET.search("golden retriever")[0] == 207
    assert set(range(205, 210)) <= set(IMAGENET.search("retriever"))
    assert IMAGENET.search("  ") == []
    assert len(IMAGENET.search("a", limit=7)) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": ["12"]}, "class '12' is unknown; nearest"),
        ({"class_labels": [10]}, "class 10 does not exist; allowed: 0 to 9"),
        ({"generator": seeded(1, 2, 3)}, "3 generators for 2 images; wanted one, or one per image"),
        ({"generator": [1, 2]}, "generator is a int"),
        ({"generator": 5}, "generator is a int; wanted torch.Generator, or a list of them"),
        ({"height": 7}, "height is 7; allowed: a positive multiple of 2 pixels"),
        ({"width": -2}, "width is -2"),
        ({"height": 2 * 10**9}, "one 2000000000x8 sample keeps .* between steps"),
        ({"num_images_per_label": 10**9}, "batches of 2000000000 keep .* between steps, the device has"),
        ({"num_inference_steps": 10**9}, "num_steps is 1000000000; allowed: a whole number, 1 to 100000"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; allowed: pil, np, pt, latent"),
        ({"num_images_per_label": 0}, "num_images_per_label is 0"),
        ({"num_inference_steps": 0}, "num_steps is 0"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"guidance_interval": (0.5, 0.1)}, "guidance_interval is"),
        ({"refresh_steps": (1, 2)}, "refresh_steps is"),
        ({"solver": "heun"}, "solver is 'heun'"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, r"latents are \(1, 1, 8, 8\); wanted \(2, 1, 8, 8\)"),
        ({"latents": [1.0]}, r"latents are a list; wanted a tensor \(2, 1, 8, 8\) for 2 images"),
        ({"latents": torch.zeros(2, 1, 8, 8, dtype=torch.bool)}, "latents are torch.bool, .* wanted dense floats"),
        ({"latents": torch.zeros(2, 1, 8, 8, device="meta")}, "latents are .*, on meta; wanted dense floats"),
        ({"latents": torch.zeros(2, 1, 8, 8).to_sparse()}, r"latents are .*torch\.sparse_coo, .*; wanted dense floats"),
        ({"class_labels": torch.zeros(2, dtype=torch.int64, device="meta")}, "classes are .* on meta; wanted"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is a int; wanted a function"),
        (
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            "names 'prompt_embeds'; allowed: latents",
        ),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "tensor_inputs is 'latents'; wanted a list of names"),
        ({"callback_on_step_end_tensor_inputs": None}, "tensor_inputs is None"),
        ({"callback_on_step_end": lambda *_: 3}, "callback_on_step_end returned a int; wanted None or a dict"),
    ],
)
def test_wrong_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [3, 4], "num_inference_steps": 2, **arguments})


def test_a_callback_that_returns_other_latents(pipe):
    with pytest.raises(ValueError, match=r"returned latents \(2, 2\); wanted \(1, 1, 8, 8\)"):
        pipe([3], 2, callback_on_step_end=lambda *_: {"latents": torch.zeros(2, 2)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_graphs_without_cuda(pipe):
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, the transformer is on cpu"):
        pipe.enable_cuda_graphs()


class Elsewhere(torch.Generator):
    """Says that it is on a GPU."""

    device = torch.device("cuda:1")


def test_generators_elsewhere_are_refused(pipe):
    with pytest.raises(
        ValueError, match=r"generator is on cuda:1; wanted torch\.Generator\('cpu'\), whose .* machine$"
    ):
        pipe([3], 2, generator=Elsewhere())
    inputs = torch.zeros(1, 1, 8, 8), 0.0, torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="generator is on cuda:1; wanted"):
        DDTScheduler(num_steps=9, last_step=None, solver="sde").step(*inputs, generator=Elsewhere())
    own, other = Elsewhere(), seeded(0)[0]
    assert per_sample([own, own], 2, torch.device("cuda:1")) == [own, own]
    assert per_sample([other, other], 2, torch.device("cuda:1")) == [other, other]
    with pytest.raises(ValueError, match=r"is on cuda:1; wanted .* machine, or one on cuda:0, where samples are drawn"):
        per_sample(own, 2, torch.device("cuda:0"))
    with pytest.raises(ValueError, match="generators are on cpu and cuda:1; wanted all on one device"):
        per_sample([own, other], 2, torch.device("cuda:1"))
