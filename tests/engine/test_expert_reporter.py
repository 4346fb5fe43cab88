"""When a rank reports its counts, and what it says."""

from __future__ import annotations

import numpy as np
import torch

from moeserve.engine.expert_reporter import ExpertReporter
from moeserve.messages import ExpertCounts, decode_from_rank, encode
from moeserve.stats.expert_load import ExpertLoad


def step(load: ExpertLoad, rows: int, decode: bool = False) -> None:
    """A step of so many rows, each with experts 1 and 3 in both layers."""
    load.begin_step(torch.ones(rows, dtype=torch.bool), torch.full((rows,), decode))
    for layer in range(2):
        load.add(layer, torch.tensor([1, 3]).expand(rows, 2), torch.tensor([5, 3]).expand(rows, 2))


def test_reports_once_a_second_what_came_since() -> None:
    load = ExpertLoad(num_layers=2, num_experts=4, num_slots=6)
    reporter = ExpertReporter(load, rank=3, top_k=2)
    assert reporter.due(0, 100.0) is None  # nothing ran: no clock runs
    step(load, 5)
    assert reporter.due(1, 200.0) is None
    step(load, 2, decode=True)
    assert reporter.due(2, 200.9) is None
    report = reporter.due(2, 201.25)  # idle since
    assert report is not None
    assert decode_from_rank(encode(report)) == report
    assert isinstance(report, ExpertCounts)
    assert (report.rank, report.step, report.steps, report.seconds) == (3, 2, 2, 1.25)
    assert report.tokens == (5, 2)
    counts = np.frombuffer(report.counts, "<u4").reshape(2, 2, 4)
    assert counts.tolist() == [[[0, 5, 0, 5]] * 2, [[0, 2, 0, 2]] * 2]
    slots = np.frombuffer(report.slot_counts, "<u4").reshape(2, 2, 6)
    assert slots.tolist() == [[[0, 0, 0, 5, 0, 5]] * 2, [[0, 0, 0, 2, 0, 2]] * 2]

    assert reporter.due(2, 300.0) is None
    step(load, 1)
    assert reporter.due(3, 301.0) is None
    again = reporter.due(4, 302.0)
    assert again is not None and again.tokens == (1, 0) and again.steps == 2


def test_steps_of_other_replicas_alone_are_no_news() -> None:
    load = ExpertLoad(num_layers=2, num_experts=4, num_slots=6)
    reporter = ExpertReporter(load, rank=0, top_k=2)
    step(load, 0)
    assert reporter.due(1, 0.0) is None
    assert reporter.due(1, 1.0) is None
    step(load, 1)
    assert reporter.due(2, 1.1) is None
    report = reporter.due(2, 2.2)
    assert report is not None and report.steps == 1


def test_windows_end_at_multiples_of_their_steps_on_every_rank() -> None:
    load = ExpertLoad(num_layers=2, num_experts=4, num_slots=6)
    reporter = ExpertReporter(load, rank=0, top_k=2, window_steps=3)
    reports = []
    for number in range(1, 8):
        step(load, int(number < 6))  # then only other ranks have rows
        reports.append(reporter.due(number, 10.0 * number))
    assert [report is not None for report in reports] == [False, False, True, False, False, True, False]
    assert [(r.step, r.steps, r.tokens) for r in reports if r] == [(3, 3, (3, 0)), (6, 3, (2, 0))]
    assert reporter.due(7, 70.9) is None
    rest = reporter.due(7, 71.1)  # the traffic has stopped
    assert rest is not None and (rest.step, rest.steps) == (7, 1)
    step(load, 1)
    assert reporter.due(8, 100.0) is None
    step(load, 1)
    again = reporter.due(9, 100.1)
    assert again is not None and (again.step, again.steps, again.tokens) == (9, 2, (2, 0))
