"""/eplb/* and the balance metrics, on counts that a toy engine never made."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeserve.eplb.formats.placement import parse_placement
from moeserve.eplb.formats.stats import parse_stats
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import ExpertCounts, RankReady

PATHS = ("/eplb/stats.json", "/eplb/placement", "/eplb/status")


@pytest.fixture
def balanced(start_server: Callable[..., Any]) -> Any:
    """A server whose model has two layers of four experts on two ranks, one slot an expert."""
    placement = Placement.identity(2, 4, 4).with_generation(7)
    topology = Topology.of(2, 4)
    balance = ExpertBalance(placement, topology, layers=(1, 2), model="toy/model", top_k=2, expert_groups=1)
    return start_server(balance=balance, metrics_compat="none")


def count(server: Any, rank: int, decode: list[int]) -> None:
    counts = np.array([[[0] * 4] * 2, [decode] * 2], "<u4").tobytes()
    message = ExpertCounts(rank, 5, 5, 1.0, (0, sum(decode) // 2), counts)
    server.call(lambda: server.frontend.handle(rank, message))


def test_a_dense_model_has_nothing_to_balance(server: Any) -> None:
    for path in PATHS:
        answer = server.web.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "no_experts"
    assert "moeserve_eplb" not in server.web.get("/metrics").text


def test_before_traffic(balanced: Any) -> None:
    answer = balanced.web.get("/eplb/stats.json")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "no_expert_load"
    assert balanced.web.get("/eplb/status").json()["imbalance"] == {}
    names = {f.name for f in text_string_to_metric_families(balanced.web.get("/metrics").text) if f.samples}
    assert "moeserve_eplb_imbalance_ratio" not in names


def test_counts_become_files_status_and_metrics(balanced: Any) -> None:
    count(balanced, 0, [3, 1, 0, 0])
    count(balanced, 1, [1, 1, 1, 1])
    load = parse_stats(balanced.web.get("/eplb/stats.json").json())
    assert load.load.tolist() == [[[4, 2, 1, 1]] * 2] and load.windows[0].tokens == 4
    placed = parse_placement(balanced.web.get("/eplb/placement").json()).placement
    status = balanced.web.get("/eplb/status").json()
    assert (placed.digest, placed.generation) == (status["digest"], status["generation"])
    assert status["imbalance"]["decode"]["mean"] == 1.5
    fingerprint = balanced.client().completions.create(model="toy/model", prompt="x", max_tokens=1)
    assert fingerprint.system_fingerprint.endswith("_e7")

    ready = RankReady(1, 1, 1000, 1024, placement_generation=7)
    balanced.call(lambda: balanced.frontend.handle(1, ready))
    text = balanced.web.get("/metrics").text
    found = {
        (s.name, *(value for name, value in sorted(s.labels.items()) if name != "model_name")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name.startswith("moeserve_eplb")
    }
    balancer = {key: found.pop(key) for key in list(found) if "rank_tokens" not in key[0] and not found[key]}
    assert len(balancer) > 10 and ("moeserve_eplb_rebalancing",) in balancer  # all 0: nothing ever moves
    assert found == {
        **{("moeserve_eplb_imbalance_ratio", "decode", stat): 1.5 for stat in ("worst", "median", "mean")},
        ("moeserve_eplb_placement_generation", "1"): 7.0,
        ("moeserve_eplb_rank_tokens_total", "prefill", "0"): 0.0,
        ("moeserve_eplb_rank_tokens_total", "prefill", "1"): 0.0,
        ("moeserve_eplb_rank_tokens_total", "decode", "0"): 12.0,
        ("moeserve_eplb_rank_tokens_total", "decode", "1"): 4.0,
    }
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; all but its verdict was checked")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stdout + done.stderr
