"""Integer tensors of a .safetensors file, without its library: eight bytes of length, a JSON header, the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.eplb.formats.files import mapping, parse_json, whole_numbers

_TYPES = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "F64": "<f8", "F32": "<f4"}


def parse_safetensors(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The tensors by name; ValueError where the header does not fit the data."""
    if len(data) < 8:
        raise ValueError("broken safetensors: shorter than its header")
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise ValueError(
            f"broken safetensors: the header claims {length} bytes, the file has {len(data) - 8}"
        )
    header = mapping(parse_json(data[8 : 8 + length]), "the header")
    body = data[8 + length :]
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        about = mapping(about, name)
        kind = _TYPES.get(str(about.get("dtype")))
        if kind is None:
            raise ValueError(f"{name} has dtype {about.get('dtype')!r}, expected whole numbers or floats")
        shape = whole_numbers(about.get("shape"), f"{name}.shape")
        offsets = whole_numbers(about.get("data_offsets"), f"{name}.data_offsets")
        size = math.prod(shape) * np.dtype(kind).itemsize
        if len(offsets) != 2 or offsets[1] - offsets[0] != size or offsets[1] > len(body):
            raise ValueError(
                f"{name} claims shape {shape}, which does not fit its place {offsets} of {len(body)} bytes"
            )
        tensors[name] = np.frombuffer(body[offsets[0] : offsets[1]], kind).reshape(shape)
    return tensors
