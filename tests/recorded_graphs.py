"""CUDA graphs, played on a CPU: what a step launches is recorded once, with the tensors it was launched on, and
replayed on those very tensors. As in a real graph the host is not asked again: what a step took from Python at
recording (a number, a choice, another tensor) stays as it was, and reading a tensor on the host is refused."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HOST_READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")


class RecordedGraph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().split("::")[1].split(".")[0]
        assert name not in _HOST_READS, f"a step reads {name} on the host"
        before = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        outputs = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and id(leaf) not in before]
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        fresh = [tensor.untyped_storage().data_ptr() not in inputs for tensor in made]
        # Views stay views of what they were taken of; only new memory has to be filled again.
        if not made or any(fresh) or function._schema.is_mutable:
            self.calls.append((function, args, kwargs, outputs))
        return outputs

    def replay(self) -> None:
        for function, args, kwargs, outputs in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if _is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


@contextlib.contextmanager
def _record(graph: RecordedGraph, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
    kept = [buffer.clone() for buffer in _buffers]
    with graph:
        yield
    # Capturing runs nothing: what the recording run changed is put back.
    for buffer, value in zip(_buffers, kept, strict=True):
        buffer.copy_(value)


_buffers: list[torch.Tensor] = []


class _Stream:
    def wait_stream(self, other: object) -> None: ...


def play_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Replaces torch.cuda's graphs by recorded ones. Add to the list returned what a recording must not change."""
    _buffers.clear()
    stand_ins = {
        "CUDAGraph": RecordedGraph,
        "graph": _record,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": lambda stream: None,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "graph_pool_handle": object,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return _buffers
