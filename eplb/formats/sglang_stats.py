"""SGLang's recorder dumps (torch.save): `stat` with logical_count, and `per_pass` with physical counts by pass; and
logical_count as JSON. Rows of dense layers are zeros there and are left out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.eplb.formats.files import mapping
from moeserve.eplb.load import ExpertLoad, Window, check_counts


def parse_dump(document: Any) -> ExpertLoad:
    """The load of a dump, or of JSON with logical_count [layers, E] or [steps, layers, E]."""
    document = mapping(document)
    if "logical_count" in document:
        counts = check_counts(_array(document["logical_count"], "logical_count"), "logical_count")
        if counts.ndim == 2:
            counts = counts[None]
        if counts.ndim != 3:
            raise ValueError(f"logical_count has shape {counts.shape}, expected [steps, layers, experts]")
        return _from_steps(counts)
    if "records" in document:
        return _from_passes(document)
    raise ValueError(f"no logical_count and no records: the keys are {sorted(str(k) for k in document)[:6]}")


def _from_passes(document: dict[str, Any]) -> ExpertLoad:
    slots = _array(document.get("last_physical_to_logical_map"), "last_physical_to_logical_map")
    slots = check_counts(slots, "last_physical_to_logical_map")
    records = document["records"]
    if not isinstance(records, list) or not records:
        raise ValueError("records is empty: nothing was recorded")
    if slots.ndim != 2 or int(slots.max()) >= slots.shape[1]:
        raise ValueError(f"last_physical_to_logical_map has shape {slots.shape} and ids up to {slots.max()}")
    experts, layers = int(slots.max()) + 1, len(slots)
    by_pass: dict[int, npt.NDArray[np.int64]] = {}
    for i, record in enumerate(records):
        record = mapping(record, f"records[{i}]")
        name = f"records[{i}].global_physical_count"
        counts = check_counts(_array(record.get("global_physical_count"), name), name)
        if counts.shape != slots.shape:
            raise ValueError(f"{name} has shape {counts.shape}, the map {slots.shape}")
        number = record.get("forward_pass_id")
        if not isinstance(number, int):
            raise ValueError(f"records[{i}].forward_pass_id is {number!r}, expected a whole number")
        logical = by_pass.setdefault(number, np.zeros((layers, experts), np.int64))
        np.add.at(logical, (np.arange(layers)[:, None], slots), counts)
    order = sorted(by_pass)
    return _from_steps(np.stack([by_pass[number] for number in order]), order)


def _from_steps(counts: npt.NDArray[np.int64], numbers: list[int] | None = None) -> ExpertLoad:
    """Without the rows that the ring buffer has not filled and the layers that route nothing."""
    filled = np.flatnonzero(counts.any(axis=(1, 2)))
    layers = np.flatnonzero(counts.any(axis=(0, 2)))
    if not len(filled):
        raise ValueError("all counts are zero: nothing was recorded")
    load = counts[filled][:, layers]
    windows = tuple(Window(start_step=numbers[i] if numbers else int(i)) for i in filled)
    return ExpertLoad(load, tuple(int(layer) for layer in layers), windows)


def _array(value: Any, name: str) -> npt.NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{name} is missing or no table of counts")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} has rows of unequal length") from None
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} holds something that is no number")
    return array
