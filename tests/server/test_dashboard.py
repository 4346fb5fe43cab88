"""/dashboard: the page's files, the panels' figures as JSON, and the events of new counts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from moeserve.eplb.formats.stats import parse_stats
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import ExpertCounts
from moeserve.stats.dashboard import page_files

PANELS = ("verdict", "map", "history", "layer", "what-if", "stats.json")


@pytest.fixture
def balanced(start_server: Callable[..., Any]) -> Any:
    """A server whose model has two layers of four experts on two ranks, one slot an expert."""
    placement = Placement.identity(2, 4, 4).with_generation(7)
    topology = Topology.of(2, 4)
    balance = ExpertBalance(placement, topology, layers=(1, 2), model="toy/model", top_k=2, expert_groups=1)
    return start_server(balance=balance, metrics_compat="none", api_keys=("secret",))


def count(server: Any, rank: int, decode: list[int]) -> None:
    counts = np.array([[[0] * 4] * 2, [decode] * 2], "<u4").tobytes()
    message = ExpertCounts(rank, 5, 5, 1.0, (0, sum(decode) // 2), counts)
    server.call(lambda: server.frontend.handle(rank, message))


def get(server: Any, name: str) -> Any:
    answer = server.web.get(f"/dashboard/api/{name}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_page_is_ours_alone(server: Any) -> None:
    assert server.web.get("/dashboard").headers["location"].endswith("/dashboard/")
    page = server.web.get("/dashboard/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    linked = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert len(linked) >= 3
    for name in linked:
        answer = server.web.get(f"/dashboard/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
    tag = {"if-none-match": page.headers["etag"]}
    assert server.web.get("/dashboard/", headers=tag).status_code == 304
    for name in ("static/nothing.js", "static/..%2f__init__.py", "api/nothing"):
        assert server.web.get(f"/dashboard/{name}").status_code == 404


def test_the_page_is_small_and_asks_nobody_else() -> None:
    files = page_files()
    assert sum(len(content) for _, content in files.values()) < 150_000
    for name, (_, content) in files.items():
        addresses = set(re.findall(r"https?://[^\s\"'`<>]+", content.decode()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name


def test_a_dense_model_has_no_panels(server: Any) -> None:
    assert get(server, "summary")["state"] == "no_experts"
    for name in PANELS:
        answer = server.web.get(f"/dashboard/api/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_experts")


def test_before_traffic(balanced: Any) -> None:
    summary = get(balanced, "summary")
    assert (summary["state"], summary["model"], summary["balancer"]) == ("waiting", "toy/model", "off")
    for name in PANELS:
        answer = balanced.web.get(f"/dashboard/api/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_expert_load")


def test_panels_say_what_status_and_stats_say(balanced: Any) -> None:
    count(balanced, 0, [3, 1, 0, 0])
    count(balanced, 1, [1, 1, 1, 1])
    status = balanced.web.get("/eplb/status").json()
    summary, verdict = get(balanced, "summary"), get(balanced, "verdict?phase=decode")
    assert summary["generation"] == 7 and summary["digest"] == status["digest"]
    assert summary["last_time"] is not None and list(summary["windows"]) == ["decode"]
    # 4 + 2 of 8 on rank 0
    assert verdict["mean"] == status["imbalance"]["decode"]["mean"] == verdict["recent"]["mean"] == 1.5
    metrics = balanced.web.get("/metrics").text
    for stat in ("mean", "worst"):
        shown = re.findall(rf'imbalance_ratio{{.*phase="decode",stat="{stat}".*}} ([\d.]+)', metrics)
        assert shown == [str(verdict["recent"][stat])]
    assert get(balanced, "map?phase=decode&by=rank")["values"] == [[1.5, 0.5]] * 2
    assert get(balanced, "history?layer=1") == get(balanced, "history?layer=1&phase=decode")
    assert get(balanced, "layer?layer=1&window=0")["counts"] == [4, 2, 1, 1]
    assert get(balanced, "what-if?ep_size=4&extra=0")["points"][0]["ep_size"] == 4
    load = parse_stats(get(balanced, "stats.json"))
    assert load.load.tolist() == parse_stats(balanced.web.get("/eplb/stats.json").json()).load.tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        "map?by=node",
        "map?phase=prefill",
        "map?window=-1",
        "layer?layer=2",
        "history?layer=x",
        "what-if?extra=99",
    ],
)
def test_wrong_parameters_are_named(balanced: Any, wrong: str) -> None:
    count(balanced, 0, [1, 1, 1, 1])
    answer = balanced.web.get(f"/dashboard/api/{wrong}")
    name = re.findall(r"\?(\w+)", wrong)[0]
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(f"{name} = ")


def test_new_counts_make_new_answers_and_an_event(balanced: Any) -> None:
    count(balanced, 0, [1, 1, 1, 1])
    assert get(balanced, "layer")["counts"] == [1, 1, 1, 1]
    with httpx.stream("GET", f"{balanced.url}/dashboard/events", timeout=10) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        before = json.loads(next(lines)[6:])
        count(balanced, 1, [0, 2, 0, 0])
        after = json.loads(next(lines)[6:])
    assert before["version"] != after["version"] and after["time"] > before["time"]
    assert get(balanced, "layer")["counts"] == [1, 3, 1, 1]
    assert get(balanced, "summary")["version"] == after["version"]


def test_an_open_page_does_not_hold_up_the_end(balanced: Any) -> None:
    with httpx.stream("GET", f"{balanced.url}/dashboard/events", timeout=10) as stream:
        balanced.loop.call_soon_threadsafe(balanced.http.stop)
        lines = list(stream.iter_lines())
    balanced.thread.join(10)
    assert balanced.exit_code == [0] and lines[0] == "retry: 1000"
