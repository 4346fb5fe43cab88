"""The figures of the dashboard's panels are those that can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeserve.__main__ import main
from moeserve.dashboard import panels
from moeserve.dashboard.recording import FileSource, Recording
from moeserve.eplb.formats.stats import write_stats
from moeserve.eplb.load import ExpertLoad, Phase, Window
from moeserve.eplb.types import Placement, Topology

TWICE = Placement(np.array([[0, 1, 0, 2], [0, 1, 2, 0]]), 3, generation=5)
"""Two layers of three experts on two ranks; expert 0 stands on both."""


def load_of(*windows: tuple[Phase, list[int]], **head: Any) -> ExpertLoad:
    """Windows with the same counts in both layers, 3 and 7."""
    counts = np.array([[row, row] for _, row in windows])
    about = tuple(Window(phase, 10 * i, 10, sum(row)) for i, (phase, row) in enumerate(windows))
    return ExpertLoad(counts, (3, 7), about, model="m", **head)


def recording_of(*windows: tuple[Phase, list[int]]) -> Recording:
    load = load_of(*windows)
    return Recording("1", lambda: load, TWICE, Topology.of(2, 4))


DECODE_AND_PREFILL = recording_of(("decode", [4, 6, 2]), ("prefill", [9, 0, 0]), ("decode", [0, 0, 2]))


def test_map_by_rank_expert_and_slot_is_load_over_fair_share() -> None:
    found = panels.load_map(DECODE_AND_PREFILL, "decode", "rank", None)
    # layer 3 holds 0 1 | 0 2 and layer 7 holds 0 1 | 2 0: 2 + 6 against 2 + 4 in both
    assert (found["layers"], found["loads"]) == ([3, 7], [14, 14])
    assert found["values"] == [[1.1429, 0.8571]] * 2
    experts = panels.load_map(DECODE_AND_PREFILL, "decode", "expert", 0)
    assert experts["values"][0] == [1.0, 1.5, 0.5]
    slots = panels.load_map(DECODE_AND_PREFILL, "decode", "slot", 0)
    assert slots["values"] == [[0.6667, 2.0, 0.6667, 0.6667], [0.6667, 2.0, 0.6667, 0.6667]]


def test_phases_are_never_mixed() -> None:
    found = panels.load_map(DECODE_AND_PREFILL, "prefill", "expert", None)
    assert found["values"] == [[3.0, 0.0, 0.0]] * 2
    assert len(panels.history(DECODE_AND_PREFILL, "decode", 0)["worst"]) == 2
    with pytest.raises(ValueError, match="phase = 'mixed': there are windows of prefill, decode"):
        panels.history(DECODE_AND_PREFILL, "mixed", 0)


def test_history_has_each_window() -> None:
    found = panels.history(DECODE_AND_PREFILL, "decode", 1)
    assert found["layer"] == 7
    assert found["worst"] == found["chosen"] == [1.3333, 2.0]


def test_a_layer_shows_where_its_experts_stand() -> None:
    found = panels.layer_detail(DECODE_AND_PREFILL, "decode", 1, 0)
    assert (found["layer"], found["imbalance"], found["load"]) == (7, 1.333333, 12)
    assert found["ranks"] == [1.3333, 0.6667]
    assert found["slot_to_expert"] == [0, 1, 2, 0] and found["share"] == [0.5, 1.0, 1.0, 0.5]
    assert found["counts"] == [4, 6, 2]


def test_no_load_is_no_imbalance() -> None:
    empty = recording_of(("decode", [0, 0, 0]))
    assert panels.load_map(empty, "decode", "rank", None)["loads"] == [0, 0]
    assert panels.layer_detail(empty, "decode", 0, None)["ranks"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: panels.load_map(r, "decode", "rank", 2), "window = 2: give 0 to 1"),
        (lambda r: panels.load_map(r, "decode", "node", None), "by = 'node': give rank, expert, slot"),
        (lambda r: panels.layer_detail(r, "decode", 2, None), "layer = 2: give 0 to 1"),
    ],
)
def test_wrong_choices_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(DECODE_AND_PREFILL)


def test_a_file_is_shown_under_the_placement_it_was_recorded_with(tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    write_stats(file, load_of(("decode", [4, 6, 2]), ep_size=2, placement=TWICE))
    source = FileSource(file)
    head = panels.summary(source, source.read())
    assert (head["model"], head["file"], head["state"]) == ("m", "stats.json", "ready")
    assert (head["ep_size"], head["num_slots"], head["num_experts"]) == (2, 4, 3)
    assert head["digest"] == TWICE.digest and head["survives_rank_loss"] is False
    assert head["windows"] == {"decode": [{"start_step": 0, "steps": 10, "tokens": 12, "start_time": None}]}
    other = FileSource(file, ep_size=3).read()
    assert other.topology == Topology(3, 3, 1) and other.placement.slot_to_expert[0].tolist() == [0, 1, 2]


def test_the_command_says_what_a_file_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stats.json"
    write_stats(file, load_of(("decode", [4, 6, 2])))
    assert main(["dashboard", str(file)]) == 2
    assert "does not say on how many ranks it was recorded: give --ep-size" in capsys.readouterr().err
    file.write_text(json.dumps({"format": "something else"}))
    assert main(["dashboard", str(file)]) == 2
    assert "expected" in capsys.readouterr().err


def rebalance(time: float, result: str = "applied", phase: str | None = "decode") -> dict[str, Any]:
    return {
        "generation": int(time), "trigger": "periodic", "phase": phase, "result": result, "reason": "gain",
        "before": 1.4, "predicted": 1.1, "after": 1.2, "moves": 2, "bytes": 20, "bytes_by_link": {"intra_node": 20},
        "rank_bytes": [[0, 20], [0, 0]], "solve_seconds": 0.1, "migration_seconds": 0.5, "stall_seconds": 0.01,
        "net_seconds": 2.0, "time": time,
    }  # fmt: skip


def moved(*rebalances: dict[str, Any], **given: Any) -> Recording:
    """Four windows of decode, a second each from 1970 on; expert 0 stood on rank 0 alone before."""
    counts = np.array([[[4, 6, 2], [4, 6, 2]]] * 4)
    about = tuple(Window("decode", 10 * i, 10, 12, f"1970-01-01T00:00:0{i}Z") for i in range(4))
    load = ExpertLoad(counts, (3, 7), about, model="m")
    before = Placement(np.array([[0, 0, 1, 2], [0, 0, 1, 2]]), 3, generation=4)
    return Recording(
        "1", lambda: load, TWICE, Topology.of(2, 4), previous=before, rebalances=tuple(rebalances), **given
    )


def test_a_rebalance_stands_where_it_came_into_force() -> None:
    found = panels.history(moved(rebalance(2.5), rebalance(1.5, "skipped"), rebalance(0.5)), "decode", 0)
    assert [(one["at"], one["generation"]) for one in found["rebalances"]] == [(1, 0), (3, 2)]
    assert found["predicted"] == [None, 1.1, 1.1, 1.1]
    assert found["basis"] == "placement" and found["mean"] == found["in_force"]
    other = panels.history(moved(rebalance(2.5, phase="prefill")), "decode", 0)
    assert other["predicted"] == [None] * 4 and len(other["rebalances"]) == 1  # promised for another phase


def test_what_was_measured_goes_before_what_would_be() -> None:
    ranks = np.array([[[9.0, 3.0], [6.0, 6.0]]] * 4)
    found = panels.history(moved(make_measured=lambda: {"decode": ranks}), "decode", 0)
    assert (found["basis"], found["worst"][0], found["chosen"][0]) == ("measured", 1.5, 1.5)
    assert found["mean"] == [1.25] * 4 and found["in_force"] == [1.3333] * 4


def test_a_layer_shows_what_the_last_change_changed() -> None:
    found = panels.layer_detail(moved(), "decode", 0, 0)
    before = found["previous"]
    assert (before["generation"], before["slot_to_expert"]) == (4, [0, 0, 1, 2])
    assert before["ranks"] == [0.6667, 1.3333] and before["imbalance"] == 1.333333
    assert panels.layer_detail(DECODE_AND_PREFILL, "decode", 0, 0)["previous"] is None


def test_rebalances_and_what_they_brought() -> None:
    recording = moved(rebalance(2.5), rebalance(1.5, "skipped"), rebalance(0.5), expert_bytes=10)
    source = FileSource.__new__(FileSource)
    source.model, source.file = "m", None
    found = panels.rebalances(source, recording)
    assert (found["applied"], found["net_seconds"], len(found["rebalances"])) == (2, 4.0, 3)
    head = panels.summary(source, recording)
    # experts 1 and 2 of both layers stand once, expert 0 on both ranks
    assert (head["on_one_rank"], head["expert_bytes"], head["survives_rank_loss"]) == (4, 10, False)
