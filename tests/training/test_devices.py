"""What training asks of CUDA and of torch.compile, as far as a CPU can tell."""

import functools

import pytest
import torch
import torch.distributed as dist
from tiny_runs import CPU, digits

from ddt_fast.training.loop import train
from ddt_fast.training.parallel import process_group


@pytest.mark.parametrize(("named", "index"), [("cuda:3", 3), ("cuda", 0)])
@pytest.mark.parametrize("launched", [False, True], ids=["alone", "torchrun"])
def test_a_process_makes_its_gpu_the_current_one_before_it_meets_the_others(monkeypatch, named, index, launched):
    calls = []
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1") if launched else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("current", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, device_id, **__: calls.append(("group", device_id)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with process_group(torch.device(named)):
        pass
    own = torch.device("cuda", index)
    assert calls == [("current", own), ("group", own)]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fsdp_goes_with_compile(tmp_path, monkeypatch, checkpointing):
    # The graphs are dynamo's, whole or not at all; what makes code of them does not matter here, and takes long.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = {"parallel": "fsdp", "gradient_checkpointing": checkpointing}
    expected = train(digits(3), tmp_path / "plain", CPU).model
    compiled = train(digits(3, compile=True, **settings), tmp_path / "compiled", CPU).model
    for (name, ours), theirs in zip(compiled.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), name
