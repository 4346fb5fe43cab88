"""SGLang's summary of balance is the mean of mean / max over the passes that were counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import ExpertCounts


def samples(server: Any) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(server.web.get("/metrics").text)
    return {
        (s.name.removeprefix("sglang:eplb_balancedness_"), s.labels["forward_mode"]): s.value
        for family in families
        for s in family.samples
        if s.name.startswith("sglang:eplb")
    }


def test_each_pass_counts_once(start_server: Callable[..., Any]) -> None:
    placement = Placement.identity(2, 4, 4)
    topology = Topology.of(2, 4)
    balance = ExpertBalance(placement, topology, layers=(1, 2), model="toy/model", top_k=1, expert_groups=1)
    server = start_server(balance=balance, metrics_compat="sglang")

    def count(rank: int, prefill: list[int], decode: list[int], step: int) -> None:
        data = np.array([[prefill] * 2, [decode] * 2], "<u4").tobytes()
        message = ExpertCounts(rank, step, 5, 1.0, (sum(prefill), sum(decode)), data)
        server.call(lambda: server.frontend.handle(rank, message))

    nothing = [0] * 4
    count(0, nothing, [3, 1, 0, 0], 5)
    assert set(samples(server).values()) == {0.0}  # rank 1 is to come
    count(1, nothing, [0, 0, 4, 0], 5)
    count(0, [8, 0, 0, 0], [4, 0, 0, 0], 10)  # 4 against 4 until here: 1.0 for 5 steps
    count(1, nothing, nothing, 10)
    count(0, nothing, [1, 0, 0, 0], 15)  # 4 against 0, so mean / max = 0.5
    assert samples(server) == {
        ("count", "decode"): 10.0,
        ("sum", "decode"): pytest.approx(5 * 1.0 + 5 * 0.5),
        ("count", "extend"): 5.0,
        ("sum", "extend"): pytest.approx(5 * 0.5),
    }
