"""SGLang's --init-expert-location: JSON with physical_to_logical_map alone, a row for every hidden layer; what
stands in the rows of dense layers does not matter to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moeserve.eplb.formats.assignments import placement_of
from moeserve.eplb.formats.files import mapping
from moeserve.eplb.formats.placement import PlacementFile

_KEY = "physical_to_logical_map"


def format_placement(file: PlacementFile, num_hidden_layers: int | None) -> str:
    """num_hidden_layers: dense layers included; they get slot j = expert j % E."""
    if num_hidden_layers is None:
        raise ValueError("--format sglang needs --num-hidden-layers: it wants a row for dense layers too")
    if num_hidden_layers <= file.layers[-1]:
        raise ValueError(
            f"--num-hidden-layers {num_hidden_layers} is too few: the MoE layers go up to id {file.layers[-1]}"
        )
    placement = file.placement
    filler = [slot % placement.num_experts for slot in range(placement.num_slots)]
    rows = dict(zip(file.layers, placement.slot_to_expert.tolist(), strict=True))
    lines = ",\n".join(
        json.dumps(rows.get(i, filler), separators=(",", ":")) for i in range(num_hidden_layers)
    )
    return f'{{"{_KEY}": [\n{lines}]}}\n'


def parse_placement(
    document: Any,
    ep_size: int | None = None,
    num_experts: int | None = None,
    layers: Sequence[int] | None = None,
    ranks_per_node: int = 0,
) -> PlacementFile:
    """All rows, or those of the given layer ids (which rows are of dense layers the file does not say)."""
    document = mapping(document)
    if set(document) != {_KEY}:
        raise ValueError(f"SGLang takes {_KEY} alone, the file has also {sorted(set(document) - {_KEY})}")
    rows = document[_KEY]
    if not isinstance(rows, list):
        raise ValueError(f"{_KEY} is no list")
    wanted = list(range(len(rows))) if layers is None else list(layers)
    if wanted and not 0 <= wanted[-1] < len(rows):
        raise ValueError(f"{_KEY} has {len(rows)} rows, layer {wanted[-1]} is wanted")
    return placement_of(
        [rows[i] for i in wanted],
        [f"{_KEY}[{i}]" for i in wanted],
        wanted,
        ep_size=ep_size,
        num_experts=num_experts,
        ranks_per_node=ranks_per_node,
    )
