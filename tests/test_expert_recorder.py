"""What the ranks report reaches the folder, under the placement that it met."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from moeserve.eplb.formats.detect import read_load
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.expert_recorder import MAX_WAITING, ExpertRecorder
from moeserve.messages import ExpertCounts
from moeserve.stats.snapshot import LoadWindow
from moeserve.stats.trace import TraceWriter

TWICE = Placement(np.array([[0, 1, 0, 2]]), 3, generation=5)


def balance() -> ExpertBalance:
    return ExpertBalance(TWICE, Topology.of(2, 4), layers=(1,), model="m", top_k=1, expert_groups=1)


def report(decode: list[int], rank: int = 0) -> ExpertCounts:
    data = np.array([[[0] * 3], [decode]], "<u4").tobytes()
    return ExpertCounts(rank, 10, 10, 1.0, (0, sum(decode)), data)


def test_counts_of_all_ranks_are_kept_with_their_placement(tmp_path: Path) -> None:
    counted = balance()
    recorder = ExpertRecorder(counted, tmp_path / "new" / "folder")
    counted.add(report([1, 2, 3]))
    counted.add(report([0, 0, 4], rank=1))
    counted.add(report([0, 0, 0]))  # nothing
    recorder.close()
    load = read_load(tmp_path / "new" / "folder")
    assert load.load.tolist() == [[[1, 2, 7]]] and load.windows[0].tokens == 10
    assert (load.placement, load.ep_size, load.model, load.layers) == (TWICE, 2, "m", (1,))


def test_a_new_placement_has_a_file_of_its_own(tmp_path: Path) -> None:
    counted = balance()
    recorder = ExpertRecorder(counted, tmp_path)
    counted.add(report([1, 0, 0]))
    counted.placement = Placement(np.array([[0, 1, 2, 2]]), 3, generation=6)
    counted.add(report([0, 1, 0]))
    recorder.close()
    first, second = (read_load(file) for file in sorted(tmp_path.iterdir()))
    assert first.placement == TWICE and second.placement == counted.placement
    assert read_load(tmp_path).load.tolist() == [[[1, 0, 0]], [[0, 1, 0]]]


def test_layers_that_change_one_by_one_begin_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = balance()
    recorder = ExpertRecorder(counted, tmp_path)
    counted.add(report([1, 0, 0]))
    with monkeypatch.context() as moving:
        moving.setattr(ExpertBalance, "state", "migrating")
        counted.placement = Placement(np.array([[0, 1, 2, 2]]), 3, generation=5)
        counted.add(report([0, 1, 0]))
    counted.placement = Placement(np.array([[0, 1, 2, 2]]), 3, generation=6)
    counted.add(report([0, 0, 1]))
    recorder.close()
    assert [read_load(file).load.tolist() for file in sorted(tmp_path.iterdir())] == [
        [[[1, 1, 0]]],
        [[[0, 0, 1]]],
    ]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="record_stats = .*file'.*: File exists; name a folder"):
        ExpertRecorder(balance(), tmp_path / "file")


def test_a_full_disk_ends_the_record_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full(TraceWriter):
        def add(self, rank: int, report: object) -> None:
            raise OSError(28, "No space left on device")

    counted = balance()
    recorder = ExpertRecorder(counted, tmp_path, Full(tmp_path))
    with caplog.at_level(logging.ERROR):
        counted.add(report([1, 0, 0]))
        recorder._thread.join(5)
        counted.add(report([1, 0, 0]))
        recorder.close()
    assert "the record of the expert load ends here" in caplog.text and counted.ring.total is not None


def test_a_slow_disk_costs_reports_not_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    going = threading.Event()

    class Slow(TraceWriter):
        def add(self, rank: int, report: LoadWindow) -> None:
            assert going.wait(10)
            super().add(rank, report)

    counted = balance()
    recorder = ExpertRecorder(counted, tmp_path, Slow(tmp_path))
    for _ in range(MAX_WAITING + 9):  # one is on its way
        counted.add(report([1, 0, 0]))
    assert "reports are not in it" in caplog.text
    going.set()
    recorder.close()
    assert MAX_WAITING <= read_load(tmp_path).load.sum() <= MAX_WAITING + 1
