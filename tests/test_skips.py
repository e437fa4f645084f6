"""What cannot run here is one visible skip per GPU test and per interpreter file; where it can, every case runs."""

from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]
CONFTEST = Path(__file__).with_name("conftest.py")
GPU_TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("x", range(4))
@pytest.mark.parametrize("y", range(3))
def test_twelve(x, y): pass

@pytest.mark.gpu
def test_one(): pass

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_either(device): pass
"""
INTERPRETER_TESTS = """
import pytest

@pytest.mark.parametrize("x", range(5))
def test_interpreted(x): pass

def test_another(): pass
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs pytest on the tiny files with tests/conftest.py; returns (outcomes, the summary's skips)."""
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers = gpu")
    pytester.makepyfile(test_on_gpu=GPU_TESTS)
    folder = pytester.path / "kernels" / "interpreter"
    folder.mkdir(parents=True)
    (folder / "test_kernels.py").write_text(INTERPRETER_TESTS, encoding="utf-8")

    def run_pytest(*arguments, cuda=False, interpreting=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreting else "0")
        result = pytester.runpytest("-ra", *arguments)
        return result.parseoutcomes(), [line for line in result.outlines if line.startswith("SKIPPED")]

    return run_pytest


def test_one_skip_stands_for_all_cases(run):
    outcomes, skips = run()
    assert outcomes == {"passed": 1, "skipped": 4}
    reasons = sorted(line.split(": ", 1)[1] for line in skips)
    assert reasons == [
        "needs TRITON_INTERPRET=1, in a process of its own (6 cases)",
        "needs a CUDA device",
        "needs a CUDA device",
        "needs a CUDA device (12 cases)",
    ]


def test_only_selected_cases_count(run):
    outcomes, skips = run("-k", "test_twelve and 2-")
    assert outcomes == {"skipped": 1, "deselected": 17}
    assert skips[0].endswith("(4 cases)")


def test_where_they_can_run_every_case_runs(run):
    assert run(cuda=True)[0] == {"passed": 15, "skipped": 1}
    assert run(interpreting=True)[0] == {"passed": 7, "skipped": 3}
    assert run(cuda=True, interpreting=True)[0] == {"passed": 21}
