"""Numpy files from strangers: no pickles, and nothing larger than the file says it holds."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.eplb.formats.files import MAX_BYTES

NPY = b"\x93NUMPY"
ZIP = b"PK\x03\x04"


def parse_npy(data: bytes) -> npt.NDArray[Any]:
    """The array of a .npy file. ValueError for pickled objects, and for a shape that the bytes do not fill."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"version {version} of the format")
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        raise ValueError(f"broken .npy: {_line(error)}") from None
    if dtype.hasobject:
        raise ValueError("the array holds pickled objects, which are not read")
    count = 1
    for size in shape:
        count *= size
    left = len(data) - file.tell()
    if count < 0 or count * dtype.itemsize != left:
        raise ValueError(
            f"the array claims shape {shape} of {dtype}, {count * dtype.itemsize} bytes, but has {left}"
        )
    flat = np.frombuffer(data, dtype, count, file.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def zip_members(data: bytes) -> dict[str, bytes]:
    """The files in a zip archive by name; ValueError when it is broken or unpacks to too much."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if len(infos) > 10_000 or sum(info.file_size for info in infos) > MAX_BYTES:
                raise ValueError(f"unpacks to more than {MAX_BYTES >> 30} GiB")
            found = {}
            for info in infos:
                with archive.open(info) as member:
                    content = member.read(info.file_size + 1)
                if len(content) != info.file_size:
                    raise ValueError(f"{info.filename} is not as long as it says")
                found[info.filename] = content
            return found
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"broken zip archive: {_line(error)}") from None
    except Exception as error:  # zlib.error and what broken headers make of struct and codecs
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"broken zip archive: {_line(error)}") from None


def npz_arrays(members: Mapping[str, bytes]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz by name."""
    arrays = {}
    for name, content in members.items():
        key = name.removesuffix(".npy")
        try:
            arrays[key] = parse_npy(content)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return arrays


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
