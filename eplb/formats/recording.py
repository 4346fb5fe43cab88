"""The folder that `moeserve serve --record-stats` keeps: files of expert load in the order of their names, the last
one perhaps still growing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from moeserve.eplb.load import ExpertLoad

_PREFIX = "expert-load-"


def is_recording(folder: Path) -> bool:
    return any(folder.glob(f"{_PREFIX}*"))


def complete(data: bytes) -> bytes:
    """A growing file's bytes with the end that they lack; what is half written is left out."""
    head = data[: data.find(b"\n") + 1]
    if head.startswith(b'{"format"') and head.endswith(b'"windows": [\n') and not data.endswith(b"\n]}\n"):
        return data[: data.rfind(b"\n") + 1] + b"]}\n"
    return data


def read_folder(folder: Path, read: Callable[[Path], ExpertLoad]) -> ExpertLoad:
    """All windows, and of the rest what the newest file says. ValueError where the files do not fit together."""
    for _ in range(3):  # a file that is packed meanwhile has another name
        files = {file.name.split(".")[0]: file for file in sorted(folder.glob(f"{_PREFIX}*"), reverse=True)}
        paths = sorted(files.values())
        growing = [path for path in paths if path.suffix == ".part" and path.exists()]
        empty = {path for path in growing if path.read_bytes().count(b"\n") < 2}
        try:
            return _joined([(path, _named(path, read)) for path in paths if path not in empty])
        except ValueError:
            if all(path.exists() for path in paths):
                raise
    raise ValueError("the files change faster than they can be read")


def _named(path: Path, read: Callable[[Path], ExpertLoad]) -> ExpertLoad:
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _joined(parts: list[tuple[Path, ExpertLoad]]) -> ExpertLoad:
    if not parts:
        raise ValueError("nothing was recorded yet")
    _, newest = parts[-1]
    for path, part in parts:
        if (part.layers, part.num_experts, part.model) != (newest.layers, newest.num_experts, newest.model):
            raise ValueError(
                f"{path.name} is of another model than the newest file: give the files one by one"
            )
    load = np.concatenate([part.load for _, part in parts])
    return replace(newest, load=load, windows=tuple(w for _, part in parts for w in part.windows))
