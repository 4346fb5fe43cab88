"""Clients that leave, deadlines, draining, dying: nothing stays in flight and nobody is left without an answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from moeserve.messages import AbortRequest, AddRequest, Wake
from moeserve.server.run import HttpServer, bind

START = Callable[..., Any]
LONG: dict[str, Any] = {"model": "toy/model", "prompt": "x", "max_tokens": 900, "seed": 1}


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_a_hundred_that_leave_leave_nothing(start_server: START) -> None:
    server = start_server(step_seconds=0.01)

    def leave(number: int) -> None:
        body = {**LONG, "stream": number % 2 == 0, "n": 1 + number % 3}
        if number % 2:  # in the middle of a plain request
            with pytest.raises(httpx.ReadTimeout):
                server.web.post("/v1/completions", json=body, timeout=0.05 + number / 1000)
        else:  # in the middle of a stream
            with server.web.stream("POST", "/v1/completions", json=body) as response:
                for _ in zip(range(1 + number % 5), response.iter_lines(), strict=False):
                    pass

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(leave, range(100)))
    wait_for(lambda: server.call(lambda: server.frontend.in_flight) == 0)
    wait_for(lambda: not server.call(lambda: server.link.running))
    state = server.call(
        lambda: (server.frontend.loads.tokens, server.frontend.loads.sequences, server.http.guard.active)
    )
    assert state == ([0, 0], [0, 0], 0)
    added = [m for _, m in server.link.sent if isinstance(m, AddRequest)]
    aborted = [m for _, m in server.link.sent if isinstance(m, AbortRequest)]
    assert len(added) == len(aborted) == sum(1 + number % 3 for number in range(100))


def test_an_abort_follows_the_leaving_within_a_step(start_server: START) -> None:
    server = start_server(step_seconds=0.03)
    with server.web.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        next(response.iter_lines())
    left_at = server.link.step
    wait_for(lambda: any(isinstance(message, AbortRequest) for _, message in server.link.sent))
    assert server.link.step - left_at <= 1


def test_idle_replicas_are_woken(server: Any) -> None:
    before = len(server.link.sent)
    server.client().completions.create(model="toy/model", prompt="x", max_tokens=1)
    sent = server.link.sent[before:]
    (worker,) = [replica for replica, message in sent if isinstance(message, AddRequest)]
    assert [replica for replica, message in sent if isinstance(message, Wake)] == [1 - worker]


def test_deadline(start_server: START) -> None:
    server = start_server(step_seconds=0.02, request_timeout=0.2)
    with pytest.raises(openai.InternalServerError) as caught:
        server.client().completions.create(**LONG)
    assert caught.value.status_code == 504 and caught.value.code == "request_timeout"
    assert caught.value.response.headers["x-should-retry"] == "false"
    stream = server.client(_strict_response_validation=False).completions.create(**LONG, stream=True)
    with pytest.raises(openai.APIError, match="not finished within 0.2 s"):
        assert all(chunk.choices for chunk in stream)
    assert server.client().completions.create(model="toy/model", prompt="x", max_tokens=1).choices
    assert not server.call(lambda: server.link.running)


def test_a_failed_rank_ends_everything_with_an_answer(start_server: START) -> None:
    server = start_server(step_seconds=0.02)
    streams: list[str] = []

    def stream() -> None:
        with server.web.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            streams.extend(response.iter_lines())

    with ThreadPoolExecutor(2) as pool:
        streaming = pool.submit(stream)
        plain = pool.submit(server.web.post, "/v1/completions", json={**LONG, "stream": False})
        wait_for(lambda: server.call(lambda: server.frontend.in_flight) == 2 and bool(server.link.running))
        time.sleep(0.1)
        server.call(lambda: server.link.fail("ValueError: the weights melted"))
        wait_for(lambda: server.call(server.frontend.dead.is_set))
        ready = server.web.get("/readyz")
        assert ready.status_code == 503 and ready.json()["phase"] == "dead"
        assert server.web.get("/livez").status_code == 200
        refused = server.web.post("/v1/completions", json=LONG)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_dead"
        assert plain.result().status_code == 500 and plain.result().json()["error"]["code"] == "engine_dead"
        streaming.result()
    events = [line for line in streams if line]
    assert '"code":"engine_dead"' in events[-1] and "[DONE]" not in events[-1]
    assert server.frontend.failure == "ValueError: the weights melted"
    server.thread.join(5)
    assert server.exit_code == [1]


def test_silence_makes_it_unready(start_server: START) -> None:
    server = start_server(heartbeat_timeout=0.2)
    server.link.paused = True
    wait_for(lambda: server.web.get("/readyz").status_code == 503)
    body = server.web.get("/health").json()
    assert body["phase"] == "degraded" and "ranks [0, 1]" in body["reason"]
    assert set(body["heartbeat_age_seconds"]) == {"0", "1"}
    server.link.paused = False
    wait_for(lambda: server.web.get("/readyz").status_code == 200)


def test_a_drain_that_takes_too_long_ends_with_an_answer(start_server: START) -> None:
    server = start_server(step_seconds=0.02, drain_timeout=0.2)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.web.post, "/v1/completions", json=LONG)
        wait_for(lambda: server.call(lambda: server.frontend.in_flight) == 1)
        server.loop.call_soon_threadsafe(server.http.stop)
        assert asked.result().status_code == 503
    server.thread.join(5)
    assert server.exit_code == [0]


def test_clients_that_neither_send_nor_read_do_not_hold_up_the_end(start_server: START) -> None:
    server = start_server(drain_timeout=0.1)
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    body = json.dumps(
        {**LONG, "prompt": ["x"] * 60, "stream": True, "logprobs": 5, "ignore_eos": True}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(address) as half, socket.socket() as deaf:
        half.sendall(head % 100 + b"{")
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(address)
        deaf.sendall(head % len(body) + body)  # 60 x 900 tokens of answer: more than the kernel keeps
        wait_for(lambda: not server.call(lambda: server.frontend.in_flight) and server.link.step > 900, 20)
        assert server.call(lambda: server.http.guard.active) == 1
        server.loop.call_soon_threadsafe(server.http.stop)
        server.thread.join(6)
    assert server.exit_code == [0]


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm(start_server: START, signals: int) -> None:
    """With the real signal: the server runs in this, the main thread, and the client in another."""
    donor = start_server(step_seconds=0.01)  # for its settings and its link's class
    seen: dict[str, Any] = {}

    async def main() -> int:
        link = type(donor.link)(donor.frontend.tokenizer, step_seconds=0.01)
        frontend = type(donor.frontend)(link, donor.frontend.tokenizer, donor.frontend.settings)
        listener = bind("127.0.0.1", 0)
        http = HttpServer(frontend, donor.frontend.settings, listener)
        http.handle_signals()
        carrying = asyncio.create_task(frontend.run())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = threading.Thread(target=lambda: seen.update(be_client(url, signals)))
        client.start()
        code = await asyncio.wait_for(http.serve(), 20)
        carrying.cancel()
        await asyncio.to_thread(client.join)
        return code

    assert asyncio.run(main()) == 0
    assert "error" not in seen, seen
    if signals == 1:
        assert (seen["livez"], seen["readyz"], seen["phase"], seen["work"]) == (200, 503, "draining", 503)
        assert seen["retry_after"] == "5"
        assert seen["done"] and seen["tokens"] == 60
    else:
        assert not seen["done"] and '"code":"server_draining"' in seen["last"]


def be_client(url: str, signals: int) -> dict[str, Any]:
    try:
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        seen: dict[str, Any] = {"done": False}
        body = {**LONG, "max_tokens": 60, "stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            if signals == 2:
                wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 503)
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 503)
                seen["livez"] = httpx.get(f"{url}/livez").status_code
                ready = httpx.get(f"{url}/readyz")
                seen["readyz"], seen["phase"] = ready.status_code, ready.json()["phase"]
                refused = httpx.post(f"{url}/v1/completions", json=LONG)
                seen["work"], seen["retry_after"] = refused.status_code, refused.headers.get("retry-after")
            try:
                for line in lines:
                    seen["last"] = line or seen.get("last")
                    seen["done"] |= line == "data: [DONE]"
                    if '"usage"' in line:
                        seen["tokens"] = int(line.split('"completion_tokens":')[1].split(",")[0])
            except httpx.RemoteProtocolError:
                pass
        return seen
    except BaseException as error:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return {"error": repr(error)}


def test_answers_do_not_wait_for_acknowledgements() -> None:
    listener = bind("127.0.0.1", 0)
    assert listener.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on: 40 ms an answer
    listener.close()


def test_a_port_in_use_is_named(server: Any) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(
        ValueError, match=f"port: {port} cannot be listened on at 127.0.0.1: Address already in use"
    ):
        bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_is_not_this_one_is_named(host: str) -> None:
    with pytest.raises(ValueError, match=f"host = {host}: .*; give an address of this machine"):
        bind(host, 0)
