"""placement.json, our own placement file: written by the solver, read by the engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeserve.eplb.formats.files import (
    mapping,
    named,
    parse_json,
    read_bytes,
    whole_number,
    whole_numbers,
    write_text,
)
from moeserve.eplb.types import Floats, Placement, Topology

FORMAT = "moeserve.placement"
VERSION = 1


@dataclass(frozen=True)
class PlacementFile:
    """A placement with what it was made for. layers: absolute layer ids, one per row, ascending.

    predicted and solver are for people: what the solver expected and how it was called.
    """

    placement: Placement
    ep_size: int
    layers: tuple[int, ...]
    model: str = ""
    ranks_per_node: int = 0
    predicted: dict[str, Any] = field(default_factory=dict)
    solver: dict[str, Any] = field(default_factory=dict)

    @property
    def topology(self) -> Topology:
        return Topology.of(self.ep_size, self.placement.num_slots, self.ranks_per_node)


def read_placement(
    path: str | Path,
    *,
    ep_size: int | None = None,
    num_experts: int | None = None,
    layers: Sequence[int] | None = None,
    model: str | None = None,
) -> PlacementFile:
    """The placement of the file, checked; what is given must equal what the file says.

    Raises ValueError "FILE: what is wrong": broken JSON, an unknown version, lists of a wrong length, ids out
    of range, an expert without a slot, slots not divisible by ep_size, shares that do not add up, a digest
    that does not fit, or a placement made for another EP size, model, expert count or set of layers.
    """
    path = Path(path)

    def read() -> PlacementFile:
        found = parse_placement(parse_json(read_bytes(path)))
        check_made_for(found, ep_size=ep_size, num_experts=num_experts, layers=layers, model=model)
        return found

    return named(path, read)


def check_made_for(
    found: PlacementFile,
    *,
    ep_size: int | None = None,
    num_experts: int | None = None,
    layers: Sequence[int] | None = None,
    num_slots: int | None = None,
    model: str | None = None,
) -> None:
    """Raise ValueError unless what is given equals what the placement was made for; a file may leave the model out."""
    _expect("ep_size", found.ep_size, ep_size)
    _expect("num_experts", found.placement.num_experts, num_experts)
    _expect("layers", list(found.layers), None if layers is None else list(layers))
    _expect("num_slots", found.placement.num_slots, num_slots)
    if found.model:
        _expect("model", found.model, model or None)


def parse_placement(document: Any) -> PlacementFile:
    """The placement in a parsed placement.json; ValueError names what is wrong."""
    document = mapping(document)
    if document.get("format") != FORMAT:
        raise ValueError(f'format is {json.dumps(document.get("format"))}, expected "{FORMAT}"')
    if document.get("version") != VERSION:
        raise ValueError(f"version is {json.dumps(document.get('version'))}, this reader knows {VERSION}")
    num_experts = whole_number(document.get("num_experts"), "num_experts", 1)
    num_slots = whole_number(document.get("num_slots"), "num_slots", 1)
    ep_size = whole_number(document.get("ep_size"), "ep_size", 1)
    if num_slots % ep_size:
        raise ValueError(f"num_slots = {num_slots} is not divisible by ep_size = {ep_size}")
    if num_slots < num_experts:
        raise ValueError(
            f"num_slots = {num_slots} is less than num_experts = {num_experts}: each needs a slot"
        )
    layers = whole_numbers(document.get("layers"), "layers")
    if not layers or any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
        raise ValueError("layers must be a list of ascending layer ids with one entry at least")
    rows = _rows(document.get("slot_to_expert"), "slot_to_expert", len(layers), num_slots)
    slots = np.array(
        [whole_numbers(row, f"slot_to_expert[{i}]", -(1 << 40)) for i, row in enumerate(rows)], dtype=np.int64
    )
    share = None
    if document.get("share") is not None:
        share = _fractions(_rows(document["share"], "share", len(layers), num_slots))
    generation = whole_number(document.get("generation", 0), "generation", 0)
    placement = Placement(slots, num_experts, generation, share)  # type: ignore[arg-type]
    digest = document.get("digest")
    if digest != placement.digest:
        raise ValueError(f"digest is {json.dumps(digest)}, but the content gives {placement.digest}")
    model = document.get("model", "")
    if not isinstance(model, str):
        raise ValueError(f"model is {json.dumps(model)}, expected a name")
    return PlacementFile(
        placement=placement,
        ep_size=ep_size,
        layers=tuple(layers),
        model=model,
        ranks_per_node=whole_number(document.get("ranks_per_node") or 0, "ranks_per_node", 0),
        predicted=mapping(document.get("predicted") or {}, "predicted"),
        solver=mapping(document.get("solver") or {}, "solver"),
    )


def write_placement(path: str | Path, file: PlacementFile) -> None:
    """Write placement.json, whole or not at all."""
    write_text(Path(path), format_placement(file))


def format_placement(file: PlacementFile) -> str:
    """The text of placement.json: one line a key, one a layer."""
    placement = file.placement
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "generation": placement.generation,
        "model": file.model,
        "num_experts": placement.num_experts,
        "num_slots": placement.num_slots,
        "ep_size": file.ep_size,
        "ranks_per_node": file.ranks_per_node or file.ep_size,
        "layers": list(file.layers),
    }
    share = np.round(placement.share, 9).tolist()
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    parts.append(_table("slot_to_expert", placement.slot_to_expert.tolist()))
    parts.append(_table("share", [[int(s) if s == int(s) else s for s in row] for row in share]))
    tail = {"predicted": file.predicted, "solver": file.solver, "digest": placement.digest}
    parts += [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in tail.items()]
    return "{" + ",\n ".join(parts) + "}\n"


def _table(name: str, rows: list[list[Any]]) -> str:
    lines = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in rows)
    return f"{json.dumps(name)}: [\n  {lines}]"


def _rows(value: Any, name: str, num_layers: int, num_slots: int) -> list[list[Any]]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is missing or no list, expected {num_layers} rows of {num_slots}")
    if len(value) != num_layers:
        raise ValueError(f"{name} has {len(value)} rows, expected one for each of the {num_layers} layers")
    for i, row in enumerate(value):
        if not isinstance(row, list) or len(row) != num_slots:
            entries = f"{len(row)} entries" if isinstance(row, list) else "no list"
            raise ValueError(f"{name}[{i}] has {entries}, expected num_slots = {num_slots}")
    return value


def _fractions(rows: list[list[Any]]) -> Floats:
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"share[{i}][{j}] is {json.dumps(value)}, expected a fraction from 0 to 1")
    return np.array(rows, dtype=np.float64)


def _expect(name: str, found: object, wanted: object) -> None:
    if wanted is not None and found != wanted:
        flag = f" with --{name.replace('_', '-')} {wanted}" if name in ("ep_size", "num_slots") else ""
        raise ValueError(
            f"the placement was made for {name} = {found}, the engine has {wanted}; solve again{flag}"
        )
