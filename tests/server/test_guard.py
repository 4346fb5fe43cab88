"""Keys, body size, admission, request ids and probes, as a client sees them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

START = Callable[..., Any]
ASK = {"model": "toy/model", "prompt": "x", "max_tokens": 2}


def error_of(response: httpx.Response) -> dict[str, Any]:
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_keys(start_server: START) -> None:
    server = start_server(api_keys=("first", "second"))
    for key in ("first", "second"):
        assert server.client(api_key=key).completions.create(**ASK).choices
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client(api_key="third").completions.create(**ASK)
    assert caught.value.code == "invalid_api_key"
    for header in (
        {},
        {"authorization": "first"},
        {"authorization": "Basic first"},
        {"authorization": "Bearer"},
    ):
        response = server.web.get("/v1/models", headers=header)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        error_of(response)
    for path in ("/livez", "/readyz", "/health", "/version", "/metrics", "/openapi.json"):
        assert server.web.get(path).status_code == 200
    assert server.web.post("/anything").status_code == 401  # what changes something needs the key


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_get_their_answer(start_server: START, chunked: bool) -> None:
    server = start_server(max_body_bytes=10_000)
    assert server.web.post("/v1/completions", json={**ASK, "user": "u" * 9000}).status_code == 200

    def parts() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 10_000

    response = server.web.post("/v1/completions", content=parts() if chunked else b"x" * 2_000_000)
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert response.headers["connection"] == "close"


def test_request_ids(server: Any) -> None:
    given = server.web.get("/livez", headers={"x-request-id": "my-id.7"})
    assert given.headers["x-request-id"] == "my-id.7"
    made = {server.web.get("/livez", headers={"x-request-id": "a b"}).headers["x-request-id"] for _ in "12"}
    assert len(made) == 2 and "a b" not in made
    assert server.client().completions.create(**ASK)._request_id


def test_a_full_queue_is_said_and_loses_nothing(start_server: START) -> None:
    server = start_server(max_batch_size=1, max_queued_requests=3)  # 2 replicas x 1 place + 3 waiting
    server.link.paused = True
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(server.web.post, "/v1/completions", json=ASK) for _ in range(12)]
        refused = []
        while len(refused) < 7:
            refused = [one.result() for one in asked if one.done()]
        assert server.call(lambda: server.frontend.in_flight) == 5
        server.link.paused = False
        statuses = sorted(one.result().status_code for one in asked)
    assert statuses == [200] * 5 + [429] * 7
    for response in refused:
        error = error_of(response)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert response.headers["retry-after"] == "1" and response.headers["retry-after-ms"] == "1000"
    # the client's own retries get through once there is room
    assert server.client(max_retries=2).completions.create(**ASK).choices


def test_queued_prompt_tokens_are_limited(start_server: START) -> None:
    server = start_server(max_queued_tokens=1000)
    server.link.paused = True
    long = {**ASK, "prompt": [5] * 800}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.web.post, "/v1/completions", json=long)
        while not server.call(lambda: server.frontend.in_flight):
            pass
        assert server.web.post("/v1/completions", json=long).status_code == 429
        server.link.paused = False
        assert first.result().status_code == 200


def test_half_a_body_and_garbage_disturb_nobody(server: Any) -> None:
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
    for data in (head, b"\x00\x01garbage\r\n\r\n", b"GET"):
        with socket.create_connection(address) as connection:
            connection.sendall(data)
    assert server.client().completions.create(**ASK).choices
    assert server.call(lambda: server.http.guard.active) == 0


def test_threads_of_clients_get_their_own_answers(server: Any) -> None:
    client = server.client()
    alone = {seed: client.completions.create(**ASK, seed=seed).choices[0].text for seed in range(8)}
    barrier = threading.Barrier(8)

    def ask(seed: int) -> str:
        barrier.wait()
        return str(client.completions.create(**ASK, seed=seed).choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        assert dict(enumerate(pool.map(ask, range(8)))) == alone
