"""On a GPU, a launcher runs only what was verified there, and the faster of its implementations."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.host_time import calls
from ddt_kernels import launcher, norm_launch, runtime, swiglu_launch, tuning
from ddt_kernels.verification import COMPILED, Verdict
from kernel_testing import BF16, COMPILES, seeded

pytestmark = COMPILES
CALLS = calls(16, heads=2, width=48)


def norm_inputs(batch=2, tokens=5, channels=72):
    randn = seeded(0, BF16)
    return randn(batch, tokens, channels), randn(channels), *randn(batch, 1, 2 * channels).chunk(2, -1)


def norm(x, weight, shift, scale):
    return norm_launch.launch_forward(x, None, None, weight, shift, scale, 1e-6, "rms", False)


def plain_norm(x, weight, shift, scale):
    return norm_launch.plain_forward(x, None, None, weight, shift, scale, 1e-6, "rms", False)


def test_a_kernel_is_verified_before_its_first_launch_once_for_a_class_of_shapes(gpu_stand_in):
    for batch in (5, 6, 7):
        norm(*norm_inputs(batch))
    assert len(gpu_stand_in.asked) == 1
    assert gpu_stand_in.launched == ["norm_modulate_forward_kernel"] * 3
    norm(*norm_inputs(8))
    assert len(gpu_stand_in.asked) == 2
    assert tuning.running() == {"norm_modulate": "triton"}


def test_a_kernel_that_fails_is_replaced_with_one_warning_and_that_is_kept(gpu_stand_in, tmp_path):
    gpu_stand_in.verdict = Verdict("RuntimeError: out of shared memory")
    inputs = norm_inputs()
    with pytest.warns(UserWarning, match="norm_modulate runs in PyTorch on this GPU: RuntimeError: out of") as warned:
        made = [norm(*inputs), norm(*norm_inputs(4))]
    assert len(warned) == 1
    assert "report this with the output of python -m ddt_kernels.check" in str(warned[0].message)
    assert torch.equal(made[0][1], plain_norm(*inputs)[1])
    assert gpu_stand_in.launched == []
    assert tuning.running() == {"norm_modulate": "torch"}
    (file,) = tmp_path.glob("*.json")
    reasons = [found["reason"] for found in json.loads(file.read_text())["found"].values()]
    assert reasons == ["RuntimeError: out of shared memory"] * 2


@pytest.mark.parametrize("mode", ["auto", "triton"])
def test_a_kernel_that_does_not_compile_here_is_replaced_unless_it_is_forced(gpu_stand_in, monkeypatch, mode):
    """Though it was verified: at other sizes, or on another driver."""
    monkeypatch.setenv("DDT_KERNELS", mode)

    def fails(*args, **options):
        raise RuntimeError("PTXAS error: Internal Triton PTX codegen error\nof many lines")

    monkeypatch.setattr("triton.compiler.compiler.CompiledKernel._init_handles", fails)
    inputs = norm_inputs(channels=88)
    if mode == "triton":
        with pytest.raises(RuntimeError, match="PTXAS error"):
            norm(*inputs)
        return
    with pytest.warns(
        UserWarning, match="norm_modulate runs in PyTorch .*: RuntimeError: PTXAS error: .* codegen error."
    ) as warned:
        made = norm(*inputs)
    assert len(warned) == 1
    assert "of many lines" not in str(warned[0].message)
    assert torch.equal(made[1], plain_norm(*inputs)[1])


def test_what_could_not_be_verified_is_asked_with_few_samples_and_again_by_the_next_process(gpu_stand_in, tmp_path):
    gpu_stand_in.verdict = Verdict("OutOfMemoryError: of 80 GiB", lasting=False)
    with pytest.warns(UserWarning, match="OutOfMemoryError"):
        norm(*norm_inputs(batch=64))
    assert [spec["args"]["x"]["shape"][0] for spec in gpu_stand_in.asked] == [64, 1]
    assert gpu_stand_in.launched == []
    assert not list(tmp_path.glob("*.json"))


def test_a_tile_that_fails_is_not_launched(gpu_stand_in, monkeypatch):
    run = []
    monkeypatch.setattr(swiglu_launch, "launch", lambda *args, **meta: run.append(meta["BLOCK_M"]))
    randn = seeded(0, BF16)
    x, (w1, w3) = randn(300, 64), randn(96, 64).chunk(2)
    swiglu_launch._fused_forward(x, torch.stack([w1, w3]), None, None, False)
    default = run.pop()
    first, *others = swiglu_launch.HALF_BY_DESCRIPTOR
    wrong = [config for config in swiglu_launch.HALF_BY_DESCRIPTOR if config != others[0]]
    gpu_stand_in.verdict = Verdict(candidates=dict.fromkeys(map(str, wrong), "wrong"))
    swiglu_launch._fused_forward(randn(600, 64), torch.stack([w1, w3]), None, None, False)
    assert run == [others[0].block_m]
    assert default != run[0] or first != others[0]


def test_torch_compile_runs_where_it_is_faster_and_right(gpu_stand_in, monkeypatch):
    monkeypatch.setenv("DDT_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(launcher, "WORTH_COMPILING", 1)
    monkeypatch.setattr(tuning, "compiled_version", lambda function: function)
    gpu_stand_in.milliseconds = {"triton": 2.0, COMPILED: 1.0}
    inputs = norm_inputs()
    assert torch.equal(norm(*inputs)[1], plain_norm(*inputs)[1])
    assert tuning.running() == {"norm_modulate": COMPILED}
    assert gpu_stand_in.asked[0]["compiled"]
    assert gpu_stand_in.launched == ["norm_modulate_forward_kernel"], "to be timed"
    gpu_stand_in.milliseconds = {}
    norm(*norm_inputs(4, tokens=9))
    assert tuning.running() == {"norm_modulate": COMPILED}, "one choice for all sizes"
    gpu_stand_in.verdict = Verdict(candidates={COMPILED: "wrong"})
    norm(*norm_inputs(8))
    assert tuning.running() == {"norm_modulate": f"{COMPILED} and triton"}
    gpu_stand_in.verdict, gpu_stand_in.milliseconds = Verdict(), {"triton": 1.0, COMPILED: 2.0}
    norm(*norm_inputs(channels=80))
    assert gpu_stand_in.asked[-1]["compiled"]
    norm(*norm_inputs(4, channels=80))
    assert not gpu_stand_in.asked[-1]["compiled"], "it has lost"


@pytest.mark.parametrize("name", CALLS)
def test_timing_changes_no_argument(gpu_stand_in, monkeypatch, name):
    """Not those that a launcher writes to: they are copied first."""
    monkeypatch.setenv("DDT_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(launcher, "WORTH_COMPILING", 1)
    monkeypatch.setattr(tuning, "implementation", lambda op, key, names, run, device: names[0])
    timed = []

    def milliseconds(run, candidate, device):
        run(candidate)
        timed.append([tensor.clone() for tensor in tensors])
        return 1.0

    monkeypatch.setattr(tuning, "compiled_version", lambda function: function)
    monkeypatch.setattr(tuning, "milliseconds_of", milliseconds)
    make, call = CALLS[name]
    inputs = make(seeded(0, BF16))
    tensors = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    call(*inputs)
    if not name.startswith(("attention", "swiglu")):
        assert timed
    for state in timed:
        assert all(map(torch.equal, state, before))


def test_one_process_of_a_node_compiles_at_a_time(gpu_stand_in, monkeypatch, tmp_path):
    """The others find the binaries in Triton's cache."""
    fcntl = pytest.importorskip("fcntl")
    locked = []
    original = runtime.Tape

    def tape(*args):
        with next(tmp_path.glob("*.lock")).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(True)
        return original(*args)

    monkeypatch.setattr(runtime, "Tape", tape)
    norm(*norm_inputs())
    assert locked == [True]


WITHOUT_TRITON = """
import sys, warnings
sys.modules["triton"] = None
import torch
from benchmarks.host_time import calls
from ddt_kernels import runtime, tuning
runtime.is_gpu = lambda device: True
generator = torch.Generator().manual_seed(0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for make, call in calls(16, heads=2, width=48).values():
        call(*make(lambda *size: torch.randn(size, generator=generator).to(torch.bfloat16)))
import ddt_fast.model.attention.backends as backends
print(sorted(set(tuning.running().values())), len([w for w in caught if "triton is not installed" in str(w.message)]))
print(backends.unavailable("triton", torch.device("cuda"), torch.bfloat16, 72))
"""


@pytest.mark.parametrize("mode", ["torch", "auto"])
def test_without_triton_every_op_runs_in_pytorch(mode):
    """By choice, and then silently, or for want of it: with a warning for each op."""
    environment = os.environ | {"DDT_KERNELS": mode}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    running, reason = done.stdout.splitlines()
    assert running == ("['cublas', 'torch'] 0" if mode == "torch" else "['cublas', 'torch'] 8")
    assert ("DDT_KERNELS=torch turns it off" if mode == "torch" else "triton is not installed") in reason
