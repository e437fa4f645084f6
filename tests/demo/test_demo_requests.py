"""Whatever a client sends becomes a request, or a message that says what is allowed."""

import re
from dataclasses import replace

import pytest

from ddt_fast.class_names import ClassNames, imagenet_id2label
from ddt_fast.webdemo.requests import MAX_SEED, read_classes, read_request
from demo_cases import LIMITS, embedded, fields, request

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model():
    return embedded()


def test_a_request_holds_what_the_fields_say(model):
    read = request(
        model,
        classes=["3", "8"],
        num_images=3.0,
        seed=7,
        guidance_scale=2,
        guidance_low=0.25,
        guidance_high=0.5,
        refresh_every=4,
        state_forecast="linear",
        solver="lms",
        order=3,
        timeshift=2,
    )
    assert (read.labels, read.seeds) == ((3, 8, 3), (7, 8, 9))
    assert read.sampling == replace(
        model.sampling,
        num_steps=8,
        guidance_scale=2.0,
        guidance_interval=(0.25, 0.5),
        refresh_every=4,
        state_forecast="linear",
        solver="lms",
        order=3,
        timeshift=2.0,
    )


def test_without_classes_all_take_turns(model):
    assert request(model, num_images=12).labels == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1)
    assert request(model, classes=None).labels == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/etc/passwd"}, "model '/etc/passwd' is not offered here; allowed: digits"),
        ({"model": None}, "model empty is not offered"),
        ({"model": ["digits"]}, "is not offered"),
        ({"model": "x" * 10_000}, "x…"),
        ({"classes": ["unicorn"]}, "class 'unicorn' is unknown"),
        ({"classes": ["10"]}, "class 10 does not exist; allowed: 0 to 9"),
        ({"classes": [-1]}, "class -1 does not exist"),
        ({"classes": [3.5]}, "class 3.5 is a float"),
        ({"classes": [{"a": 1}]}, "is a dict"),
        ({"classes": {"a": 1}}, "is a dict"),
        ({"classes": [True]}, "class True is a bool"),
        ({"classes": ["3"] * 11}, "11 classes are chosen; allowed: up to 10"),
        ({"classes": ["9" * 5000]}, "a class of 5000 characters; allowed: up to 100"),
        ({"num_images": 0}, "images is 0; allowed: a whole number, 1 to 12"),
        ({"num_images": 13}, "images is 13; allowed: a whole number, 1 to 12"),
        ({"num_images": 2.5}, "images is 2.5"),
        ({"num_images": NAN}, "images is nan"),
        ({"num_images": INFINITY}, "images is inf"),
        ({"num_images": 10**400}, "images is a huge number"),
        ({"num_images": None}, "images is empty"),
        ({"num_images": "4"}, "images is '4'"),
        ({"num_images": True}, "images is True"),
        ({"num_steps": 41}, "steps is 41; allowed: a whole number, 1 to 40"),
        ({"guidance_scale": -1}, "CFG scale is -1; allowed: 0 to 20"),
        ({"guidance_scale": NAN}, "CFG scale is nan"),
        ({"guidance_scale": 1e30}, "CFG scale is 1e+30"),
        ({"guidance_scale": []}, "CFG scale is []"),
        ({"guidance_low": -0.1}, "guided from t is -0.1; allowed: 0 to 1"),
        ({"guidance_high": 1.5}, "guided to t is 1.5"),
        ({"guidance_low": 0.8, "guidance_high": 0.3}, "guidance interval is (0.8, 0.3)"),
        ({"timeshift": 0}, "timeshift is 0; allowed: 0.1 to 10"),
        ({"refresh_every": 0}, "refresh K is 0; allowed: a whole number, 1 to 50"),
        ({"state_forecast": "cubic"}, "state_forecast is 'cubic'; allowed: hold, linear, quadratic"),
        ({"state_forecast": [1]}, "state_forecast is '[1]'"),
        ({"solver": "heun"}, "solver is 'heun'; allowed: euler, lms, sde"),
        ({"solver": None}, "solver is 'empty'"),
        ({"order": 5}, "order is 5; allowed: a whole number, 1 to 4"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**53}, "seed is"),
        ({"seed": MAX_SEED}, "seed is 9007199254740991; allowed: a whole number, 0 to 9007199254740988"),
    ],
)
def test_wrong_values_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_request(fields(**changes), {model.name: model}, LIMITS)
    assert len(str(error.value)) < 300


def test_classes_go_by_name_and_the_nearest_are_named():
    class Pipe:
        class_names = ClassNames(1000, imagenet_id2label())

    class Model:
        pipe, num_classes = Pipe, 1000

    assert read_classes(["golden retriever", "207", 0], Model) == [207, 207, 0]
    with pytest.raises(ValueError, match="nearest: 207 'golden retriever'"):
        read_classes(["golden retreiver"], Model)
