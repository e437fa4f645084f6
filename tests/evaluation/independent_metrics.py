"""Independent implementations of the metrics, where they are installed; tests that need one skip visibly without it.

They import torchvision, though what is used of them does not need it; a stand-in is put in its place where it is
missing, since torchvision's wheels do not load beside a CPU build of torch.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest

_STAND_INS = ("", ".datasets", ".models", ".transforms", ".transforms.functional")


def independent(name: str) -> ModuleType:
    """Import the module `name` of a package that may be missing, and forget that it was imported: what has seen a
    stand-in must not be found by others."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: python -m pip install --no-deps {package.replace('_', '-')}")
    foreign = [package]
    try:
        if importlib.util.find_spec("torchvision") is None:
            foreign.append("torchvision")
            for stand_in in (f"torchvision{part}" for part in _STAND_INS):
                sys.modules[stand_in] = MagicMock()
        return importlib.import_module(name)
    finally:
        for module in [module for module in sys.modules if module.partition(".")[0] in foreign]:
            del sys.modules[module]
