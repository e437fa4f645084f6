"""Reading a checkpoint's state/ without running code in it: the metadata of torch.distributed.checkpoint is a pickle,
and a checkpoint may come from anyone."""

import pathlib
import pickle
from enum import Enum, EnumType
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from ddt_fast.wording import kind_of


def _member(kind: type[Enum], name: str) -> Enum:
    """What `getattr` stands for in a metadata file: Python 3.11.0 to 3.11.3 pickles an enum's member through it."""
    if not isinstance(kind, EnumType):
        raise pickle.UnpicklingError("its metadata names builtins.getattr, which was not executed")
    return kind[name]


_MADE = {
    ("builtins", "getattr"): _member,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    # Paths from any machine and any Python (3.13 names pathlib._local) become this one's.
    **{
        (module, kind): pathlib.PurePath
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "WindowsPath")
    },
}


class StateReader(dcp.FileSystemReader):
    """Reads a state/ folder of tensors. pickle.UnpicklingError if the metadata names anything but the places of
    tensors, or has an entry that is not a tensor, which torch would unpickle; any error if its bytes are damaged."""

    def read_metadata(self) -> metadata.Metadata:
        """The tensors' sizes and places."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, metadata.Metadata):
            raise pickle.UnpicklingError(f"its metadata is {kind_of(found)}")
        for name, entry in found.state_dict_metadata.items():
            if not isinstance(entry, metadata.TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is not a tensor, and was not opened")
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _MADE:
            return _MADE[module, name]
        if module == metadata.__name__:
            # Only what that module defines, not what it imports.
            kind = vars(metadata).get(name)
            if isinstance(kind, type) and kind.__module__ == module:
                return kind
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which was not executed")
