"""What was found out about a GPU is found out once by many processes, and survives kills, damage and full disks."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from ddt_kernels import store
from ddt_kernels.store import Store

ENVIRONMENT = {"gpu": "NVIDIA X", "driver": "1.0"}


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
        found = [known.find(key, lambda value=value: value) for key, value in (("a", 1), ("b", 2), ("a", 3))]
    assert found == [1, 2, 1]
    assert len(warned) == 1


def test_one_thing_is_found_out_within_another_but_not_by_two_threads(tmp_path):
    known, seen = Store(tmp_path, ENVIRONMENT), []

    def find_inner():
        seen.append("begins")
        time.sleep(0.05)
        inner = known.find("inner", lambda: 1)
        seen.append("ends")
        return inner + 1

    threads = [threading.Thread(target=known.find, args=(key, find_inner)) for key in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == ["begins", "ends"] * 2
    assert json.loads(known.path.read_text())["found"] == {"inner": 1, "a": 2, "b": 2}


def test_it_says_once_what_is_found_out_and_where_it_is_kept(tmp_path, capsys):
    for key in ("a", "b"):
        Store(tmp_path, ENVIRONMENT).find(key, lambda: 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddt_kernels: verifying and timing kernels on NVIDIA X, once, at the first use of each")
    assert str(tmp_path) in line


def test_any_gpu_has_an_environment(monkeypatch, tmp_path):
    """Also one without a readable driver version, of a name no one has thought of."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX PRO 9999 Ti (Ünknown/Édition)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (13, 7))
    found = store.environment(torch.device("cuda", 0))
    assert {"gpu", "capability", "driver", "torch", "triton", "ddt_kernels"} == found.keys()
    assert found["capability"] == "13.7"
    path = Store(tmp_path, found).path
    assert find_slowly(tmp_path, "a") == {"verdict": "a"}
    assert path.parent == tmp_path
    assert path.name.startswith("nvidia-rtx-pro-9999-ti-")
    monkeypatch.setattr(store, "VARIABLE", "DDT_KERNELS_NOT_SET")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.folder() == tmp_path / "ddt_kernels"


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    known = Store(tmp_path, ENVIRONMENT)
    context = multiprocessing.get_context("fork")
    with known.alone():
        child = context.Process(target=time.sleep, args=(5,))
        child.start()
    with context.Pool(1) as pool:
        assert pool.apply_async(find_slowly, (tmp_path, "a")).get(timeout=3) == {"verdict": "a"}
    child.kill()
    child.join()
