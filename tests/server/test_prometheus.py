"""The shipped board and alerts ask for what a running server has, and a real Prometheus understands them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from moeserve.messages import ExpertCounts, RankReady
from moeserve.stats.prometheus import prometheus_files
from tests.online.fakes import RANKS, STEPS, Engine, skewed

BOARD = json.loads(prometheus_files()["board.json"][1])
RULES = yaml.safe_load(prometheus_files()["alerts.yml"][1])
TARGETS = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]
ALERTS = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
NAMES = {name for text in (*TARGETS, *ALERTS) for name in re.findall(r"\bmoeserve_\w+", text)}


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A balancer that has rebalanced for decode, and decided once to leave things."""
    found = Engine(windows=4, min_gain=0.02)
    for i in range(8):
        load = skewed(0, seed=i)
        found.window(load, np.flip(load, axis=1))
    measure(found, skewed(0, seed=9))
    assert {"applied", "skipped"} <= {one["result"] for one in found.balance.status()["rebalances"]}
    return found


def measure(engine: Engine, load: np.ndarray[Any, Any]) -> None:
    """A window of decode that says what each slot was given: an expert's first slot all of it."""
    placement, part = engine.balance.placement, load // RANKS
    counts = np.stack([np.zeros_like(part), part])
    slots = np.zeros((2, placement.num_layers, placement.num_slots), "<u4")
    for layer, row in enumerate(placement.slot_to_expert):
        experts, first = np.unique(row, return_index=True)
        slots[1, layer, first] = part[layer, experts]
    engine.step += STEPS
    for rank in range(RANKS):
        tokens = (0, int(part[0].sum()))
        data = (counts.astype("<u4").tobytes(), slots.tobytes())
        engine.balance.add(ExpertCounts(rank, engine.step, STEPS, 0.5, tokens, data[0], slot_counts=data[1]))
    engine.run()


@pytest.fixture
def watched(start_server: Callable[..., Any], engine: Engine) -> Any:
    server = start_server(balance=engine.balance, metrics_compat="sglang")
    server.client().completions.create(model="toy/model", prompt="x", max_tokens=4)
    for rank in range(RANKS):
        server.call(lambda rank=rank: server.frontend.handle(0, RankReady(rank, 1, 1000, 1024, 3)))
    return server


def needs(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"needs {program} (Debian: apt-get install prometheus)")
    return found


def test_every_name_of_board_and_alerts_is_a_metric(watched: Any) -> None:
    assert len(NAMES) > 20
    text = watched.web.get("/metrics").text
    have = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert have >= NAMES
    variable = BOARD["templating"]["list"][1]["query"]
    assert re.findall(r"\((\w+),", variable)[0] in have
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_the_page_offers_them(watched: Any) -> None:
    for name in ("board.json", "alerts.yml"):
        assert f'href="prometheus/{name}"' in watched.web.get("/dashboard/").text
        answer = watched.web.get(f"/dashboard/prometheus/{name}")
        assert answer.status_code == 200 and answer.content == prometheus_files()[name][1]


def test_promtool_finds_nothing_to_say(watched: Any, tmp_path: Path) -> None:
    promtool = needs("promtool")
    rules = tmp_path / "alerts.yml"
    rules.write_bytes(prometheus_files()["alerts.yml"][1])
    run = subprocess.run([promtool, "check", "rules", str(rules)], capture_output=True, text=True, timeout=20)
    assert run.returncode == 0 and "SUCCESS" in run.stdout, run.stderr
    text = watched.web.get("/metrics").text
    ours = "".join(line for line in text.splitlines(True) if "sglang" not in line)
    run = subprocess.run(
        [promtool, "check", "metrics"], input=ours, capture_output=True, text=True, timeout=20
    )
    assert run.returncode == 0, run.stdout + run.stderr


FIRES = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
- interval: 1m
  input_series:
  - {series: 'moeserve_eplb_imbalance_ratio{model_name="m",phase="decode",stat="mean"}', values: '1.5x30'}
  - {series: 'moeserve_eplb_imbalance_ratio{model_name="m",phase="prefill",stat="mean"}', values: '1.1x30'}
  - {series: 'moeserve_eplb_predicted_imbalance_ratio{model_name="m",phase="decode"}', values: '1.1x30'}
  - {series: 'moeserve_eplb_placement_generation{model_name="m",rank="0"}', values: '3x30'}
  - {series: 'moeserve_eplb_placement_generation{model_name="m",rank="1"}', values: '3x10 2x20'}
  - {series: 'moeserve_eplb_rebalances_total{model_name="m",trigger="periodic",result="failed"}', values: '0x9 1x20'}
  - {series: 'moeserve_eplb_stall_seconds_total{model_name="m"}', values: '0+3x30'}
  - {series: 'moeserve_eplb_lost_ranks{model_name="m"}', values: '0x5 1x10 2x15'}
  - {series: 'moeserve_eplb_survives_rank_loss{model_name="m"}', values: '1x5 1x10 0x15'}
  alert_rule_test:
  - {eval_time: 5m, alertname: MoeserveExpertsImbalanced, exp_alerts: []}
  - eval_time: 15m
    alertname: MoeserveExpertsImbalanced
    exp_alerts: [{exp_labels: {model_name: m, phase: decode, stat: mean, severity: warning}}]
  - eval_time: 15m
    alertname: MoeservePromiseMissed
    exp_alerts: [{exp_labels: {model_name: m, phase: decode, severity: info}}]
  - {eval_time: 9m, alertname: MoeservePlacementsDiffer, exp_alerts: []}
  - eval_time: 20m
    alertname: MoeservePlacementsDiffer
    exp_alerts: [{exp_labels: {model_name: m, severity: critical}}]
  - {eval_time: 4m, alertname: MoeserveRankLost, exp_alerts: []}
  - eval_time: 10m
    alertname: MoeserveRankLost
    exp_alerts: [{exp_labels: {model_name: m, severity: warning}}]
  - {eval_time: 10m, alertname: MoeserveNextLossEndsServing, exp_alerts: []}
  - eval_time: 20m
    alertname: MoeserveNextLossEndsServing
    exp_alerts: [{exp_labels: {model_name: m, severity: critical}}]
  - eval_time: 15m
    alertname: MoeserveRebalanceFailed
    exp_alerts: [{exp_labels: {model_name: m, trigger: periodic, result: failed, severity: warning}}]
  - eval_time: 25m
    alertname: MoeserveRebalanceStalls
    exp_alerts: [{exp_labels: {model_name: m, severity: warning}}]
"""


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """Labels and times; what an alert says is not repeated here."""
    promtool = needs("promtool")
    rules = yaml.safe_load(prometheus_files()["alerts.yml"][1])
    for group in rules["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "test.yml").write_text(FIRES)
    run = subprocess.run(
        [promtool, "test", "rules", "test.yml"], capture_output=True, text=True, timeout=30, cwd=tmp_path
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def prometheus(watched: Any, tmp_path: Path) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes the server each half second and knows the alerts."""
    program = needs("prometheus")
    (tmp_path / "alerts.yml").write_bytes(prometheus_files()["alerts.yml"][1])
    target = watched.url.removeprefix("http://")
    jobs = [{"job_name": "moeserve", "static_configs": [{"targets": [target]}]}]
    settings = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"}
    config = {"global": settings, "rule_files": ["alerts.yml"], "scrape_configs": jobs}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, f"--config.file={tmp_path}/prometheus.yml", f"--web.listen-address={address}"]
    process = subprocess.Popen([*command, f"--storage.tsdb.path={tmp_path}/data"], stderr=subprocess.DEVNULL)
    try:
        yield httpx.Client(base_url=f"http://{address}", timeout=10)
    finally:
        process.terminate()
        process.wait(20)


def query(web: httpx.Client, expression: str) -> list[Any]:
    answer = web.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    found: list[Any] = answer["data"]["result"]
    return found


@pytest.mark.slow
def test_a_real_prometheus_answers_every_expression(prometheus: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if float(query(prometheus, "count_over_time(up[1m])")[0]["value"][1]) >= 4:
                break
        except (httpx.HTTPError, IndexError, ValueError):
            pass
        assert time.monotonic() < deadline, "no sample arrived"
        time.sleep(0.2)
    for expression in TARGETS:
        assert query(prometheus, expression.replace("$model", ".*")), f"no series: {expression}"
    for mode in ("decode", "extend"):  # its colon arrives, unlike by OpenMetrics
        assert query(prometheus, f'sglang:eplb_balancedness_sum{{forward_mode="{mode}"}}')
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(ALERTS) and {rule["health"] for rule in rules} == {"ok"}
