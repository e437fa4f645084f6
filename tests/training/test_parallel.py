"""Several processes, over gloo on a CPU: the same run, whoever shares it and however; what is asked of CUDA."""

import copy
import functools
import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from tiny_runs import CPU, TINY, digits, final_state, latents, launch, losses, start, wait_for_log
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

from ddt_fast import load_model
from ddt_fast.model.fused import FusedDDT
from ddt_fast.model.reference import DDT
from ddt_fast.training.loop import train
from ddt_fast.training.model import TrainingModel
from ddt_fast.training.parallel import MixedPrecisionReplica, process_group
from ddt_fast.training.run_folder import settings_of
from ddt_fast.training.samples import Preview
from dispatched import operators_of


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "dtype"), [("ddp", "float32"), ("fsdp", "float32"), ("ddp", "bfloat16")])
def test_two_processes_have_the_loss_curve_of_one(tmp_path, latent_cache, parallel, dtype):
    settings = {"log_every": 1, "batch_size": 8, "accumulation_steps": 2, "max_grad_norm": 1.0, "dtype": dtype}
    train(latents(latent_cache, 6, **settings), tmp_path / "one", CPU)
    start(latents(latent_cache, 6, parallel=parallel, **settings), tmp_path / "two", processes=2).finish()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5 if dtype == "float32" else 5e-3)
    if dtype == "float32":
        assert_close(*(load_model(tmp_path / run / "model").state_dict() for run in ("one", "two")))


def assert_close(ours, theirs):
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=2e-5), name


def replica(parallel, dtype):
    torch.manual_seed(0)
    model = DDT(TINY)
    for parameter in model.parameters():  # fresh ones are 0 in the last layer, and so is every gradient before it
        torch.nn.init.normal_(parameter, std=0.2)
    return MixedPrecisionReplica(TrainingModel(model), dtype, parallel, compile=False)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(2, 1, 8, 8, generator=generator), torch.rand(2, generator=generator)
    return x, t, torch.tensor([seed, 3])


def backward(replica, seed, last):
    with replica.part(last):
        replica.compute(*batch(seed))[0].float().square().mean().backward()


@pytest.fixture
def one_of_two(monkeypatch):
    """This process as one of two, the other of which has all gradients 1; the tensors that they exchange."""
    exchanged, all_reduce = [], dist.all_reduce

    def recording(tensor, **options):
        exchanged.append(tensor.clone())
        tensor.add_(0.5)
        return all_reduce(tensor, **options)

    with process_group(CPU):
        monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
        monkeypatch.setattr(dist, "all_reduce", recording)
        yield exchanged


def test_bfloat16_gradients_are_added_up_in_float32_and_exchanged_once(one_of_two):
    narrow = replica("ddp", torch.bfloat16)
    for step in range(3):  # DDP arranges its buckets anew after the first
        expected = [torch.zeros_like(master) for master in narrow.masters.parameters()]
        model = copy.deepcopy(narrow.masters).bfloat16()
        for seed in (step, 5):
            model(*batch(seed))[0].float().square().mean().backward()
            for total, parameter in zip(expected, model.parameters(), strict=True):
                total += parameter.grad.float()
                parameter.grad = None
        one_of_two.clear()
        backward(narrow, step, last=False)
        assert one_of_two == []
        backward(narrow, 5, last=True)
        assert {tensor.dtype for tensor in one_of_two} == {torch.float32}
        assert sum(tensor.numel() for tensor in one_of_two) == sum(total.numel() for total in expected)
        for total, master in zip(expected, narrow.masters.parameters(), strict=True):
            assert master.grad.dtype == torch.float32
            torch.testing.assert_close(master.grad, total / 2 + 0.5, rtol=1e-6, atol=1e-6)
            master.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_fused_block_is_trained_by_two_operators_and_its_norms(parallel, dtype):
    with process_group(CPU):
        fused = MixedPrecisionReplica(TrainingModel(FusedDDT(TINY, "sdpa_flash")), dtype, parallel, compile=False)
        _, seen = operators_of(backward, fused, 3, True)
    norms = 2 * TINY.num_blocks + 2  # also the encoder's last residual, and the final layer
    for name, count in (("qkv_attention", TINY.num_blocks), ("swiglu_mlp", TINY.num_blocks), ("norm_modulate", norms)):
        assert seen.count(name) == seen.count(f"{name}_backward") == count


def test_float32_gradients_are_exchanged_once(one_of_two):
    exchanges = []
    wide = replica("ddp", torch.float32)

    def counting(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanges.append(bucket.buffer().numel())
        return noop_hook(_, bucket)

    wide.compute.register_comm_hook(None, counting)
    backward(wide, 0, last=False)
    assert exchanges == []
    backward(wide, 1, last=True)
    assert sum(exchanges) == sum(master.numel() for master in wide.masters.parameters())


def test_sharded_gradients_are_exchanged_once():
    with process_group(CPU):
        sharded = replica("fsdp", torch.bfloat16)
        backward(sharded, 0, last=False)
        assert all(master.grad is None for master in sharded.masters.parameters())
        backward(sharded, 1, last=True)
        narrow = replica("ddp", torch.bfloat16)
        backward(narrow, 0, last=False)
        backward(narrow, 1, last=True)
        for ours, theirs in zip(sharded.masters.parameters(), narrow.masters.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_checkpoints_reshard_from_two_to_one_and_back(tmp_path):
    train(digits(15), tmp_path / "whole", CPU)
    run = tmp_path / "run"
    start(digits(5, parallel="fsdp"), run, processes=2).finish()
    train(digits(10, parallel="ddp"), run, CPU, "auto")
    start(digits(15, parallel="fsdp"), run, "--resume", "auto", processes=2).finish()
    assert_close(final_state(run, 15), final_state(tmp_path / "whole", 15))
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_one_process_that_is_told_to_stop_stops_all_after_the_same_step(tmp_path):
    experiment = digits(100_000, checkpoint_every=100_000, log_every=5)
    started = start(experiment, tmp_path / "run", processes=2)
    wait_for_log(started, tmp_path / "run")
    started.processes[1].terminate()
    assert started.finish().count("--resume auto continues") == 1
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer.json").read_text())["step"] >= 5


@pytest.mark.slow
def test_torchrun_starts_the_processes_of_a_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings_of(digits(2))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "ddt_fast.train", "--config", "recipe.yaml", "--output-dir", "run", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("model: run/model") == 1
    assert json.loads((tmp_path / "run" / "training.json").read_text())["processes"] == 2


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
def test_fsdp_goes_with_compile_and_gradient_checkpointing(tmp_path, monkeypatch):
    # The graphs are dynamo's, whole or not at all; what makes code of them does not matter here, and takes long.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = {"parallel": "fsdp", "gradient_checkpointing": True}
    expected = train(digits(2), tmp_path / "plain", CPU).model
    compiled = train(digits(2, compile=True, **settings), tmp_path / "compiled", CPU).model
    assert_close(compiled.state_dict(), expected.state_dict())


SECONDS = 1


def slow_grid(preview, model):
    time.sleep(SECONDS + 0.5)
    return Image.new("RGB", (2, 2))


def train_slowly(folder: Path) -> None:
    """The first process takes longer with what it does alone than the collectives of training wait."""
    Preview.grid = slow_grid
    dist.init_process_group("gloo")
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SECONDS), dist.group.WORLD)
    train(digits(4, sample_every=2), folder, CPU)
    assert (folder / "samples.png").exists(), "returned before the first process had drawn"
    print("came to the end")


@pytest.mark.slow
def test_others_wait_while_samples_are_drawn(tmp_path):
    output = launch(train_slowly, tmp_path / "run", tmp_path / "output.txt", processes=2).finish()
    assert output.count("came to the end") == 2
    assert (tmp_path / "run" / "samples" / "samples_step_0000002.png").exists()
