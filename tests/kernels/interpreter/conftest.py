"""The interpreter net: kernels run on CPU tensors, in a process of their own (such a process can compile nothing)."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # what the kernel tests share
from kernel_testing import poison_empty

COMMAND = "TRITON_INTERPRET=1 pytest tests/kernels/interpreter"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from bf16_repair import install

    install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETING:
        return
    skip = pytest.mark.skip(reason=f"needs Triton's interpreter: {COMMAND}")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)
