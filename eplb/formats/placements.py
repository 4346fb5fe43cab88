"""Placement files of every engine by name, and their recognition by content."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeserve.eplb.formats import ascend, placement, sglang, trtllm, vllm
from moeserve.eplb.formats.files import named, parse_json, read_bytes
from moeserve.eplb.formats.placement import PlacementFile


@dataclass(frozen=True)
class Known:
    """What the file itself does not say: most engines write neither ranks nor layer ids nor the expert count."""

    ep_size: int | None = None
    num_experts: int | None = None
    layers: Sequence[int] | None = None
    ranks_per_node: int = 0


_WRITERS: dict[str, Callable[..., str]] = {
    "moeserve": lambda file, **_: placement.format_placement(file),
    "trtllm": lambda file, layer_updates_per_iter=0, **_: trtllm.format_placement(
        file, layer_updates_per_iter
    ),
    "sglang": lambda file, num_hidden_layers=None, **_: sglang.format_placement(file, num_hidden_layers),
    "vllm": lambda file, **_: vllm.format_placement(file),
    "ascend": lambda file, **_: ascend.format_placement(file),
}

FORMATS = tuple(_WRITERS)


def format_as(
    file: PlacementFile, name: str, *, num_hidden_layers: int | None = None, layer_updates_per_iter: int = 0
) -> str:
    """The text of the placement in the named engine's format; ValueError where the format cannot hold it."""
    return _WRITERS[name](
        file, num_hidden_layers=num_hidden_layers, layer_updates_per_iter=layer_updates_per_iter
    )


def read_any_placement(path: str | Path, known: Known | None = None) -> PlacementFile:
    """The placement in a file of any engine; ValueError "FILE: what is wrong", also where the ranks are unknown."""
    path, known = Path(path), known or Known()
    return named(path, lambda: _parse(read_bytes(path), known))


def _parse(data: bytes, known: Known) -> PlacementFile:
    if not data.strip():
        raise ValueError("the file is empty")
    if not data.lstrip().startswith(b"{"):
        return trtllm.parse_placement(data, known.ep_size, known.num_experts, known.ranks_per_node)
    document: Any = parse_json(data.strip())
    if "physical_to_logical_map" in document:
        return sglang.parse_placement(
            document, known.ep_size, known.num_experts, known.layers, known.ranks_per_node
        )
    if document.get("record_type") == vllm.PLACEMENT:
        return vllm.parse_placement(document, known.ep_size, known.layers, known.ranks_per_node)
    if "layer_list" in document:
        return ascend.parse_placement(document, known.num_experts, known.layers, known.ranks_per_node)
    if "format" in document:
        return placement.parse_placement(document)
    keys = json.dumps(sorted(document)[:5])
    raise ValueError(f"no placement of a known engine: it has the keys {keys[:200]}")
