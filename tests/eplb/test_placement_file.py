"""placement.json: round trip, and every named check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeserve.eplb.formats.placement import PlacementFile, format_placement, read_placement, write_placement
from moeserve.eplb.types import Placement


def _file() -> PlacementFile:
    share = np.array([[1 / 3, 1, 1, 1 / 3, 1, 1 / 3], [0.25, 0.75, 1, 1, 1, 1]])
    rows = np.array([[0, 1, 2, 0, 3, 0], [0, 0, 1, 2, 3, 1]])
    share[1] = [0.25, 0.75, 0.4, 1, 1, 0.6]
    placement = Placement(rows, 4, 3, share)
    return PlacementFile(placement, 2, (3, 4), "name", 2, {"imbalance_mean": 1.1}, {"policy": "greedy"})


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    write_placement(path, _file())
    found = read_placement(path, ep_size=2, num_experts=4, layers=[3, 4], model="name")
    assert found.placement == _file().placement
    assert (found.layers, found.model, found.ep_size, found.solver) == (
        (3, 4),
        "name",
        2,
        {"policy": "greedy"},
    )
    assert format_placement(found) == path.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, 'format is "x", expected "moeserve.placement"'),
        ({"version": 2}, "version is 2, this reader knows 1"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": True}, "num_experts is true"),
        ({"ep_size": 4}, "num_slots = 6 is not divisible by ep_size = 4"),
        ({"num_slots": 8}, r"slot_to_expert\[0\] has 6 entries, expected num_slots = 8"),
        ({"layers": [3]}, "slot_to_expert has 2 rows, expected one for each of the 1 layers"),
        ({"layers": [4, 3]}, "ascending"),
        ({"slot_to_expert": None}, "slot_to_expert is missing"),
        (
            {"slot_to_expert": [[0, 1, 2, 0, 3, 9], [0, 0, 1, 2, 3, 1]]},
            r"slot_to_expert\[0\]\[5\] = 9 is not an expert",
        ),
        ({"slot_to_expert": [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 1]]}, "expert 3 has no slot"),
        (
            {"slot_to_expert": [[0, 1, 2, 0, 3, "0"], [0, 0, 1, 2, 3, 1]]},
            r"slot_to_expert\[0\]\[5\] is \"0\"",
        ),
        ({"share": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]}, "add up to 3"),
        ({"share": [[1, 1], [1, 1]]}, r"share\[0\] has 2 entries"),
        ({"share": None}, "digest is"),
        ({"digest": "00"}, 'digest is "00", but the content gives'),
        ({"generation": -1}, "generation is -1"),
    ],
)
def test_each_broken_field_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    document = json.loads(format_placement(_file())) | change
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as caught:
        read_placement(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wanted", [{"ep_size": 3}, {"num_experts": 8}, {"layers": [0, 1]}, {"model": "another"}], ids=str
)
def test_a_placement_for_another_engine_is_refused(tmp_path: Path, wanted: dict[str, Any]) -> None:
    path = tmp_path / "p.json"
    write_placement(path, _file())
    with pytest.raises(ValueError, match=f"made for {next(iter(wanted))}"):
        read_placement(path, **wanted)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": NaN}', "\x00\xff", "[" * 100_000])
def test_broken_text_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        read_placement(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_placement(tmp_path / "nothing.json")
