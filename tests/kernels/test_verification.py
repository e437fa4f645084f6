"""Kernels are compared with PyTorch in a process of their own, once for all processes; what fails is replaced."""

import pytest
import torch

import failing_launchers
from ddt_kernels import verification
from ddt_kernels.verification import Worker, specification

ENVIRONMENT = {"gpu": "NVIDIA X", "driver": "1.0"}
CPU = torch.device("cpu")


@pytest.fixture
def worker():
    worker = Worker(seconds=60)
    yield worker
    worker.close()


def verdict_on(worker, name, **arguments):
    launcher = getattr(failing_launchers, name)
    return worker.check(specification(launcher, (torch.zeros(3, 5),), {}), CPU)


def test_whatever_a_kernel_does_the_verdict_names_it_and_the_next_is_checked(worker):
    reasons = {name: verdict_on(worker, name).get("reason", "") for name in ("right", "wrong", "unwritten", "raises")}
    assert reasons["right"] == ""
    assert reasons["wrong"].startswith("result 0 is off by 0.01")
    assert reasons["unwritten"] == "result 0 is off by inf more than it may be"
    assert reasons["raises"] == "RuntimeError: PTXAS error"
    assert verdict_on(worker, "crashes")["reason"].startswith("the process that checked it ended (SIGSEGV)")
    assert verdict_on(worker, "right") == {"verdict": verification.VERIFIED}
    worker.seconds = 1.0
    assert verdict_on(worker, "hangs")["reason"].startswith(
        "the process that checked it did not end within 1 s (SIGKILL)"
    )
    worker.seconds = 60.0
    assert verdict_on(worker, "right") == {"verdict": verification.VERIFIED}
