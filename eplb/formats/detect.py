"""Reads a file of expert load or a placement by what is in it, whichever engine wrote it."""

from __future__ import annotations

from pathlib import Path

from moeserve.eplb.formats import stats
from moeserve.eplb.formats.arrays import ZIP, npz_arrays, zip_members
from moeserve.eplb.formats.files import mapping, named, parse_json, read_bytes
from moeserve.eplb.load import ExpertLoad


def read_load(path: str | Path) -> ExpertLoad:
    """The expert load in a file or folder; ValueError "FILE: what is wrong" in one line."""
    path = Path(path)
    return named(path, lambda: _read(path))


def _read(path: Path) -> ExpertLoad:
    data = read_bytes(path)
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(ZIP):
        return stats.parse_stats_npz(npz_arrays(zip_members(data)))
    document = mapping(parse_json(data))
    return stats.parse_stats(document)
