"""What cannot run here is one visible skip per GPU test and per interpreter file; where it can, every case runs."""

from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]
GPU_TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("x", range(4))
@pytest.mark.parametrize("y", range(3))
def test_twelve(x, y): pass

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_either(device): pass
"""
INTERPRETER_TESTS = """
import pytest

@pytest.mark.parametrize("x", range(5))
def test_interpreted(x): pass

def test_another(): pass
"""
GPU, INTERPRETER = "needs a CUDA device", "needs TRITON_INTERPRET=1, in a process of its own"


@pytest.mark.parametrize(
    ("arguments", "cuda", "interpreting", "outcomes", "reasons"),
    [
        ([], False, False, {"passed": 1, "skipped": 3}, [f"{INTERPRETER} (6 cases)", GPU, f"{GPU} (12 cases)"]),
        (["-k", "test_twelve and 2-"], False, False, {"skipped": 1, "deselected": 16}, [f"{GPU} (4 cases)"]),
        ([], True, False, {"passed": 14, "skipped": 1}, [f"{INTERPRETER} (6 cases)"]),
        ([], False, True, {"passed": 7, "skipped": 2}, [GPU, f"{GPU} (12 cases)"]),
        ([], True, True, {"passed": 20}, []),
    ],
)
def test_one_skip_stands_for_all_cases(pytester, monkeypatch, arguments, cuda, interpreting, outcomes, reasons):
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers = gpu")
    pytester.makepyfile(**{"test_on_gpu": GPU_TESTS, "kernels/interpreter/test_kernels": INTERPRETER_TESTS})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreting else "0")
    result = pytester.runpytest("-ra", *arguments)
    assert result.parseoutcomes() == outcomes
    skips = [line.split(": ", 1)[1] for line in result.outlines if line.startswith("SKIPPED")]
    assert sorted(skips) == reasons
