"""A recording holds what was given, in a format that eplb-offline reads, however its writer ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeserve.eplb.formats.detect import read_load
from moeserve.stats.snapshot import LoadWindow
from moeserve.stats.trace import TraceWriter, whole_lines

HEAD = {
    "format": "moeserve.expert_load", "version": 1, "model": "m", "num_experts": 3, "top_k": 1,
    "expert_groups": 1, "layers": [1, 2], "ep_size": 3, "ranks_per_node": None, "placement": None,
}  # fmt: skip


def report(at: float, prefill: int = 0, decode: int = 0, step: int = 0) -> LoadWindow:
    load = np.zeros((2, 2, 3), np.int64)
    load[0, :, 0], load[1, :, 2] = prefill, decode
    return LoadWindow(step, step + 10, at - 1.0, at, (prefill, decode), load)


def writer(folder: Path, **options: Any) -> TraceWriter:
    made = TraceWriter(folder, **options)
    made.begin(HEAD)
    return made


def decoded(path: Path) -> list[int]:
    load = read_load(path).of_phase("decode")
    assert (load.load[:, :, :2] == 0).all()
    return [int(n) for n in load.load[:, 0, 2]]


def test_windows_are_sums_of_ten_seconds_and_phases_stay_apart(tmp_path: Path) -> None:
    trace = writer(tmp_path)
    for second in range(25):
        trace.add(0, report(1000.0 + second, prefill=second == 3, decode=1, step=10 * second))
    growing = read_load(tmp_path)  # the last five seconds are not there yet
    assert [(w.phase, w.start_step, w.steps, w.tokens) for w in growing.windows] == [
        ("prefill", 0, 100, 1), ("decode", 0, 100, 10), ("decode", 100, 100, 10),
    ]  # fmt: skip
    trace.close()
    assert decoded(tmp_path) == [10, 10, 5]
    (file,) = tmp_path.iterdir()
    assert file.suffixes[-2:] == [".json", ".gz"] and decoded(file) == [10, 10, 5]
    assert read_load(file).windows[0].start_time == "1970-01-01T00:16:39Z"


def test_all_ranks_have_as_many_reports_in_a_window(tmp_path: Path) -> None:
    trace = writer(tmp_path)
    for second in range(20):
        for rank in (0, 1, 2):
            trace.add(rank, report(1000.0 + second + rank / 10, decode=1, step=10 * second))
    trace.close()
    assert decoded(tmp_path) == [30, 30]
    assert [(w.start_step, w.steps) for w in read_load(tmp_path).windows] == [(0, 100), (100, 100)]


def test_a_pause_ends_a_window(tmp_path: Path) -> None:
    trace = writer(tmp_path)
    trace.add(0, report(1000.0, decode=1))
    trace.add(0, report(1100.0, decode=2))
    trace.close()
    assert decoded(tmp_path) == [1, 2]


def test_files_are_rotated_and_the_oldest_go(tmp_path: Path) -> None:
    trace = writer(tmp_path, window_seconds=1.0, windows_per_file=2)
    for second in range(7):
        trace.add(0, report(1000.0 + second, decode=second + 1))
    assert len(list(tmp_path.glob("*.json.gz"))) == 3 and not list(tmp_path.glob("*.json.part"))
    assert decoded(tmp_path) == [1, 2, 3, 4, 5, 6]  # the seventh may still grow
    trace.flush()
    assert len(list(tmp_path.glob("*.json.part"))) == 1
    assert decoded(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    one = next(tmp_path.glob("*.json.gz")).stat().st_size
    trace.close()
    small = writer(tmp_path, window_seconds=1.0, windows_per_file=2, max_bytes=2 * one)
    small.add(0, report(2000.0, decode=8))
    small.close()
    assert decoded(tmp_path)[-1] == 8 and len(list(tmp_path.iterdir())) <= 2


def test_another_placement_begins_another_file(tmp_path: Path) -> None:
    trace = writer(tmp_path, window_seconds=1.0)
    trace.add(0, report(1000.0, decode=1))
    trace.begin({**HEAD, "ep_size": 1})
    trace.add(0, report(1000.5, decode=2))  # the same second: another name all the same
    trace.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert decoded(tmp_path) == [1, 2] and read_load(tmp_path).ep_size == 1


def test_any_cut_of_a_growing_file_loses_the_last_line_only(tmp_path: Path) -> None:
    trace = writer(tmp_path, window_seconds=1.0)
    for second in range(3):
        trace.add(0, report(1000.0 + second, decode=second + 1))
    (file,) = tmp_path.glob("*.part")
    data = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(ends[1], len(data) + 1):
        torn = tmp_path / "torn.json"
        torn.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends) - 1
        assert decoded(torn) == [1, 2, 3][:whole]
    for cut in (0, 5, ends[0] - 1, ends[0]):
        torn.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="torn.json: "):
            read_load(torn)
    assert whole_lines(b"a\nb\nhalf") == b"a\nb\n]}\n"


def test_what_a_killed_writer_left_is_packed_by_the_next_but_not_from_a_living_one(tmp_path: Path) -> None:
    living = writer(tmp_path, window_seconds=1.0)
    living.add(0, report(1000.0, decode=1))
    living.flush()
    (file,) = tmp_path.glob("*.part")
    left = tmp_path / file.name.replace("-0000", "-0001")
    left.write_bytes(file.read_bytes() + b',{"phase":"dec')
    TraceWriter(tmp_path)
    assert file.exists() and not left.exists() and decoded(tmp_path) == [1, 1]
    living.close()


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trace import report, writer
trace = writer(Path({folder!r}), window_seconds=1.0, windows_per_file=50)
for number in range(1_000_000):
    trace.add(0, report(1000.0 + number, decode=number + 1))
    print(number + 1, flush=True)
"""


def test_sigkill_loses_at_most_the_last_window(tmp_path: Path) -> None:
    program = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 70:  # until a file was packed
        pass
    os.kill(process.pid, signal.SIGKILL)
    done = int((process.stdout.read().split() or ["70"])[-1])
    process.wait()
    found = decoded(tmp_path)
    assert found == list(range(1, len(found) + 1)) and done - 1 <= len(found) <= done
    assert list(tmp_path.glob("*.json.gz"))
    TraceWriter(tmp_path)
    assert decoded(tmp_path) == found and not list(tmp_path.glob("*.part"))
