"""Several processes, over gloo on a CPU: the same run, whoever shares it and however."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny_runs import digits, final_state, finish, latents, start

from ddt_fast import load_model
from ddt_fast.training.loop import train
from ddt_fast.training.parallel import _average_in_float32, process_group

CPU = torch.device("cpu")


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_loss_curve_of_one(tmp_path, latent_cache, parallel):
    settings = {"log_every": 1, "batch_size": 8, "accumulation_steps": 2, "max_grad_norm": 1.0}
    train(latents(latent_cache, 8, **settings), tmp_path / "one", CPU)
    finish(start(latents(latent_cache, 8, parallel=parallel, **settings), tmp_path / "two", processes=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = (load_model(tmp_path / run / "model").state_dict() for run in ("one", "two"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=2e-5), name


def test_bfloat16_gradients_are_added_up_in_float32(monkeypatch):
    added = []
    all_reduce = dist.all_reduce

    def recording(tensor, **options):
        added.append(tensor.clone())
        tensor.add_(0.25)  # the other process's share
        return all_reduce(tensor, **options)

    gradients = torch.full((4,), 1.0, dtype=torch.bfloat16)
    with process_group(CPU):
        monkeypatch.setattr(dist, "all_reduce", recording)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        bucket = SimpleNamespace(buffer=lambda: gradients)
        result = _average_in_float32(None, bucket).wait()
    assert added[0].dtype == torch.float32
    assert added[0].tolist() == [0.5] * 4
    assert result is gradients
    assert result.tolist() == [0.75] * 4


def test_bfloat16_in_two_processes_has_the_losses_of_one(tmp_path):
    settings = {"log_every": 1, "dtype": "bfloat16"}
    train(digits(6, **settings), tmp_path / "one", CPU)
    finish(start(digits(6, **settings), tmp_path / "two", processes=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=5e-3)


def test_checkpoints_reshard_from_two_to_one_and_back(tmp_path):
    train(digits(15), tmp_path / "whole", CPU)
    run = tmp_path / "run"
    finish(start(digits(5, parallel="fsdp"), run, processes=2))
    finish(start(digits(10, parallel="ddp"), run, "--resume", "auto"))
    finish(start(digits(15, parallel="fsdp"), run, "--resume", "auto", processes=2))
    expected = final_state(tmp_path / "whole", 15)
    for name, tensor in final_state(run, 15).items():
        assert torch.allclose(tensor, expected[name], atol=2e-5), name
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_one_process_that_is_told_to_stop_stops_all_after_the_same_step(tmp_path):
    experiment = digits(100_000, checkpoint_every=100_000, log_every=5)
    process = start(experiment, tmp_path / "run", processes=2)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGTERM)
    assert finish(process).count("--resume auto continues") == 1
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer.json").read_text())["step"] >= 5
