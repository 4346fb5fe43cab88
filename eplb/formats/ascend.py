"""vllm-ascend's expert map: JSON with a device list for each MoE layer, numbered from 0."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moeserve.eplb.formats.assignments import placement_of
from moeserve.eplb.formats.files import mapping, whole_number
from moeserve.eplb.formats.placement import PlacementFile


def format_placement(file: PlacementFile) -> str:
    """ValueError where a device would hold an expert twice, which the plugin's map cannot say."""
    width = file.placement.num_slots // file.ep_size
    layers = []
    for i, row in enumerate(file.placement.slot_to_expert.tolist()):
        devices = [row[d * width : (d + 1) * width] for d in range(file.ep_size)]
        for d, experts in enumerate(devices):
            if len(set(experts)) < len(experts):
                raise ValueError(
                    f"layer {i}: device {d} holds an expert twice, --format ascend cannot say that"
                )
        layers.append(
            {
                "layer_id": i,
                "device_count": file.ep_size,
                "device_list": [{"device_id": d, "device_expert": e} for d, e in enumerate(devices)],
            }
        )
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n"


def parse_placement(
    document: Any,
    num_experts: int | None = None,
    layers: Sequence[int] | None = None,
    ranks_per_node: int = 0,
) -> PlacementFile:
    """layers: absolute ids of the MoE layers, where they are known; else 0, 1, ..."""
    document = mapping(document)
    entries = document.get("layer_list")
    if not isinstance(entries, list):
        raise ValueError("layer_list is no list")
    count = whole_number(document.get("moe_layer_count"), "moe_layer_count", 1)
    if count != len(entries):
        raise ValueError(f"moe_layer_count = {count}, but layer_list has {len(entries)} entries")
    by_id = {
        whole_number(
            mapping(entry, f"layer_list[{i}]").get("layer_id"), f"layer_list[{i}].layer_id", 0
        ): entry
        for i, entry in enumerate(entries)
    }
    if sorted(by_id) != list(range(count)):
        raise ValueError(f"layer_list has not the layer_ids 0 to {count - 1}")
    rows, names, sizes = [], [], set()
    for i in range(count):
        row, devices = _row(by_id[i], f"layer_list, layer_id {i}")
        rows.append(row)
        names.append(f"layer_list, layer_id {i}")
        sizes.add(devices)
    if len(sizes) > 1:
        raise ValueError(f"layers have different numbers of devices: {sorted(sizes)}")
    return placement_of(
        rows,
        names,
        list(range(count)) if layers is None else list(layers),
        ep_size=sizes.pop(),
        num_experts=num_experts,
        ranks_per_node=ranks_per_node,
    )


def _row(entry: dict[str, Any], name: str) -> tuple[list[Any], int]:
    devices = entry.get("device_list")
    if not isinstance(devices, list) or len(devices) != entry.get("device_count"):
        raise ValueError(f"{name}: device_list has not device_count = {entry.get('device_count')} entries")
    parts: dict[int, list[Any]] = {}
    for device in devices:
        device = mapping(device, f"{name}: device")
        number = whole_number(device.get("device_id"), f"{name}: device_id", 0)
        experts = device.get("device_expert")
        if not isinstance(experts, list):
            raise ValueError(f"{name}: device_expert of device {number} is no list")
        parts[number] = experts
    if sorted(parts) != list(range(len(devices))):
        raise ValueError(f"{name}: device_ids are not 0 to {len(devices) - 1}")
    if len({len(part) for part in parts.values()}) > 1:
        raise ValueError(f"{name}: devices hold different numbers of experts")
    return [expert for d in range(len(devices)) for expert in parts[d]], len(devices)
