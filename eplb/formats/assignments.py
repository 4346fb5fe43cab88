"""Rows of slot assignments as other engines write them, checked and made into a placement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeserve.eplb.formats.files import whole_number
from moeserve.eplb.formats.placement import PlacementFile
from moeserve.eplb.types import Placement


def placement_of(
    rows: Sequence[Any],
    names: Sequence[str],
    layers: Sequence[int],
    *,
    ep_size: int | None,
    num_experts: int | None,
    ranks_per_node: int = 0,
    num_slots: int | None = None,
) -> PlacementFile:
    """rows [L][P] of expert ids; names say where each row stands in the file, for messages. The expert count is
    the largest id + 1 where it is not given."""
    if not rows:
        raise ValueError("there is no layer")
    for row, name in zip(rows, names, strict=True):
        if not isinstance(row, list):
            raise ValueError(f"{name} is no list of expert ids")
        if num_slots is None:
            num_slots = len(row)
        if len(row) != num_slots:
            raise ValueError(f"{name} has {len(row)} entries, expected num_slots = {num_slots}")
        for i, expert in enumerate(row):
            whole_number(expert, f"{name}[{i}]", 0, (1 << 31) - 1)
    if len(layers) != len(rows):
        raise ValueError(f"there are {len(rows)} rows for {len(layers)} layers")
    if ep_size is None:
        raise ValueError("the file does not say for how many ranks it is: give --ep-size")
    if num_slots is None or num_slots < 1 or num_slots % ep_size:
        raise ValueError(f"num_slots = {num_slots} is not divisible by ep_size = {ep_size}")
    slots = np.array(rows, dtype=np.int64)
    experts = num_experts or int(slots.max()) + 1
    placement = Placement(slots, experts)  # type: ignore[arg-type]
    return PlacementFile(placement, ep_size, tuple(layers), ranks_per_node=ranks_per_node)
