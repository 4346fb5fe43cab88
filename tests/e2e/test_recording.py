"""A served record is what the API returned, whoever wrote it down; and it outlives the server."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from moeserve.__main__ import main
from moeserve.eplb.formats.detect import read_load
from moeserve.eplb.formats.stats import parse_stats

pytestmark = [pytest.mark.slow, pytest.mark.multi_rank]
PROMPTS = ["It is a truth universally acknowledged, that", "def main(self", "Y dijo Dios: ", "Once more"]


def wait_for(tokens: int, get: Callable[[], Any], seconds: float = 15.0) -> Any:
    """The load once it has so many tokens."""
    deadline = time.monotonic() + seconds
    while True:
        load = get()
        found = 0 if load is None else sum(window.tokens for window in load.windows)
        if found == tokens:
            return load
        assert found < tokens and time.monotonic() < deadline, f"{found} of {tokens} tokens were counted"
        time.sleep(0.1)


ONLINE = (
    *("--moe-config.load-balancer.num-slots", "40", "--moe-config.load-balancer.layer-updates-per-iter", "2"),
    *("--moe-config.load-balancer.online.window-steps", "10"),
)


@pytest.mark.parametrize("flags", [(), ONLINE], ids=["static", "online"])
def test_record_api_and_file_agree_and_survive_sigkill(
    flags: tuple[str, ...], start_server: Callable[..., Any], tmp_path: Path
) -> None:
    """Also while experts move: what is counted is what the answers say was chosen."""
    folder, requests, output = tmp_path / "kept", tmp_path / "requests.jsonl", tmp_path / "recorded.json"
    server = start_server(
        *("--tp-size", "2", "--ep-size", "2", "--enable-attention-dp", "--record-stats", str(folder)),
        *("--kv-cache-config.enable-block-reuse", "false", *flags),
    )
    lines = [
        {"prompt": text, "temperature": 1, "seed": i, "max_tokens": 40, "ignore_eos": True}
        for i, text in enumerate(PROMPTS * 6)
    ]
    requests.write_text("\n".join(map(json.dumps, lines)))
    assert main(["record", "--url", server.url, "--requests", str(requests), "-o", str(output)]) == 0
    recorded = read_load(output)
    tokens = sum(window.tokens for window in recorded.windows)

    def served() -> Any:
        answer = server.get("/eplb/stats.json")
        return parse_stats(answer.json()) if answer.status_code == 200 else None

    load = wait_for(tokens, served)
    kept = wait_for(tokens, lambda: read_load(folder) if any(folder.glob("*.part")) else None)
    assert recorded.layers == load.layers == kept.layers and recorded.ep_size == load.ep_size == 2
    for phase in ("prefill", "decode"):
        counts = [each.of_phase(phase).load.sum(axis=0) for each in (recorded, load, kept)]
        assert np.array_equal(counts[0], counts[1]) and np.array_equal(counts[0], counts[2])

    body = {"model": "tiny_model", "prompt": "more", "max_tokens": 200, "ignore_eos": True}
    status = server.get("/eplb/status").json()
    assert bool(flags) == any(one["result"] == "applied" for one in status["rebalances"])
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    after = read_load(folder)
    assert sum(window.tokens for window in after.windows) >= tokens
