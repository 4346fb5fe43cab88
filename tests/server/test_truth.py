"""The page, /eplb/status, /metrics and eplb-offline on the exported file say the same numbers, with and without a
balancer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeserve import offline
from moeserve.eplb.formats.detect import read_load
from moeserve.eplb.metrics import imbalance, rank_load
from moeserve.eplb.synthetic import Traffic
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import ExpertCounts
from tests.online.fakes import EXPERTS, LAYERS, RANKS, SLOTS, STEPS, TOPOLOGY, Engine, skewed


def gauge(text: str, name: str, **labels: str) -> dict[str, float]:
    """The samples of a metric with these labels, by `stat`."""
    return {
        sample.labels["stat"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


def report(path: Path, phase: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert offline.main(["report", str(path), "--phase", phase, "--report", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["placements"].values()
    assert isinstance(found, dict)
    return found


def check(server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six digits everywhere: that is what status has."""

    def page(name: str) -> Any:
        return server.web.get(f"/dashboard/api/{name}").json()

    status, text = server.web.get("/eplb/status").json(), server.web.get("/metrics").text
    exported = tmp_path / "stats.json"
    exported.write_bytes(server.web.get("/eplb/stats.json").content)
    assert read_load(exported).load.tolist() == json_load(page("stats.json"))
    assert list(status["imbalance"]) == ["prefill", "decode"]
    for phase, figures in status["imbalance"].items():
        shown, offline_says = page(f"verdict?phase={phase}"), report(exported, phase, capsys)
        recent, scraped = shown["recent"], gauge(text, "moeserve_eplb_imbalance_ratio", phase=phase)
        assert {stat: round(recent[stat], 6) for stat in scraped} == {
            stat: figures[stat] for stat in ("mean", "median", "worst")
        }
        assert {stat: round(value, 6) for stat, value in scraped.items()} == {
            stat: figures[stat] for stat in scraped
        }
        assert figures["kept"]["mean"] == shown["mean"] == round(offline_says["mean"], 6)
        assert figures["kept"]["worst"] == shown["worst"] == round(offline_says["worst"], 6)
        assert figures["kept"]["windows"] == shown["windows"]
        history = page(f"history?phase={phase}&layer=0")
        assert np.mean(history["in_force"]) == pytest.approx(offline_says["mean"], abs=1e-4)
        by_layer = [page(f"history?phase={phase}&layer={i}")["chosen"] for i in range(LAYERS)]
        if history["basis"] == "placement":
            assert np.mean(by_layer, axis=1) == pytest.approx(offline_says["by_layer"], abs=1e-4)
        if figures["measured"] is not None:
            given = gauge(text, "moeserve_eplb_measured_imbalance_ratio", phase=phase)
            assert {stat: round(value, 6) for stat, value in given.items()} == figures["measured"]
            assert round(recent["measured_mean"], 6) == figures["measured"]["mean"]
    summary = page("summary")
    for key in ("generation", "digest", "routing", "num_slots", "ep_size", "survives_rank_loss"):
        assert summary[key] == status[key]
    assert summary["balancer"] == status["state"]
    assert page("rebalances")["rebalances"] == status["rebalances"]


def json_load(document: Any) -> Any:
    return [window["load"] for window in document["windows"]]


def test_with_a_placement_that_stays(
    start_server: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placement = Placement(np.tile([*range(EXPERTS), 0, 1, 2, 3], (LAYERS, 1)), EXPERTS, generation=4)
    balance = ExpertBalance(placement, TOPOLOGY, layers=(3, 5, 7), model="m", top_k=2, expert_groups=1)
    server = start_server(balance=balance, metrics_compat="none")
    traffic = Traffic.make(LAYERS, EXPERTS)
    counts = traffic.counts(traffic.mixes("drift", 24), 4000)
    for step in range(0, 24, 2):
        parts = counts[step : step + 2] // RANKS
        tokens = (int(parts[0, 0].sum()) // 2, int(parts[1, 0].sum()) // 2)
        for rank in range(RANKS):
            message = ExpertCounts(rank, step + 2, 2, 1.0, tokens, parts.astype("<u4").tobytes())
            server.call(lambda rank=rank, message=message: server.frontend.handle(rank, message))
    check(server, tmp_path, capsys)
    # and the figure of the last 30 s is the formula on the file's windows, summed
    load = read_load(tmp_path / "stats.json").of_phase("decode")
    ranks = rank_load(load.load.sum(axis=0), placement, Topology.of(RANKS, SLOTS))
    figures = server.web.get("/eplb/status").json()["imbalance"]["decode"]
    assert figures["window_steps"] == 24 and figures["mean"] == round(float(imbalance(ranks).mean()), 6)


@pytest.mark.parametrize("routing", ["shares", "step"])
def test_with_a_balancer_at_work(
    routing: str, start_server: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine(windows=4, min_gain=0.02, routing=routing)
    for i in range(10):
        engine.window(skewed(0 if i < 5 else 7, seed=i), skewed(3, seed=100 + i))
    assert engine.balance.placement.generation > 1
    check(start_server(balance=engine.balance, metrics_compat="none"), tmp_path, capsys)


def test_rank_tokens_are_the_counts(start_server: Callable[..., Any]) -> None:
    """What /metrics adds up is what the windows hold, times nothing."""
    engine = Engine(windows=2)
    for i in range(3):
        engine.count(skewed(0, seed=i))
    server = start_server(balance=engine.balance, metrics_compat="none")
    families = text_string_to_metric_families(server.web.get("/metrics").text)
    total = sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "moeserve_eplb_rank_tokens_total"
    )
    assert engine.step == 3 * STEPS
    assert total == sum(window.load.sum() for window in engine.balance.ring.windows)
