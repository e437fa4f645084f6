"""samples.npz, as the ADM suite reads it: written part by part, so that memory stays flat, and read in place.

Members are stored, not compressed (such images barely shrink), and have a fixed date: the same images make the same
bytes.
"""

import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddt_fast.data.image_file import Images
from ddt_fast.wording import plural

_LOCAL_HEADER = struct.Struct("<26x2H")  # the lengths of the name and of the extra field


def write_npz(
    path: Path,
    shape: tuple[int, int, int, int],
    samples: Iterable[NDArray],
    *,
    latents: bool = False,
    **arrays: NDArray,
) -> None:
    """Write images of this shape, uint8, as arr_0, or latents, float32, as LightningDiT's shards name them, from
    consecutive parts, and other arrays by name; ValueError if the parts do not make up the shape."""
    name, dtype = ("latents", np.dtype("<f4")) if latents else ("arr_0", np.dtype("|u1"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        count = 0
        # The size is not known when a member begins: without zip64 it would be limited to 4 GiB.
        with archive.open(_member(name), "w", force_zip64=True) as stream:
            # Version 1.0: ADM's reader takes nothing newer.
            np.lib.format.write_array_header_1_0(stream, {"descr": dtype.str, "fortran_order": False, "shape": shape})
            for part in samples:
                if part.dtype != dtype or part.shape[1:] != shape[1:]:
                    raise ValueError(f"samples are {part.shape[1:]} {part.dtype}; expected {shape[1:]} {dtype}")
                count += len(part)
                stream.write(np.ascontiguousarray(part).data)
        if count != shape[0]:
            raise ValueError(f"{plural(count, 'sample')}; expected {shape[0]}")
        for other, array in arrays.items():
            with archive.open(_member(other), "w") as stream:
                np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))


def open_images(path: Path) -> Images:
    """Open the images of an npz, or its latents if it has no arr_0, as an array that is read from disk when it is used.
    ValueError if the file is not an npz, is truncated, or has neither of them uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = "arr_0" if "arr_0.npy" in archive.namelist() else "latents"
            member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path} is compressed; expected an uncompressed arr_0")
        with path.open("rb") as stream:
            stream.seek(member.header_offset)
            name_length, extra_length = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
            stream.seek(name_length + extra_length, 1)
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError(f"{path} holds arr_0 in another version of the npy format; expected version 1.0")
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            return np.memmap(path, dtype=dtype, mode="r", offset=stream.tell(), shape=shape)
    except (zipfile.BadZipFile, KeyError, struct.error) as error:
        raise ValueError(f"{path} is not an npz file with an arr_0: {error}") from error
