"""`python -m ddt_kernels.check` says of every op whether it is right on this GPU, and how fast."""

import json

import pytest
import torch

from benchmarks.host_time import calls
from ddt_kernels import Cost, check, runtime, tuning, verification
from ddt_kernels.verification import Verdict
from kernel_testing import BF16, COMPILES

SMALL = check.Sizes(batch=2, tokens=16, heads=2, head_dim=8, width=48, side=8)
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", list(check.cases(SMALL)), ids=lambda case: f"{case.op} {case.kind} {case.dtype}")
def test_every_case_does_what_plain_pytorch_does(case):
    ours, plain = case.call(case.run, CPU)(), case.call(case.plain, CPU)()
    tolerance = {"rtol": 0.05, "atol": 0.15} if case.dtype == BF16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours, plain, **tolerance)


@pytest.fixture
def gpu(gpu_stand_in, monkeypatch):
    """The launchers of `benchmarks.host_time` as cases; one of them fails, and one has a tile that does."""

    def cases(sizes):
        for name, (make, run) in calls(16, heads=2, width=48).items():
            yield check.Case(name, "small", BF16, make, run, run, Cost(1 << 20, 1 << 20))

    def verify(spec, device):
        if spec["op"] == "guided_step":
            return Verdict("the process that checked it ended (SIGSEGV)", share=torch.inf)
        return Verdict(candidates={"64x64": "is off by 3 times"} if spec["op"] == "attention" else {}, share=0.5)

    gpu_stand_in.worker = type("Worker", (), {"check": staticmethod(verify), "close": lambda self: None})
    monkeypatch.setattr(verification, "Worker", gpu_stand_in.worker)
    monkeypatch.setattr(check, "cases", cases)
    monkeypatch.setattr(tuning, "milliseconds_of", lambda run, candidate, device: len([run(candidate)]) * 2.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "stand-in")
    monkeypatch.setattr(check, "device_in_use", lambda: CPU)
    monkeypatch.setattr(check, "environment", lambda device: {"gpu": "stand-in"})
    monkeypatch.setattr(check.Ceilings, "measure", lambda device: check.Ceilings(4e12, 8e14))
    return gpu_stand_in


@COMPILES
@pytest.mark.filterwarnings("ignore:ddt_kernels")
def test_the_table_says_what_failed_and_the_file_holds_it_all(gpu, tmp_path, capsys):
    assert check.main(["--output", str(tmp_path / "check.json")]) == 1
    printed = capsys.readouterr().out
    assert "guided_step FAILED: the process that checked it ended (SIGSEGV)" in printed
    assert "attention without 64x64: is off by 3 times" in printed
    assert printed.splitlines()[-1].startswith("8 cases in ")
    assert printed.splitlines()[-1].endswith("s, 1 failed")
    made = json.loads((tmp_path / "check.json").read_text())
    verdicts = {row["op"]: row["verdict"] for row in made["rows"]}
    assert [op for op, verdict in verdicts.items() if verdict != "right"] == ["guided_step"]
    assert {row["milliseconds"] for row in made["rows"]} == {2.0}
    assert made["rows"][0]["share_of_ceiling"] == pytest.approx(1e3 * 2**20 / 4e12 / 2)
    assert made["running"]["guided_step"] == "torch"


def test_without_a_gpu_or_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "HAS_TRITON", False)
    assert check.main([]) == 2
    assert [line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines()] == [
        "PyTorch sees no NVIDIA GPU here; python -m ddt_kernels.aot compiles every kernel without one",
        "there is no triton to check",
    ]
