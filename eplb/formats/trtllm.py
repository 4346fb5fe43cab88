"""TensorRT-LLM's load balancer configuration: YAML with num_slots, initial_global_assignments by absolute layer id
and layer_updates_per_iter. Its reader takes no other key, so the ranks stand in a comment."""

from __future__ import annotations

import re
from typing import Any

from moeserve.eplb.formats.assignments import placement_of
from moeserve.eplb.formats.files import mapping, whole_number
from moeserve.eplb.formats.placement import PlacementFile

_KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter", "ep_size"}


def format_placement(file: PlacementFile, layer_updates_per_iter: int = 0) -> str:
    """layer_updates_per_iter: 0 keeps the placement, n rebalances n layers an iteration from it on."""
    if layer_updates_per_iter < 0:
        raise ValueError(f"layer_updates_per_iter = {layer_updates_per_iter}: give 0 or more")
    lines = [
        f"# ep_size: {file.ep_size}",
        f"num_slots: {file.placement.num_slots}",
        f"layer_updates_per_iter: {layer_updates_per_iter}",
        "initial_global_assignments:",
    ]
    for layer, row in zip(file.layers, file.placement.slot_to_expert.tolist(), strict=True):
        lines.append(f"  {layer}: {row}")
    return "\n".join(lines) + "\n"


def parse_placement(
    data: bytes, ep_size: int | None = None, num_experts: int | None = None, ranks_per_node: int = 0
) -> PlacementFile:
    """The placement in the YAML; ep_size from the argument, a key or our comment."""
    document = mapping(_yaml(data))
    unknown = sorted(str(key) for key in document if key not in _KEYS)
    if unknown or "initial_global_assignments" not in document:
        found = ", ".join(unknown)[:100] if unknown else "no initial_global_assignments"
        raise ValueError(f"no placement of a known engine: as TensorRT-LLM's YAML it has {found}")
    num_slots = whole_number(document.get("num_slots"), "num_slots", 1)
    comment = re.search(rb"^# ep_size: (\d+)\s*$", data, re.MULTILINE)
    if ep_size is None and "ep_size" in document:
        ep_size = whole_number(document["ep_size"], "ep_size", 1)
    if ep_size is None and comment:
        ep_size = whole_number(int(comment[1][:9]), "ep_size", 1)
    assignments: dict[Any, Any] = mapping(
        document["initial_global_assignments"], "initial_global_assignments"
    )
    layers = sorted(whole_number(key, f"initial_global_assignments key {key!r}", 0) for key in assignments)
    return placement_of(
        [assignments[layer] for layer in layers],
        [f"initial_global_assignments[{layer}]" for layer in layers],
        layers,
        ep_size=ep_size,
        num_experts=num_experts,
        ranks_per_node=ranks_per_node,
        num_slots=num_slots,
    )


def _yaml(data: bytes) -> Any:
    import yaml  # imported here: only this format needs it

    try:
        return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError("neither JSON nor YAML: " + " ".join(str(error).split())[:120]) from None
