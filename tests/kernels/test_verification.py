"""Kernels are compared with PyTorch in a process of their own, once for all processes; what fails is replaced."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch

import failing_launchers
from benchmarks.host_time import calls
from ddt_kernels import norm_launch, verification
from ddt_kernels.compilation import launching_into
from ddt_kernels.store import Store
from ddt_kernels.verification import VERIFIED, Worker, mode, specification
from kernel_testing import BF16, COMPILES, FP32, seeded

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
    assert verdict_on(worker, "right") == {"verdict": VERIFIED}
    worker.seconds = 1.0
    assert verdict_on(worker, "hangs")["reason"].startswith(
        "the process that checked it did not end within 1 s (SIGKILL)"
    )
    worker.seconds = 60.0
    assert verdict_on(worker, "right") == {"verdict": VERIFIED}


def find_slowly(folder, key):
    def find_out():
        with (folder / "asked").open("a") as asked:
            asked.write(f"{key}\n")
        time.sleep(0.05)
        return {"verdict": key}

    return Store(folder, ENVIRONMENT).find(key, find_out)


def test_of_many_processes_one_finds_out_and_the_others_read_it(tmp_path):
    keys = [f"key {index}" for index in (0, 1, 2, 0, 1, 2, 0, 1)]
    with multiprocessing.get_context("fork").Pool(8) as pool:
        found = pool.starmap(find_slowly, [(tmp_path, key) for key in keys])
    assert found == [{"verdict": key} for key in keys]
    assert sorted((tmp_path / "asked").read_text().splitlines()) == ["key 0", "key 1", "key 2"]


def test_kills_while_writing_leave_a_file_that_can_be_read(tmp_path):
    def fill():
        known = Store(tmp_path, ENVIRONMENT)
        for index in range(10_000):
            known.find(f"{os.getpid()} {index}", lambda: "x" * 1000)

    for pause in (0.05, 0.1, 0.2):
        process = multiprocessing.get_context("fork").Process(target=fill)
        process.start()
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        path = Store(tmp_path, ENVIRONMENT).path
        assert not path.exists() or json.loads(path.read_text())["found"]
    assert find_slowly(tmp_path, "after") == {"verdict": "after"}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 0}', '{"format": 1, "environment": {}, "found": {}}'])
def test_a_damaged_or_foreign_file_is_made_anew(tmp_path, damage):
    find_slowly(tmp_path, "a")
    known = Store(tmp_path, ENVIRONMENT)
    known.path.write_text(damage)
    assert find_slowly(tmp_path, "b") == {"verdict": "b"}
    assert json.loads(known.path.read_text())["found"] == {"b": {"verdict": "b"}}


def test_other_environments_have_other_files(tmp_path):
    names = {Store(tmp_path, ENVIRONMENT | {"driver": driver}).path.name for driver in ("1.0", "2.0")}
    assert len(names) == 2
    assert all(name.startswith("nvidia-x-") for name in names)


def test_where_nothing_can_be_written_findings_last_as_long_as_the_process(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    known = Store(file / "folder", ENVIRONMENT)
    with pytest.warns(UserWarning, match="cannot be written .* set DDT_KERNELS_CACHE to another folder") as warned:
        assert known.find("a", lambda: 1) == 1
        assert known.find("b", lambda: 2) == 2
    assert len(warned) == 1
    assert known.find("a", lambda: 3) == 1


def test_other_modes_are_refused(monkeypatch):
    monkeypatch.setenv("DDT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="DDT_KERNELS is 'cuda'; expected auto, triton or torch"):
        mode()


def test_a_check_has_few_samples_of_every_argument_that_has_them():
    x = torch.empty(1000, 256, 72, dtype=BF16, device="meta")
    shift, scale = torch.empty(2, 1000, 1, 3 * 72, dtype=BF16, device="meta").chunk(3, -1)[:2]
    args = (x, None, None, x[0, 0], shift, scale, 1e-6, "rms", False)
    spec = specification(norm_launch.launch_forward, args, {})
    assert spec["launcher"] == "ddt_kernels.norm_launch:launch_forward"
    shapes = {name: arg["shape"] for name, arg in spec["args"].items() if isinstance(arg, dict)}
    assert shapes == {"x": [32, 256, 72], "weight": [72], "shift": [2, 32, 1, 72], "scale": [2, 32, 1, 72]}
    assert spec["args"]["shift"]["strides"] == [216_000, 216, 216, 1]
    assert json.loads(json.dumps(spec)) == spec


@pytest.fixture
def met(monkeypatch):
    """(launcher, arguments) of the calls in `benchmarks.host_time`, none of whose kernels may run."""
    met = []

    def failure(launcher, args, kwargs, device):
        met.append((launcher, args, kwargs))
        return "not here"

    monkeypatch.setattr(verification, "failure", failure)
    with launching_into(lambda binary: None):
        for make, call in calls(16, heads=2, width=48).values():
            call(*make(seeded(0, FP32)))
    return met


@COMPILES
def test_interpreted_kernels_agree_with_their_plain_versions(monkeypatch, worker, met):
    """As on a GPU, where a kernel may not run its plain version does; the worker interprets the kernels."""
    assert len({launcher for launcher, _, _ in met}) == 8
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for launcher, args, kwargs in met:
        assert worker.check(specification(launcher, args, kwargs), CPU) == {"verdict": VERIFIED}, launcher
