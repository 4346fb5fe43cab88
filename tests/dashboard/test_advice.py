"""What the dashboard advises is what the solver finds, with the figures that eplb-offline reports."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeserve.dashboard import advice
from moeserve.dashboard.recording import FileSource, Recording
from moeserve.eplb import cli
from moeserve.eplb.formats.stats import write_stats
from moeserve.eplb.load import ExpertLoad, Window
from moeserve.eplb.synthetic import Traffic
from moeserve.eplb.types import Placement, Topology


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve windows of skewed load, 3 layers of 32 experts on 4 ranks; every third is prefill."""
    traffic = Traffic.make(3, 32, seed=3)
    counts = traffic.counts(traffic.mixes("steady", 12), 4000)
    windows = tuple(Window("prefill" if i % 3 == 2 else "decode", 10 * i, 10, 1000) for i in range(12))
    path = tmp_path_factory.mktemp("load") / "stats.json"
    write_stats(path, ExpertLoad(counts, (1, 2, 3), windows, model="m", top_k=4, ep_size=4))
    return path


def recording_of(row: list[int], num_ranks: int, windows: int = 1) -> Recording:
    load = ExpertLoad(
        np.array([[row]] * windows),
        (0,),
        tuple(Window("decode", i) for i in range(windows)),
        ep_size=num_ranks,
    )
    placement = Placement.identity(1, len(row), len(row))
    return Recording("1", lambda: load, placement, Topology.of(num_ranks, len(row)))


def test_figures_are_those_of_eplb_offline(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = advice.verdict(FileSource(file).read(), "decode")
    assert found["state"] == "helps" and found["windows"] == 8
    for proposal in found["proposals"]:
        slots = 32 + proposal["redundant"]
        arguments = [str(file), "--phase", "decode", "--num-slots", str(slots), "--report", "json"]
        assert cli.main([*arguments, "-o", str(tmp_path / "placement.json")]) == 0
        lines = json.loads(capsys.readouterr().out)["lines"]
        if proposal["redundant"] == 0:
            assert lines[0]["in_sample"]["mean"] == pytest.approx(found["mean"], abs=1e-6)
            assert lines[0]["in_sample"]["worst"] == pytest.approx(found["worst"], abs=1e-6)
            assert lines[0]["held_out"]["mean"] == pytest.approx(proposal["held_out_before"], abs=1e-6)
        ours = next(x for x in lines if x["placement"].startswith("ours") and x["split"] == "shares")
        assert ours["in_sample"]["mean"] == pytest.approx(proposal["after"], abs=1e-6)
        assert ours["held_out"]["mean"] == pytest.approx(proposal["held_out_after"], abs=1e-6)
    assert [proposal["redundant"] for proposal in found["proposals"]] == [0, 4]
    assert found["waiting"] == pytest.approx(1 - 1 / found["mean"], abs=1e-5)


def test_balanced_when_there_is_nothing_to_gain() -> None:
    assert advice.verdict(recording_of([5, 5, 5, 5], 2), "decode")["state"] == "balanced"
    # one expert has all the load: no arrangement of single slots helps, a second slot for it does
    skewed = advice.verdict(recording_of([90, 0, 0, 0], 2), "decode")
    assert skewed["state"] == "helps"
    assert [proposal["after"] for proposal in skewed["proposals"]] == [2.0, 1.0]


def test_a_window_without_load_is_nothing_to_measure_on() -> None:
    load = ExpertLoad(np.array([[[9, 9, 1, 1]], [[0, 0, 0, 0]]]), (0,), (Window("decode"),) * 2, ep_size=2)
    recording = Recording("1", lambda: load, Placement.identity(1, 4, 4), Topology.of(2, 4))
    found = advice.verdict(recording, "decode")
    assert found["state"] == "helps" and found["proposals"][0]["held_out_after"] is None


def test_one_rank_has_nobody_to_wait_for() -> None:
    found = advice.verdict(recording_of([9, 1], 1), "decode")
    assert (found["state"], found["mean"], found["proposals"]) == ("one_rank", 1.0, [])


def test_what_if_solves_each_size(file: Path) -> None:
    recording = FileSource(file).read()
    found = advice.what_if(recording, "decode", 4, 1, "auto", 2)
    assert [point["slots_per_rank"] for point in found["points"]] == [8, 9, 10, 11, 12]
    assert found["chosen"] == 1 and found["layer"] == 3 and len(found["ranks"]) == 4
    verdict = advice.verdict(recording, "decode")
    assert found["points"][1]["after"] == verdict["proposals"][1]["after"]
    assert max(found["ranks"]) < 1.05 < found["points"][0]["before"]
    assert found["points"][0]["moves"] > 0 and found["points"][1]["moves"] is None
    eight = advice.what_if(recording, "decode", 8, 0, "greedy", 0)
    assert len(eight["ranks"]) == 8 and eight["points"][0]["policy"] == "greedy"


def test_no_more_slots_a_rank_than_experts() -> None:
    found = advice.what_if(recording_of([5, 3], 1), "decode", 2, 4, "auto", 0)
    assert [point["slots_per_rank"] for point in found["points"]] == [1, 2]
    assert found["chosen"] == 1 and found["points"][1]["survives_rank_loss"] is True


@pytest.mark.parametrize(
    ("values", "place"),
    [([1.5, 1.1, 1.08, 1.05], 1), ([1.01, 1.005, 1.004], None), ([1.5, 1.4, 1.2, 1.0], None), ([2.0], None)],
)
def test_knee_is_where_another_slot_brings_little(values: list[float], place: int | None) -> None:
    assert advice.knee(values) == place


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 1, "auto", 0), "ep_size = 0: give 1 to 1024"),
        ((4, 9, "auto", 0), "extra = 9: give 0 to 4"),
        ((4, 1, "best", 0), "policy = 'best': give auto"),
        ((4, 1, "auto", 3), "layer = 3: give 0 to 2"),
    ],
)
def test_wrong_wishes_are_named(file: Path, given: tuple[int, int, str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advice.what_if(FileSource(file).read(), "decode", *given)


def test_weights_and_moves_in_bytes(file: Path) -> None:
    recording = FileSource(file, expert_bytes=1000).read()
    verdict = advice.verdict(recording, "decode")
    same, more = verdict["proposals"]
    assert same["bytes"] == 1000 * same["moves"] > 0 and more["bytes"] is None
    assert (same["rank_bytes"], more["rank_bytes"]) == (8 * 3 * 1000, 9 * 3 * 1000)
    assert verdict["bytes_per_second"] is None  # nothing moved yet
    assert advice.verdict(FileSource(file).read(), "decode")["proposals"][0]["rank_bytes"] is None


def test_what_if_for_a_file_is_the_what_if(file: Path) -> None:
    recording = FileSource(file).read()
    every = advice.what_if_anywhere(recording, "decode")
    for extra in (0, 2):
        one = advice.what_if(recording, "decode", 4, extra, "auto", 1)
        assert every["ranks"][extra][1] == one["ranks"] and every["knee"] == one["knee"]
        assert every["points"][extra] | {"seconds": 0} == one["points"][extra] | {"seconds": 0}


def test_windows_under_other_placements_count_as_they_were() -> None:
    """The old traffic under the new placement is nothing that ever was."""
    base = recording_of([9, 1, 1, 1], 2, windows=2)
    ranks = np.array([[[6.0, 6.0]], [[7.0, 5.0]]])
    before = Placement(np.array([[0, 2, 1, 3]]), 4)
    moved = replace(base, previous=before, make_measured=lambda: {"decode": ranks})
    found = advice.verdict(moved, "decode")
    assert found["as_it_was"] == pytest.approx((1 + 7 / 6) / 2, abs=1e-6)
    assert found["mean"] == pytest.approx(10 / 6, abs=1e-6)  # and this is what eplb-offline says
    assert found["waiting"] == pytest.approx(1 - 1 / found["as_it_was"], abs=1e-5)
    assert advice.verdict(base, "decode")["as_it_was"] is None


def test_several_threads_find_the_same(file: Path) -> None:
    """The solver's C library runs without the interpreter's lock, in the threads that answer pages."""
    recording = FileSource(file).read()
    wishes = [("decode", 4, extra, policy, 0) for extra in (0, 1) for policy in ("auto", "greedy", "fast")]
    alone = [advice.what_if(recording, *wish)["ranks"] for wish in wishes]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda wish: advice.what_if(recording, *wish)["ranks"], wishes * 2))
    assert together == alone * 2
