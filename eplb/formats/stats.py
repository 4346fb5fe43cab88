"""stats.json and its twins .json.gz and .npz: our own files of expert load."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.eplb.formats.files import mapping, optional, whole_number, whole_numbers, write_bytes
from moeserve.eplb.formats.placement import PlacementFile, format_placement, parse_placement
from moeserve.eplb.load import PHASES, ExpertLoad, Phase, Window, check_counts
from moeserve.eplb.types import Placement

FORMAT = "moeserve.expert_load"
VERSION = 1


def parse_stats(document: Any) -> ExpertLoad:
    """The load of a parsed stats.json; ValueError names the field that is wrong."""
    document = mapping(document)
    head = _head(document)
    windows = document.get("windows")
    if not isinstance(windows, list):
        raise ValueError("windows is missing or no list")
    if not windows:
        raise ValueError("windows is empty: nothing was recorded")
    layers, experts = len(head["layers"]), head.pop("num_experts")
    loads, about = [], []
    for i, window in enumerate(windows):
        window = mapping(window, f"windows[{i}]")
        loads.append(_load(window.get("load"), f"windows[{i}].load", layers, experts))
        about.append(_window(window, f"windows[{i}]"))
    return ExpertLoad(np.stack(loads), windows=tuple(about), **head)


def _head(document: dict[str, Any]) -> dict[str, Any]:
    if document.get("format") != FORMAT:
        raise ValueError(f'format is {json.dumps(document.get("format"))}, expected "{FORMAT}"')
    if document.get("version") != VERSION:
        raise ValueError(f"version is {json.dumps(document.get('version'))}, this reader knows {VERSION}")
    model = document.get("model") or ""
    if not isinstance(model, str):
        raise ValueError(f"model is {json.dumps(model)}, expected a name")
    experts = whole_number(document.get("num_experts"), "num_experts", 1)
    layers = whole_numbers(document.get("layers"), "layers")
    if not layers or any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
        raise ValueError("layers must be a list of ascending layer ids with one entry at least")
    groups = optional(document.get("expert_groups"), "expert_groups", 1) or 1
    if experts % groups:
        raise ValueError(f"expert_groups = {groups} does not divide num_experts = {experts}")
    placement = _placement(document.get("placement"), len(layers), experts)
    return {
        "num_experts": experts,
        "layers": tuple(layers),
        "model": model,
        "top_k": optional(document.get("top_k"), "top_k", 1) or 0,
        "expert_groups": groups,
        "ep_size": optional(document.get("ep_size"), "ep_size", 1) or 0,
        "ranks_per_node": optional(document.get("ranks_per_node"), "ranks_per_node", 1) or 0,
        "placement": placement,
    }


def _placement(document: Any, num_layers: int, num_experts: int) -> Placement | None:
    if document is None:
        return None
    try:
        placement = parse_placement(document).placement
    except ValueError as error:
        raise ValueError(f"placement: {error}") from None
    if (placement.num_layers, placement.num_experts) != (num_layers, num_experts):
        raise ValueError(
            f"placement has {placement.num_layers} layers of {placement.num_experts} experts, the load "
            f"{num_layers} of {num_experts}"
        )
    return placement


def _load(value: Any, name: str, layers: int, experts: int) -> npt.NDArray[np.int64]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is missing or no list")
    if len(value) != layers:
        raise ValueError(f"{name} has {len(value)} rows, expected one for each of the {layers} layers")
    for i, row in enumerate(value):
        if not isinstance(row, list) or len(row) != experts:
            entries = f"{len(row)} entries" if isinstance(row, list) else "no list"
            raise ValueError(f"{name}[{i}] has {entries}, expected num_experts = {experts}")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} holds something that is no number") from None
    if array.dtype.kind not in "iuf":
        wrong = next(
            (i, j, x)
            for i, row in enumerate(value)
            for j, x in enumerate(row)
            if isinstance(x, bool) or not isinstance(x, (int, float)) or abs(x) > 2**53
        )
        raise ValueError(f"{name}[{wrong[0]}][{wrong[1]}] is {json.dumps(wrong[2])[:40]}, expected a count")
    return check_counts(array, name)


def _window(window: dict[str, Any], name: str) -> Window:
    phase = window.get("phase", "mixed")
    if phase not in PHASES:
        raise ValueError(f"{name}.phase is {json.dumps(phase)[:40]}, expected prefill, decode or mixed")
    time = window.get("start_time")
    if time is not None and not isinstance(time, str):
        raise ValueError(f"{name}.start_time is {json.dumps(time)[:40]}, expected an ISO 8601 time")
    return Window(
        phase=phase,
        start_step=whole_number(window.get("start_step", 0), f"{name}.start_step", 0),
        steps=whole_number(window.get("steps", 1), f"{name}.steps", 0),
        tokens=whole_number(window.get("tokens", 0), f"{name}.tokens", 0),
        start_time=time,
    )


def parse_stats_npz(arrays: dict[str, npt.NDArray[Any]]) -> ExpertLoad:
    """The load of an .npz with stats.json's keys, windows stacked; placement as JSON text."""
    document: dict[str, Any] = {}
    for key in (
        "format",
        "version",
        "model",
        "num_experts",
        "top_k",
        "expert_groups",
        "ep_size",
        "ranks_per_node",
    ):
        if key in arrays:
            document[key] = arrays[key].item() if arrays[key].size == 1 else arrays[key].tolist()
    document["layers"] = arrays["layers"].tolist() if "layers" in arrays else None
    if "placement" in arrays and str(arrays["placement"]):
        try:
            document["placement"] = json.loads(str(arrays["placement"]))
        except (json.JSONDecodeError, RecursionError):
            raise ValueError("placement is no JSON text") from None
    head = _head(document)
    experts = head.pop("num_experts")
    if "load" not in arrays:
        raise ValueError("load is missing")
    load = check_counts(arrays["load"], "load")
    if load.ndim != 3 or load.shape[1:] != (len(head["layers"]), experts):
        raise ValueError(f"load has shape {load.shape}, expected [windows, {len(head['layers'])}, {experts}]")
    if not len(load):
        raise ValueError("load has no window: nothing was recorded")
    columns: dict[str, list[Any]] = {}
    for key, value in (
        ("phase", "mixed"),
        ("start_step", 0),
        ("steps", 1),
        ("tokens", 0),
        ("start_time", ""),
    ):
        column = arrays[key].tolist() if key in arrays else [value] * len(load)
        if not isinstance(column, list) or len(column) != len(load):
            raise ValueError(
                f"{key} has shape {arrays[key].shape}, expected one entry for each of {len(load)} windows"
            )
        columns[key] = column
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    windows = [
        _window(row | {"start_time": row["start_time"] or None}, f"windows[{i}]")
        for i, row in enumerate(rows)
    ]
    return ExpertLoad(load, windows=tuple(windows), **head)


def stats_document(load: ExpertLoad) -> dict[str, Any]:
    """stats.json's content without the windows."""
    placement = None
    if load.placement is not None:
        file = PlacementFile(load.placement, load.ep_size or 1, load.layers, load.model, load.ranks_per_node)
        placement = json.loads(format_placement(file))
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": load.model,
        "num_experts": load.num_experts,
        "top_k": load.top_k or None,
        "expert_groups": load.expert_groups,
        "layers": list(load.layers),
        "ep_size": load.ep_size or None,
        "ranks_per_node": load.ranks_per_node or None,
        "placement": placement,
    }


def write_stats(path: str | Path, load: ExpertLoad) -> None:
    """Write stats.json, .json.gz or .npz, by the name's ending; whole or not at all."""
    path = Path(path)
    if path.suffix == ".npz":
        write_bytes(path, _npz(load))
        return
    text = format_stats(load).encode()
    write_bytes(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def format_stats(load: ExpertLoad) -> str:
    """The text of stats.json: one line a key, and a line for each window."""
    head = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in stats_document(load).items()]
    windows = []
    for window, counts in zip(load.windows, load.load, strict=True):
        about: dict[str, Any] = {
            "phase": window.phase, "start_step": window.start_step, "steps": window.steps, "tokens": window.tokens,
        }  # fmt: skip
        if window.start_time:
            about["start_time"] = window.start_time
        windows.append(json.dumps(about | {"load": counts.tolist()}, separators=(",", ":")))
    return "{" + ",\n ".join([*head, '"windows": [\n  ' + ",\n  ".join(windows) + "]"]) + "}\n"


def _npz(load: ExpertLoad) -> bytes:
    document = stats_document(load)
    arrays: dict[str, Any] = {key: np.array(value) for key, value in document.items() if value is not None}
    if document["placement"] is not None:
        arrays["placement"] = np.array(json.dumps(document["placement"]))
    phases: list[Phase] = [window.phase for window in load.windows]
    arrays |= {
        "load": load.load,
        "phase": np.array(phases),
        "start_step": np.array([window.start_step for window in load.windows]),
        "steps": np.array([window.steps for window in load.windows]),
        "tokens": np.array([window.tokens for window in load.windows]),
        "start_time": np.array([window.start_time or "" for window in load.windows]),
    }
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()
