"""Reads expert load by what is in a file, whichever engine wrote it."""

from __future__ import annotations

from pathlib import Path

from moeserve.eplb.formats import recording, routed, sglang_stats, stats, trtllm_stats, vllm
from moeserve.eplb.formats.arrays import NPY, ZIP, npz_arrays, parse_npy, zip_members
from moeserve.eplb.formats.files import mapping, named, parse_json, read_bytes
from moeserve.eplb.formats.torch_pickle import is_torch, parse_torch
from moeserve.eplb.load import ExpertLoad


def read_load(path: str | Path, raw_shape: tuple[int, int] | None = None) -> ExpertLoad:
    """The expert load in a file or folder; ValueError "FILE: what is wrong" in one line.

    raw_shape: (layers, top_k) of a dump of raw int32 expert ids, which does not say it.
    """
    path = Path(path)
    return named(path, lambda: _read(path, raw_shape))


def _read(path: Path, raw_shape: tuple[int, int] | None) -> ExpertLoad:
    if path.is_dir():
        if recording.is_recording(path):
            return recording.read_folder(path, lambda file: _read(file, None))
        return trtllm_stats.read_folder(path)
    data = read_bytes(path)
    if not data.strip():
        raise ValueError("the file is empty")
    if raw_shape is not None:
        return routed.parse_raw(data, *raw_shape)
    if data.startswith(ZIP):
        members = zip_members(data)
        if is_torch(members):
            return sglang_stats.parse_dump(parse_torch(members))
        return stats.parse_stats_npz(npz_arrays(members))
    if data.startswith(NPY):
        return routed.from_experts(parse_npy(data))
    if vllm.is_stats(data):
        return vllm.parse_stats(data)
    if data[:1] == b"\x80":
        raise ValueError("a bare pickle, as torch before 1.6 wrote: save it again with torch.save of today")
    if data.lstrip()[:1] not in (b"{", b"["):
        raise ValueError("expert load of no known engine; raw int32 expert ids need --raw-shape LAYERS,TOP_K")
    document = mapping(parse_json(recording.complete(data)))
    if "format" not in document and "logical_count" in document:
        return sglang_stats.parse_dump(document)
    return stats.parse_stats(document)
