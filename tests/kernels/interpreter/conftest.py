"""The interpreter net: kernels run on CPU tensors, in a process of their own (such a process can compile nothing)."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # what the kernel tests share
from kernel_testing import poison_empty

if os.environ.get("TRITON_INTERPRET") == "1":
    import bf16_repair
    import shadow_memory

    bf16_repair.install()
    shadow_memory.install()


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)
