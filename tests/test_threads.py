"""How many CPU threads the commands compute with, and how these wait for each other."""

import os
import subprocess
import sys

import pytest
import torch

from ddt_fast.presets import PRESETS
from ddt_fast.threads import threads_for

SMALL, LARGE = PRESETS["digits"].model, PRESETS["b2_256"].model


@pytest.mark.parametrize(
    ("before", "omp", "model", "threads", "line"),
    [
        (8, None, SMALL, 4, "CPU: 4 threads for a small model; OMP_NUM_THREADS changes that"),
        (8, None, LARGE, 8, "CPU: 8 threads; OMP_NUM_THREADS changes that"),
        (8, None, None, 8, "CPU: 8 threads; OMP_NUM_THREADS changes that"),
        (8, "8", SMALL, 8, "CPU: 8 threads, from OMP_NUM_THREADS"),
        (1, None, SMALL, 1, "CPU: 1 thread for a small model; OMP_NUM_THREADS changes that"),
    ],
    ids=["small", "large", "none", "from the environment", "fewer than a small model may have"],
)
def test_the_model_decides_and_the_callers_setting_comes_back(monkeypatch, capsys, before, omp, model, threads, line):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    found = torch.get_num_threads()
    try:
        torch.set_num_threads(before)
        with threads_for(model, "cpu"):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(found)
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, used):
    code = "import os, sys; from ddt_fast.command import run_command\n"
    code += "run_command(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == f"{used} False\n"
