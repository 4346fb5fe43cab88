"""Online balancing as its user meets it: a server that follows its traffic, and placements that are given to it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from moeserve.eplb import cli

pytestmark = [pytest.mark.slow, pytest.mark.multi_rank]
BALANCER = "--moe-config.load-balancer"
FOUR = ("--tp-size", "4", "--enable-attention-dp", f"{BALANCER}.num-slots", "40")
ONLINE = (f"{BALANCER}.layer-updates-per-iter", "2", f"{BALANCER}.online.window-steps", "10")
SPANISH = [
    "Y dijo Dios: ",
    "En el principio",
    "Porque de tal manera",
    "Y aconteció que",
    "Bienaventurados",
] * 4


def complete(url: str) -> list[str]:
    """Greedy answers to Spanish prompts, which a few experts take."""
    body = {
        "model": "tiny_model",
        "prompt": SPANISH,
        "max_tokens": 60,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def status(server: Any) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/eplb/status").json()
    return found


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_follows_its_traffic_and_takes_placements(
    start_server: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats, placement = tmp_path / "stats.json", tmp_path / "placement.json"
    server = start_server(*FOUR, *ONLINE)
    assert status(server)["state"] == "idle" and server.get("/health").json()["balancer"] == "idle"
    httpx.post(f"{server.url}/eplb/pause")
    texts = complete(server.url)
    until(lambda: status(server)["imbalance"])
    before = status(server)
    assert (before["generation"], before["state"]) == (0, "paused")
    stats.write_bytes(server.get("/eplb/stats.json").content)

    httpx.post(f"{server.url}/eplb/resume")
    for _ in range(2):
        assert complete(server.url) == texts  # while experts move
    until(lambda: status(server)["state"] == "idle")
    after = status(server)
    applied = [record for record in after["rebalances"] if record["result"] == "applied"]
    assert after["generation"] > 1 and after["digest"] != before["digest"]
    assert sum(record["moves"] for record in applied) > 0 and applied[-1]["bytes"] > 0
    assert after["imbalance"]["decode"]["measured"]["mean"] < 1 + 0.5 * (
        before["imbalance"]["decode"]["measured"]["mean"] - 1
    )
    assert f"generation {after['generation']}" in server.output  # said in the log

    capsys.readouterr()
    assert cli.main([str(stats), "-o", str(placement), "--num-slots", "40", "--ep-size", "4"]) == 0
    wanted = json.loads(placement.read_text())["digest"]
    httpx.post(f"{server.url}/eplb/pause")
    given = httpx.post(f"{server.url}/eplb/placement", content=placement.read_bytes())
    assert given.status_code == 202, given.text
    assert complete(server.url) == texts
    until(lambda: status(server)["state"] == "paused")
    assert status(server)["digest"] == wanted and status(server)["rebalances"][0]["result"] == "applied"
    metrics = server.get("/metrics").text
    name = server.get("/eplb/placement").json()["generation"]
    for rank in range(4):
        assert f'rank="{rank}"}} {float(name)}' in metrics
    other = json.loads(placement.read_text()) | {"ep_size": 8}
    refused = httpx.post(f"{server.url}/eplb/placement", json=other)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "ep_size"
    server.process.terminate()
    assert server.wait_exit() == 0

    again = start_server(*FOUR, f"{BALANCER}.placement", str(placement))
    assert status(again)["digest"] == wanted and status(again)["state"] == "off"
    assert complete(again.url) == texts


def test_a_killed_solver_is_told_and_the_server_serves_on(start_server: Callable[..., Any]) -> None:
    server = start_server(*FOUR, *ONLINE)
    texts = complete(server.url)
    kills = 0
    while status(server)["state"] != "dead":
        for pid in solvers(server.process.pid):
            os.kill(pid, signal.SIGKILL)
            kills += 1
        assert complete(server.url) == texts
        assert server.get("/readyz").status_code == 200 and kills < 40
    health = server.get("/health")
    assert health.status_code == 200 and health.json()["ready"] and health.json()["balancer"] == "dead"
    assert "crashed too often" in health.json()["balancer_reason"]
    assert httpx.post(f"{server.url}/eplb/resume").json()["state"] != "dead"
    server.process.terminate()
    assert server.wait_exit() == 0 and not solvers(server.process.pid)


def solvers(parent: int) -> list[int]:
    """Processes of eplb's service below the server."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{entry}/cmdline").read_bytes()
            above = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if b"moeserve.eplb.service" in text and int(above) == parent:
            found.append(int(entry))
    return found
