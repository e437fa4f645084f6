"""How many CPU threads the commands compute with, and how these wait for each other."""

import os
import subprocess
import sys

import pytest
import torch

from ddt_fast.presets import PRESETS
from ddt_fast.threads import threads_for

SMALL, LARGE = PRESETS["digits"].model, PRESETS["b2_256"].model


@pytest.fixture
def eight_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("model", "threads", "line"),
    [
        (SMALL, 4, "CPU: 4 threads for a small model; OMP_NUM_THREADS changes that\n"),
        (LARGE, 8, "CPU: 8 threads; OMP_NUM_THREADS changes that\n"),
        (None, 8, "CPU: 8 threads; OMP_NUM_THREADS changes that\n"),
    ],
    ids=["small", "large", "none"],
)
def test_the_model_decides_and_the_callers_setting_comes_back(eight_threads, capsys, model, threads, line):
    with threads_for(model, "cpu"):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 8
    assert capsys.readouterr().out == line


def test_omp_num_threads_decides_if_it_is_set(eight_threads, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    with threads_for(SMALL, "cpu"):
        assert torch.get_num_threads() == 8
    assert capsys.readouterr().out == "CPU: 8 threads, from OMP_NUM_THREADS\n"


def test_fewer_threads_than_a_small_model_may_have_stay(eight_threads, capsys):
    torch.set_num_threads(1)
    with threads_for(SMALL, "cpu"):
        assert torch.get_num_threads() == 1
    assert capsys.readouterr().out == "CPU: 1 thread for a small model; OMP_NUM_THREADS changes that\n"


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, used):
    code = "import os, sys; from ddt_fast.command import run_command\n"
    code += "run_command(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == f"{used} False\n"
