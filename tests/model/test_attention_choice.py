"""On a GPU, "auto" takes the fastest attention of those that are right there."""

import sys
import warnings
from functools import cache
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ddt_fast.model import attention as package
from ddt_fast.model.attention import backends, choice, resolve_backend
from ddt_kernels import runtime, tuning, verification
from ddt_kernels.store import Store
from ddt_kernels.verification import Verdict

CUDA, CPU, BF16 = torch.device("cuda", 0), torch.device("cpu"), torch.bfloat16
ORDER = ("triton", "sdpa_cudnn", "sdpa_flash", "flash_attn_3", "sdpa_efficient")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A Hopper with FlashAttention 3: how long backends take there, which are wrong, and what was asked."""
    fake = SimpleNamespace(milliseconds=dict.fromkeys(ORDER, 2.0), wrong={}, asked=[])

    def verdict(op, args, kwargs, device, compiled=False):
        fake.asked.append((op.op, args[0], tuple(args[1].shape)))
        return Verdict(fake.wrong.get(args[0], ""))

    def new_process():
        stores = cache(lambda device: Store(tmp_path, {"gpu": "stand-in"}))
        monkeypatch.setattr(tuning, "store", stores)
        monkeypatch.setattr(tuning, "_choices", {})
        monkeypatch.setattr(choice, "_settled", {})

    fake.new_process = new_process
    new_process()
    monkeypatch.setattr(verification, "verdict", verdict)
    monkeypatch.setattr(tuning, "_running", {})
    monkeypatch.setattr(tuning, "can_time", lambda device: True)
    monkeypatch.setattr(tuning, "milliseconds_of", lambda run, name, device: fake.milliseconds[name])
    monkeypatch.setattr(runtime, "is_gpu", lambda device: True)
    monkeypatch.setattr(package, "unavailable", lambda name, *_: None if name in ORDER else "is not here")
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    package._usable.cache_clear()
    verification._warned.clear()
    yield fake
    package._usable.cache_clear()
    verification._warned.clear()


def resolve(backend="auto", batch=64, tokens=256, gradient=False):
    return resolve_backend(backend, CUDA, BF16, 72, tokens, gradient, batch, 16)


def test_the_fastest_runs_and_ties_go_to_the_preferred(gpu):
    assert resolve() == "triton"
    gpu.milliseconds["flash_attn_3"] = 1.0
    assert resolve(tokens=1024) == "flash_attn_3"
    assert resolve() == "triton", "what was chosen stays"
    gpu.new_process()
    gpu.milliseconds = {}
    assert [resolve(), resolve(tokens=1024)] == ["triton", "flash_attn_3"], "for later processes too"
    assert tuning.running() == {"attention": "flash_attn_3 and triton"}


def test_forward_alone_and_with_gradients_are_two_choices(gpu):
    assert resolve() == "triton"
    gpu.milliseconds["sdpa_cudnn"] = 1.0
    assert resolve(gradient=True) == "sdpa_cudnn"
    assert resolve() == "triton"
    assert {op for op, _, _ in gpu.asked} == {"attend", "attend_with_gradients"}


def test_a_last_partial_batch_takes_what_the_others_take(gpu):
    assert resolve(batch=64) == "triton"
    gpu.milliseconds["sdpa_cudnn"] = 1.0
    assert resolve(batch=40) == "triton"
    assert resolve(batch=16) == "sdpa_cudnn"


def test_a_wrong_backend_is_left_out_with_a_warning(gpu):
    gpu.milliseconds |= {"sdpa_cudnn": 1.0, "sdpa_flash": 1.5}
    gpu.wrong = {"sdpa_cudnn": "result 0 is off by 40 times what is allowed"}
    with pytest.warns(UserWarning, match="attention backend 'sdpa_cudnn' is left out on this GPU: result 0 is off"):
        assert resolve() == "sdpa_flash"
    gpu.wrong = dict.fromkeys(ORDER, "wrong")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert resolve(tokens=1024) == "triton", "which ddt_kernels verifies, and replaces, itself"


def test_without_timings_only_the_preferred_are_tried_in_their_order(gpu, monkeypatch):
    monkeypatch.setenv("DDT_KERNELS_AUTOTUNE", "0")
    gpu.milliseconds = {}
    assert resolve() == "triton"
    assert "flash_attn_3" not in {name for _, name, _ in gpu.asked}


def test_compiled_functions_take_what_was_chosen_for_such_heads(gpu):
    assert resolve_backend("auto", CUDA, BF16, 72) == "triton"
    gpu.milliseconds["flash_attn_3"] = 1.0
    assert resolve() == "flash_attn_3"
    assert resolve_backend("auto", CUDA, BF16, 72) == "flash_attn_3"
    assert resolve_backend("auto", CUDA, BF16, 72, gradient=True) == "triton"


def test_ddt_kernels_triton_takes_ours_in_float32_too(gpu, monkeypatch):
    assert resolve_backend("auto", CUDA, torch.float32, 72, 256, False, 64, 16) == "sdpa_efficient"
    package._usable.cache_clear()
    monkeypatch.setenv("DDT_KERNELS", "triton")
    assert resolve_backend("auto", CUDA, torch.float32, 72, 256, False, 64, 16) == "triton"


def test_a_forced_backend_is_neither_verified_nor_timed(gpu):
    gpu.milliseconds = {}
    assert resolve("sdpa_efficient") == "sdpa_efficient"
    assert gpu.asked == []


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_math"])
def test_backends_are_verified_as_the_worker_calls_them(name, gradient):
    q, k, v = torch.empty(2, 20, 3, 4, 16, device="meta").unbind(2)
    args = (name, q, k, v, q.new_empty(q.shape)) if gradient else (name, q, k, v)
    op = choice.attend_with_gradients if gradient else choice.attend
    found = verification.check(verification.specification(op, args, {}), CPU)
    assert found.reason == ""
    assert found.share <= 1


def test_the_process_that_verifies_imports_an_optional_package_itself(monkeypatch):
    """Where none has been imported, and looked for, before."""
    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = lambda q, k, v, scale: v + 1
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(backends, "_imported", {})
    monkeypatch.setattr(backends, "_is_installed", lambda module: True)
    q, k, v = torch.zeros(2, 5, 3, 4, 16, dtype=BF16).unbind(2)
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        choice.attend("xformers", q, k, v)
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    assert torch.equal(choice.attend("xformers", q, k, v), v + 1)
