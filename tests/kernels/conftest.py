"""A stand-in for a GPU."""

import importlib
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from ddt_kernels import (
    attention_launch,
    check,
    launcher,
    norm_launch,
    qk_norm_rope_launch,
    runtime,
    swiglu_launch,
    tuning,
    verification,
)
from ddt_kernels.compilation import launching_into
from ddt_kernels.store import Store
from ddt_kernels.verification import Verdict

guided_step = importlib.import_module("ddt_kernels.guided_step")  # the package has a function of that name


@pytest.fixture
def gpu_stand_in(monkeypatch, tmp_path):
    """A CPU that passes for a GPU: what is launched on it, what the worker is asked and answers, how long things
    take."""
    fake = SimpleNamespace(launched=[], asked=[], verdict=Verdict(), milliseconds={})
    for module in (attention_launch, guided_step, norm_launch, qk_norm_rope_launch, swiglu_launch):
        for function in vars(module).values():
            getattr(function, "known", {}).clear()

    def verify(spec, device):
        fake.asked.append(spec)
        return fake.verdict

    def milliseconds(run, candidate, device):
        run(candidate)
        return fake.milliseconds[str(candidate)]

    def receive(binary):
        return lambda *args: fake.launched.append(binary.name)

    stores = cache(lambda device: Store(tmp_path, {"gpu": "stand-in"}))
    for module in (check, launcher, tuning, verification):
        monkeypatch.setattr(module, "store", stores)
    monkeypatch.setattr(verification, "worker", lambda: SimpleNamespace(check=verify))
    monkeypatch.setattr(tuning, "milliseconds_of", milliseconds)
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_running", {})
    monkeypatch.setattr(runtime, "is_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("DDT_KERNELS_AUTOTUNE", "0")
    verification._warned.clear()
    with launching_into(receive):
        yield fake
    verification._warned.clear()
