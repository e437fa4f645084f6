"""Kernels are compared with PyTorch in a process of their own; whatever they do there, the verdict names it."""

import json
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch

import failing_launchers
from benchmarks.host_time import calls
from ddt_kernels import launcher, norm_launch, runtime, verification
from ddt_kernels.compilation import launching_into
from ddt_kernels.store import Store
from ddt_kernels.verification import Verdict, Worker, mode, specification
from kernel_testing import BF16, COMPILES, FP32, seeded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def worker():
    worker = Worker(seconds=60)
    yield worker
    worker.close()


def verdict_on(worker, name):
    return worker.check(specification(getattr(failing_launchers, name), (torch.zeros(3, 5),), {}), CPU)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wrong", "result 0 is off by "),
        ("unwritten", "result 0 is off by inf times what is allowed"),
        ("raises", "RuntimeError: PTXAS error"),
        ("crashes", "the process that checked it ended (SIGSEGV): out of registers"),
    ],
)
def test_whatever_a_kernel_does_the_verdict_names_it_and_the_next_is_checked(worker, name, reason):
    assert verdict_on(worker, name).reason.startswith(reason)
    right = verdict_on(worker, "right")
    assert right.reason == ""
    assert 0 <= right.share <= 1


def test_an_idle_process_ends_a_new_one_takes_its_place_and_a_kernel_that_never_ends_is_given_up():
    code = "from ddt_kernels import verification; verification.IDLE_SECONDS = 0.2; verification._main()"
    idle = Worker((sys.executable, "-c", code))
    assert verdict_on(idle, "right").reason == ""
    assert idle._process.wait(10) == 0
    assert verdict_on(idle, "right").reason == ""
    idle.seconds = 1.0
    assert verdict_on(idle, "hangs").reason.startswith("the process that checked it did not end within 1 s (SIGKILL)")


def test_a_tensor_off_the_16_byte_grid_is_so_in_the_check():
    storage = torch.zeros(2 * 3 * 72 + 1, dtype=BF16)
    specs = [
        specification(failing_launchers.right, (storage[offset:][: 2 * 216].view(2, 3, 72),), {}) for offset in (0, 1)
    ]
    offsets = [verification.arguments(spec, CPU)["x"].data_ptr() % 16 // 2 for spec in specs]
    base = storage.data_ptr() % 16 // 2
    assert offsets == [base, base + 1]
    assert verification.key_of(specs[0]) != verification.key_of(specs[1])


def test_memory_that_ran_out_says_nothing_about_a_kernel(worker):
    found = verdict_on(worker, "runs_out_of_memory")
    assert not found.lasting
    assert "OutOfMemoryError" in found.reason


def test_what_does_not_fit_beside_others_is_verified_alone(monkeypatch, tmp_path):
    alive, asked = set(), []

    class Fake:
        def check(self, spec, device):
            alive.add(self)
            asked.append((spec["op"], len(alive)))
            if spec["op"] == "large" and len(alive) > 1:
                return Verdict("OutOfMemoryError: of 10 GiB", lasting=False)
            return Verdict(share=0.5)

        def close(self):
            alive.discard(self)

    known = Store(tmp_path, {"gpu": "stand-in"})
    monkeypatch.setattr(verification, "Worker", Fake)
    monkeypatch.setattr(verification, "store", lambda device: known)
    specs = [{"op": op, "args": {}, "compiled": False} for op in ("a", "large", "b", "a")]
    found = verification.verify_all(specs, CPU, 2)
    assert {key.strip(): verdict.reason for key, verdict in found.items()} == {"a": "", "large": "", "b": ""}
    assert [op for op, _ in asked].count("a") == 1
    assert {key.strip() for key in known._known} == {"a", "large", "b"}


def test_every_candidate_is_checked_and_those_that_fail_are_named(worker):
    found = verdict_on(worker, "has_candidates")
    assert found.reason == ""
    assert {name: reason[:18] for name, reason in found.candidates.items()} == {
        "2": "result 0 is off by",
        "3": "RuntimeError: no r",
    }
    assert verdict_on(worker, "has_wrong_candidates").reason.startswith("result 0 is off by ")


def test_other_modes_are_refused(monkeypatch):
    monkeypatch.setenv("DDT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="DDT_KERNELS is 'cuda'; expected auto, triton or torch"):
        mode()


def test_a_check_has_few_samples_of_every_argument_that_has_them():
    x = torch.empty(1000, 256, 72, dtype=BF16, device="meta")
    shift, scale = torch.empty(2, 1000, 1, 3 * 72, dtype=BF16, device="meta").chunk(3, -1)[:2]
    args = (x, None, None, x[0, 0], shift, scale, 1e-6, "rms", False)
    spec = specification(norm_launch.launch_forward, args, {})
    assert spec["function"] == "ddt_kernels.norm_launch:launch_forward"
    shapes = {name: arg["shape"] for name, arg in spec["args"].items() if isinstance(arg, dict)}
    assert shapes == {"x": [257, 256, 72], "weight": [72], "shift": [2, 257, 1, 72], "scale": [2, 257, 1, 72]}
    assert spec["args"]["shift"]["strides"] == [216_000, 216, 216, 1]
    assert json.loads(json.dumps(spec)) == spec


def test_the_number_of_samples_counts_only_as_a_power_of_two_or_none():
    def samples(batch):
        x = torch.empty(batch, 300, 72, device="meta")
        args = (x, None, None, None, x[:, :1], x[:, :1], 1e-6, "layer", False)
        return specification(norm_launch.launch_forward, args, {})["args"]["x"]["shape"][0]

    assert [samples(batch) for batch in (1, 2, 3, 4, 7, 255, 256, 300, 5000)] == [1, 2, 3, 4, 5, 129, 256, 257, 257]


def test_a_tensor_given_twice_is_one_tensor_in_the_check():
    x = torch.zeros(2, 4)
    spec = specification(failing_launchers.in_place, (x, x), {})
    assert spec["args"]["out"] == {"same": "x"}
    made = verification.arguments(spec, CPU)
    assert made["x"] is made["out"]
    assert verification.check(spec, CPU).reason == ""


INFINITE, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("actual", "plain", "exact", "wrong"),
    [
        ((1.0, 2.0), (1.0, 2.0), (1.0, 2.0), False),
        ((1.0, 2.02), (1.0, 2.01), (1.0, 2.0), False),
        ((1.0, 2.05), (1.0, 2.01), (1.0, 2.0), True),
        ((1.0, NAN), (1.0, 2.0), (1.0, 2.0), True),
        ((1.0, INFINITE), (1.0, 2.0), (1.0, 2.0), True),
        ((1.0, INFINITE), (1.0, INFINITE), (1.0, 1e5), False),  # fp16 overflows, and the rest is as exact as ever
        ((1.1, INFINITE), (1.0, INFINITE), (1.0, 1e5), True),
        ((INFINITE,), (INFINITE,), (1e5,), False),
    ],
)
def test_twice_the_error_of_plain_pytorch_is_allowed(actual, plain, exact, wrong):
    share = verification.share_of_allowed(*(torch.tensor(values) for values in (actual, plain, exact)))
    assert (share > 1) == wrong


@pytest.fixture
def met(monkeypatch):
    """The specification of every launcher's call in `benchmarks.host_time`, none of whose kernels may run."""
    met = []

    def verdict(op, args, kwargs, device, compiled):
        met.append(specification(op, args, kwargs))
        return Verdict("not here")

    class NoStore:
        alone = staticmethod(nullcontext)

    monkeypatch.setattr(runtime, "is_gpu", lambda device: True)
    monkeypatch.setattr(launcher, "store", lambda device: NoStore)
    monkeypatch.setattr(verification, "verdict", verdict)
    with launching_into(lambda binary: None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for make, call in calls(16, heads=2, width=48).values():
            call(*make(seeded(0, FP32)))
    return met


@COMPILES
def test_interpreted_kernels_agree_with_their_plain_versions(monkeypatch, met):
    """As on a GPU, where a kernel may not run its plain version does; the worker interprets the kernels."""
    assert len({spec["function"] for spec in met}) == 8
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    worker = Worker()
    for spec in met:
        found = worker.check(spec, CPU)
        assert (found.reason, found.candidates) == ("", {}), spec["function"]
    worker.close()
