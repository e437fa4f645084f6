"""Independent implementations of the metrics, where they are installed; tests that need one skip visibly without it.

They import torchvision, though what is used of them does not need it; a stand-in is put in its place where it is missing,
since torchvision's wheels do not load beside a CPU build of torch.
"""

import importlib
import sys
import types

import pytest

_STAND_INS = ("torchvision", *(f"torchvision.{name}" for name in ("datasets", "models", "transforms")))


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def independent(monkeypatch: pytest.MonkeyPatch, name: str) -> types.ModuleType:
    """Import the module `name` of a package that may be missing; what it imported is forgotten after the test."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: python -m pip install --no-deps {package.replace('_', '-')}")
    if importlib.util.find_spec("torchvision") is None:
        for stand_in in (*_STAND_INS, "torchvision.transforms.functional"):
            module = _StandIn(stand_in)
            monkeypatch.setitem(sys.modules, stand_in, module)
            parent, _, child = stand_in.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    for loaded in [other for other in sys.modules if other.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    found = importlib.import_module(name)
    for loaded in [other for other in sys.modules if other.partition(".")[0] == package]:
        # setitem and undo: a module that saw the stand-in must not outlive it.
        module = sys.modules.pop(loaded)
        monkeypatch.setitem(sys.modules, loaded, module)
    return found
