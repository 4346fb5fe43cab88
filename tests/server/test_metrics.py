"""/metrics: names of the contract and of the boards, in Prometheus' plain text."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from moeserve.messages import EngineStats, StepDone
from moeserve.server.metrics import Histogram, ServingCollector, ServingMetrics

CONTRACT = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_ratio": "gauge",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
}


def scrape(url: str, **headers: str) -> tuple[httpx.Response, dict[str, Any]]:
    response = httpx.get(f"{url}/metrics", headers=headers)
    return response, {family.name: family for family in text_string_to_metric_families(response.text)}


def value(families: dict[str, Any], name: str, **labels: str) -> float:
    family = families.get(name) or families[re.sub("_(total|count|sum)$", "", name)]
    (found,) = [s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
    return float(found)


def test_names_and_types_are_the_contract(server: Any) -> None:
    _, families = scrape(server.url)
    for name, kind in CONTRACT.items():
        assert families[f"moeserve_{name}"].type == kind
        peer = "kv_cache_usage_perc" if name == "kv_cache_usage_ratio" else name
        assert families[f"vllm:{peer}"].type == kind
    for name in ("iteration_tokens_total", "request_prompt_tokens", "request_prefill_time_seconds"):
        assert families[f"vllm:{name}"].type == "histogram"


def test_plain_text_whatever_is_accepted(server: Any) -> None:
    wanted = "application/openmetrics-text; version=1.0.0, text/plain;version=0.0.4;q=0.5"
    response, families = scrape(server.url, accept=wanted)
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "vllm:generation_tokens_total{" in response.text
    assert not any(name.endswith("_created") for name in families)


def test_numbers(start_server: Callable[..., Any]) -> None:
    server = start_server()
    client = server.client()
    client.completions.create(model="toy/model", prompt=[5] * 10, max_tokens=7, n=2, seed=1)
    client.completions.create(model="toy/model", prompt=[5] * 10, max_tokens=99, temperature=0, stop="STOP")
    _, families = scrape(server.url)
    assert value(families, "moeserve_prompt_tokens_total") == 30
    made = value(families, "moeserve_generation_tokens_total")
    assert 14 < made < 14 + 99
    assert value(families, "vllm:generation_tokens_total", model_name="toy/model", engine="0") == made
    assert value(families, "moeserve_request_success_total", finished_reason="length") == 2
    assert value(families, "moeserve_request_success_total", finished_reason="stop") == 1
    assert value(families, "moeserve_time_to_first_token_seconds_count") == 3
    assert value(families, "moeserve_e2e_request_latency_seconds_count") == 3
    assert value(families, "moeserve_inter_token_latency_seconds_count") == made - 3
    assert value(families, "moeserve_num_requests_running") == 0
    assert value(families, "moeserve_num_requests_waiting") == 0


@given(st.lists(st.floats(0, 100), max_size=50))
def test_histogram_counts_up_to_and_with_each_bound(values: list[float]) -> None:
    histogram = Histogram((1.0, 5.0, 50.0))
    for one in values:
        histogram.observe(one)
    for bound, count in histogram.cumulative():
        assert count == sum(one <= float(bound) for one in values)
    assert histogram.total == pytest.approx(sum(values))


@pytest.mark.parametrize(
    ("compat", "expected"),
    [("none", None), ("sglang", "sglang_num_running_reqs"), ("vllm", "vllm:prompt_tokens")],
)
def test_compatibility_is_a_choice(compat: str, expected: str | None) -> None:
    gauges = dict.fromkeys(
        ("running", "waiting", "kv_usage", "preemptions", "cached_tokens", "hit_ratio"), 0.0
    )
    names = [f.name for f in ServingCollector(ServingMetrics(lambda: gauges), "m", compat).collect()]
    assert len(names) == len(set(names))
    others = [name for name in names if not name.startswith("moeserve_")]
    assert expected in others if expected else not others


def test_an_unknown_compatibility_is_refused() -> None:
    with pytest.raises(
        ValueError, match="metrics_compat: 'tgi' is not known; choose one of vllm, sglang, none"
    ):
        ServingCollector(ServingMetrics(dict), "m", "tgi")


@pytest.mark.parametrize("compat", ["none", "vllm", "sglang"])
def test_promtool_finds_nothing_but_the_peers_colons(start_server: Callable[..., Any], compat: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    server = start_server(metrics_compat=compat)
    server.client().completions.create(model="toy/model", prompt="x", max_tokens=2)
    text = server.web.get("/metrics").text
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=20
    )
    found = [
        line for line in (done.stdout + done.stderr).splitlines() if "moeserve" in line or compat != "vllm"
    ]
    assert not found
    if compat != "vllm":
        assert done.returncode == 0


def test_counters_do_not_go_back_with_a_late_heartbeat(start_server: Callable[..., Any]) -> None:
    """Ranks of one replica run the same scheduler, and their messages may overtake one another."""
    server = start_server()
    for rank, step in ((0, 1005), (1, 1003)):
        stats = EngineStats(step, 0, 0, 0, 10, 7 * step, step, preemptions=step, cached_tokens=0)
        server.call(lambda rank=rank, stats=stats: server.frontend.handle(0, StepDone(rank, [], stats)))
    assert server.call(server.frontend.replica_stats)[0].preemptions == 1005
