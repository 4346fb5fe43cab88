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
        load.add(layer, torch.tensor([1, 3]).expand(rows, 2))


def test_reports_once_a_second_what_came_since() -> None:
    load = ExpertLoad(num_layers=2, num_experts=4)
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

    assert reporter.due(2, 300.0) is None
    step(load, 1)
    assert reporter.due(3, 301.0) is None
    again = reporter.due(4, 302.0)
    assert again is not None and again.tokens == (1, 0) and again.steps == 2


def test_steps_of_other_replicas_alone_are_no_news() -> None:
    load = ExpertLoad(num_layers=2, num_experts=4)
    reporter = ExpertReporter(load, rank=0, top_k=2)
    step(load, 0)
    assert reporter.due(1, 0.0) is None
    assert reporter.due(1, 1.0) is None
    step(load, 1)
    assert reporter.due(2, 1.1) is None
    report = reporter.due(2, 2.2)
    assert report is not None and report.steps == 1
