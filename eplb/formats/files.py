"""Reading and writing files so that people's mistakes become one line, and no reader sees half a file."""

from __future__ import annotations

import gzip
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MAX_BYTES = 4 << 30
"""Larger files, or files that unpack to more, are refused: no trace of expert loads is near it."""


def read_bytes(path: Path) -> bytes:
    """The file's bytes, unpacked if they are gzip. ValueError when it is missing, a folder or too large."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES >> 30} GiB")
            data = file.read()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        import io

        with gzip.open(io.BytesIO(data)) as packed:
            data = packed.read(MAX_BYTES + 1)
    except (OSError, EOFError) as error:
        raise ValueError(f"broken gzip: {error}") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"unpacks to more than {MAX_BYTES >> 30} GiB")
    return data


def parse_json(data: bytes) -> Any:
    """ValueError with line and column on broken JSON; NaN and Infinity are refused, as JSON does, with their place."""
    constants: list[str] = []

    def constant(name: str) -> float:
        constants.append(name)
        return math.nan

    try:
        document = json.loads(data, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deep") from None
    if constants:
        raise ValueError(f"{_place_of_nan(document)} is {constants[0]}, expected a finite number")
    return document


def _place_of_nan(document: Any) -> str:
    """Of the first one in the text, as windows[3].load[7][2]."""
    left = [("", document)]
    while left:
        place, value = left.pop()
        if isinstance(value, float) and math.isnan(value):
            return place or "the file"
        inner: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            inner = [(f"{place}.{key}" if place else str(key), item) for key, item in value.items()]
        elif isinstance(value, list):
            inner = [(f"{place}[{i}]", item) for i, item in enumerate(value)]
        left += reversed(inner)
    return "a key that is given twice"


def write_text(path: Path, text: str) -> None:
    """Write next to the target and rename: a reader sees the old file or the whole new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ValueError(f"{path}: cannot write: {error.strerror or error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def whole_number(value: Any, name: str, low: int, high: int = 1 << 40) -> int:
    """value as an int within [low, high], else ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {_short(value)}, expected a whole number from {low} to {high}")
    return value


def optional(value: Any, name: str, low: int) -> int | None:
    return None if value is None else whole_number(value, name, low)


def whole_numbers(value: Any, name: str, low: int = 0) -> list[int]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_short(value)}, expected a list of whole numbers")
    return [whole_number(item, f"{name}[{i}]", low) for i, item in enumerate(value)]


def mapping(value: Any, name: str = "the file") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_short(value)}, expected an object")
    return value


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else text[:37] + "..."


def named(path: Path | str, read: Callable[[], T]) -> T:
    """read() with the file's name, or a place in it, put before the message of a ValueError."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
