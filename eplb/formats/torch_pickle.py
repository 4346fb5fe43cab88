"""What torch.save writes, read without torch: a zip archive with a pickle that names tensors in it.

The pickle is not executed: its instructions are interpreted here, and the only things that they can make are
numbers, text, lists, dicts and tensors. Anything else is refused by name.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_STORAGES = {
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
}


class _Storage:
    def __init__(self, kind: str) -> None:
        self.kind = kind


def is_torch(members: Mapping[str, bytes]) -> bool:
    """Whether the archive is torch.save's."""
    return any(name.endswith("/data.pkl") or name == "data.pkl" for name in members)


def parse_torch(members: Mapping[str, bytes]) -> Any:
    """The saved object with numpy arrays for tensors; ValueError for anything but plain data."""
    name = next(name for name in members if name.endswith("data.pkl"))
    prefix = name.removesuffix("data.pkl")
    if members.get(f"{prefix}byteorder", b"little").strip() != b"little":
        raise ValueError("the tensors are big-endian, which is not read")
    try:
        return _Reader(members[name], prefix, members).load()
    except ValueError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"refused: {error}") from None
    except Exception as error:  # a broken pickle raises whatever it likes
        raise ValueError(
            f"broken pickle: {type(error).__name__} {' '.join(str(error).split())[:100]}"
        ) from None


class _Reader(pickle.Unpickler):
    """An unpickler whose only globals are the rebuilders below: no code of the file's choosing can run."""

    def __init__(self, data: bytes, prefix: str, members: Mapping[str, bytes]) -> None:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEXT_BUFFER"):
                raise ValueError(f"refused: the pickle holds {opcode.name} {argument!r}")
        super().__init__(io.BytesIO(data))
        self._prefix, self._members = prefix, members

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _Storage(_STORAGES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(
            f"the pickle calls {module}.{name}, only tensors and plain data are read"
        )

    def persistent_load(self, pid: Any) -> npt.NDArray[Any]:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise ValueError("the pickle names something that is no tensor storage")
        data = self._members.get(f"{self._prefix}data/{key}")
        if data is None:
            raise ValueError(f"the archive lacks data/{key}")
        size = np.dtype(storage.kind).itemsize
        if not isinstance(count, int) or count < 0 or count * size > len(data):
            raise ValueError(f"data/{key} claims {count} numbers of {size} bytes, it has {len(data)} bytes")
        return np.frombuffer(data, storage.kind, count)


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> npt.NDArray[Any]:
    whole = isinstance(storage, np.ndarray) and all(
        isinstance(x, int) and x >= 0 for x in (offset, *shape, *stride)
    )
    if not whole or len(shape) != len(stride):
        raise ValueError("a tensor's shape is broken")
    if math.prod(shape) == 0:
        return np.empty(shape, storage.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if last >= len(storage) or math.prod(shape) > len(storage):
        raise ValueError(f"a tensor claims shape {tuple(shape)}, its storage has {len(storage)} numbers")
    size = storage.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, [s * size for s in stride])
    tensor: npt.NDArray[Any] = view.copy()
    return tensor
