"""vLLM's offline EPLB (pull request 41141): JSON lines of physical loads, and one line that is a placement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from moeserve.eplb.formats.assignments import placement_of
from moeserve.eplb.formats.files import mapping, named, parse_json, whole_number
from moeserve.eplb.formats.placement import PlacementFile
from moeserve.eplb.load import ExpertLoad, Window, check_counts
from moeserve.eplb.types import Placement

PLACEMENT = "eplb_initial_mapping"
META = "eplb_load_meta"
STATS = "eplb_load_stats"
_MARKERS = ("session_metadata", "bench_run_start")


def format_placement(file: PlacementFile) -> str:
    """One line; layers are numbered from 0 over the MoE layers."""
    placement = file.placement
    rows = {str(i): row for i, row in enumerate(placement.slot_to_expert.tolist())}
    document = {
        "record_type": PLACEMENT,
        "version": 1,
        "num_redundant_experts": placement.num_slots - placement.num_experts,
        "num_slots": placement.num_slots,
        "initial_global_assignments": rows,
    }
    return json.dumps(document, separators=(",", ":")) + "\n"


def parse_placement(
    document: Any, ep_size: int | None = None, layers: Sequence[int] | None = None, ranks_per_node: int = 0
) -> PlacementFile:
    """layers: absolute ids of the MoE layers, where they are known; else 0, 1, ..."""
    document = mapping(document)
    _version(document, PLACEMENT)
    num_slots = whole_number(document.get("num_slots"), "num_slots", 1)
    redundant = whole_number(document.get("num_redundant_experts"), "num_redundant_experts", 0, num_slots - 1)
    assignments = mapping(document.get("initial_global_assignments"), "initial_global_assignments")
    keys = [str(i) for i in range(len(assignments))]
    if set(keys) != set(assignments):
        raise ValueError(f'initial_global_assignments has not the keys "0" to "{len(assignments) - 1}"')
    return placement_of(
        [assignments[key] for key in keys],
        [f'initial_global_assignments["{key}"]' for key in keys],
        list(range(len(keys))) if layers is None else list(layers),
        ep_size=ep_size,
        num_experts=num_slots - redundant,
        ranks_per_node=ranks_per_node,
        num_slots=num_slots,
    )


def is_stats(data: bytes) -> bool:
    """Whether the first line is a record of this format."""
    first = data.lstrip().split(b"\n", 1)[0]
    return b'"record_type"' in first and b"eplb_" in first or any(m.encode() in first for m in _MARKERS)


def parse_stats(data: bytes) -> ExpertLoad:
    """Physical loads folded to logical experts by each line's own map; each line becomes a window."""
    meta: dict[str, Any] | None = None
    loads: list[Any] = []
    windows: list[Window] = []
    last_step, last_map = 0, None
    ranks: int | None = None
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number}"
        record = mapping(named(where, partial(parse_json, line)), where)
        kind = record.get("record_type")
        if kind in _MARKERS:
            continue
        if kind == META:
            if meta is not None or loads:
                raise ValueError(f"{where}: {META} must come once, before the statistics")
            _version(record, META)
            meta = record
            ranks = whole_number(record.get("num_ranks"), f"{where}: num_ranks", 1)
            continue
        if kind != STATS:
            raise ValueError(f"{where}: record_type is {json.dumps(kind)[:40]}, expected {META} or {STATS}")
        _version(record, STATS)
        if "num_ranks" in record:
            ranks = whole_number(record["num_ranks"], f"{where}: num_ranks", 1)
        load, last_map = _fold(record, where, loads[0].shape if loads else None)
        step = whole_number(record.get("step"), f"{where}: step", 0)
        windows.append(Window(start_step=last_step, steps=max(step - last_step, 1)))
        last_step = step
        loads.append(load)
    if not loads:
        raise ValueError(f"there is no {STATS} line: nothing was recorded")
    meta = meta or {}
    layers, experts = loads[0].shape
    nodes = meta.get("num_nodes") or 1
    groups = meta.get("num_groups") or 1
    placement = None
    if last_map is not None and ranks and last_map.shape[1] % ranks == 0:
        placement = Placement(last_map, experts)
    return ExpertLoad(
        np.stack(loads),
        layers=tuple(range(layers)),
        windows=tuple(windows),
        model=str(meta.get("model") or ""),
        expert_groups=groups if isinstance(groups, int) and groups > 0 and experts % groups == 0 else 1,
        ep_size=ranks or 0,
        ranks_per_node=ranks // nodes if ranks and isinstance(nodes, int) and nodes > 0 else 0,
        placement=placement,
    )


def _fold(record: dict[str, Any], where: str, shape: tuple[int, ...] | None) -> tuple[Any, Any]:
    load = _table(record.get("expert_load"), f"{where}: expert_load")
    slots = _table(record.get("p2l_map"), f"{where}: p2l_map")
    if load.shape != slots.shape:
        raise ValueError(f"{where}: expert_load has shape {load.shape}, p2l_map {slots.shape}")
    experts = int(slots.max()) + 1
    if experts > slots.shape[1]:
        raise ValueError(f"{where}: p2l_map names expert {experts - 1}, but there are {slots.shape[1]} slots")
    if shape is not None and shape != (len(load), experts):
        raise ValueError(f"{where}: {len(load)} layers of {experts} experts, earlier lines had {shape}")
    logical = np.zeros((len(load), experts), np.int64)
    np.add.at(logical, (np.arange(len(load))[:, None], slots), load)
    return logical, slots


def _table(value: Any, name: str) -> Any:
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        raise ValueError(f"{name} is no list of layers")
    if len({len(row) for row in value}) > 1:
        raise ValueError(f"{name} has rows of unequal length")
    for row in value:
        for item in row:
            if isinstance(item, bool) or not isinstance(item, (int, float)) or abs(item) > 2**53:
                raise ValueError(f"{name}: {json.dumps(item)[:40]} stands where a count is expected")
    return check_counts(value, name)


def _version(record: dict[str, Any], kind: str) -> None:
    if record.get("version") != 1:
        raise ValueError(f"{kind} has version {json.dumps(record.get('version'))}, this reader knows 1")
