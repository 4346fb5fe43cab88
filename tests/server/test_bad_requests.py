"""Every wrong request gets a 4xx with all four keys, the field in param, and a sentence that names the value."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
JSON = {"content-type": "application/json"}
USER = [{"role": "user", "content": "Hi"}]

# path, change to a right request, status, param, part of the message
CASES: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (TEXT, {"model": "gpt-5"}, 404, "model", "`gpt-5` does not exist"),
    (TEXT, {"model": None}, 400, "model", "None"),
    (TEXT, {"model": ...}, 400, "model", "required"),
    (TEXT, {"prompt": ...}, 400, "prompt", "required"),
    (TEXT, {"prompt": None}, 400, "prompt", "a text, a list of token ids"),
    (TEXT, {"prompt": ""}, 400, "prompt", "none of them empty"),
    (TEXT, {"prompt": []}, 400, "prompt", "none of them empty"),
    (TEXT, {"prompt": [[]]}, 400, "prompt", "none of them empty"),
    (TEXT, {"prompt": [1, "a"]}, 400, "prompt", "[1, 'a']"),
    (TEXT, {"prompt": {"text": "x"}}, 400, "prompt", "'text': 'x'"),
    (TEXT, {"prompt": [-1]}, 400, "prompt", "[-1]"),
    (TEXT, {"prompt": [4096]}, 400, "prompt", "4096 is not accepted; token ids of this model are below 4096"),
    (
        TEXT,
        {"prompt": [5] * 1025},
        400,
        "prompt",
        "This model's maximum context length is 1024 tokens. However",
    ),
    (TEXT, {"max_tokens": 1024}, 400, "prompt", "1024 in the completion"),
    (TEXT, {"max_tokens": 0}, 400, "max_tokens", "echo"),
    (TEXT, {"max_tokens": -1}, 400, "max_tokens", "-1"),
    (TEXT, {"max_tokens": "16"}, 400, "max_tokens", "'16'"),
    (TEXT, {"max_tokens": 1.5}, 400, "max_tokens", "1.5"),
    (TEXT, {"max_tokens": True}, 400, "max_tokens", "True"),
    (TEXT, {"temperature": 2.1}, 400, "temperature", "2.1 is not accepted; input should be less than"),
    (TEXT, {"temperature": -0.1}, 400, "temperature", "-0.1"),
    (TEXT, {"temperature": "warm"}, 400, "temperature", "'warm'"),
    (TEXT, {"top_p": 1.01}, 400, "top_p", "1.01"),
    (TEXT, {"top_k": -2}, 400, "top_k", "-2"),
    (TEXT, {"min_p": 2}, 400, "min_p", "2"),
    (TEXT, {"presence_penalty": 3}, 400, "presence_penalty", "3"),
    (TEXT, {"frequency_penalty": -3}, 400, "frequency_penalty", "-3"),
    (TEXT, {"repetition_penalty": 0}, 400, "repetition_penalty", "0"),
    (TEXT, {"n": 0}, 400, "n", "0"),
    (TEXT, {"n": 129}, 400, "n", "129"),
    (TEXT, {"n": 100, "prompt": ["x"] * 11}, 400, "n", "1024 at most"),
    (TEXT, {"best_of": 3}, 400, "best_of", "equal to n"),
    (TEXT, {"seed": 1 << 63}, 400, "seed", "9223372036854775808"),
    (TEXT, {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "at most 4"),
    (TEXT, {"stop": ""}, 400, "stop", "none of them empty"),
    (TEXT, {"stop": [1]}, 400, "stop", "[1]"),
    (TEXT, {"stop": "x" * 257}, 400, "stop", "256 characters"),
    (TEXT, {"stop_token_ids": [5000]}, 400, "stop_token_ids", "5000"),
    (TEXT, {"logprobs": 6}, 400, "logprobs", "6"),
    (TEXT, {"logprobs": True}, 400, "logprobs", "True"),
    (TEXT, {"logit_bias": {"4096": 1}}, 400, "logit_bias", "'4096'"),
    (TEXT, {"logit_bias": {"the": 1}}, 400, "logit_bias", "'the'"),
    (TEXT, {"logit_bias": {"9" * 5000: 1}}, 400, "logit_bias", "'9999"),
    (TEXT, {"logit_bias": {"5": 101}}, 400, "logit_bias.5", "101"),
    (TEXT, {"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", "at most 1024"),
    (TEXT, {"suffix": "the end"}, 400, "suffix", "'the end'"),
    (TEXT, {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
    (TEXT, {"stream": "yes"}, 400, "stream", "'yes'"),
    (TEXT, {"echo": 1}, 400, "echo", "1"),
    (TEXT, {"prompt": "\ud800"}, 400, "prompt", "'\\ud800'"),
    (TEXT, {"logit_bias": {"\ud800": 1}}, 400, None, ""),
    (TEXT, {"logit_bias": {"5": float("nan")}}, 400, "logit_bias.5", "nan"),
    (TEXT, {"suffix": "\ud800"}, 400, "suffix", ""),
    (CHAT, {"messages": []}, 400, "messages", "[]"),
    (CHAT, {"messages": "Hi"}, 400, "messages", "'Hi'"),
    (CHAT, {"messages": ...}, 400, "messages", "required"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages.0.role", "required"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role", "'wizard'"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content", "a text or a list"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages.0.content",
        "parts",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "messages", "in the messages"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "a" * 500_000}]},
        400,
        "messages",
        "requested more than",
    ),
    (
        CHAT,
        {"messages": [*USER, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
        400,
        None,
        "tools",
    ),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools", "does not support"),
    (CHAT, {"tool_choice": "auto"}, 400, "tool_choice", "'auto'"),
    (CHAT, {"response_format": {"type": "json_object"}}, 400, "response_format", "json_object"),
    (CHAT, {"top_logprobs": 3}, 400, "top_logprobs", "logprobs: true"),
    (CHAT, {"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs", "21"),
    (CHAT, {"logprobs": 5}, 400, "logprobs", "5"),
    (CHAT, {"max_completion_tokens": 0}, 400, "max_completion_tokens", "0"),
    (CHAT, {"max_completion_tokens": 2000}, 400, "messages", "2000 in the completion"),
]


def check_error(response: httpx.Response, status: int, said: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert error["code"] is None or isinstance(error["code"], str)
    return dict(error)


@pytest.mark.parametrize(("path", "change", "status", "param", "said"), CASES)
def test_refused(
    server: Any, path: str, change: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    right: dict[str, Any] = {"model": "toy/model"}
    right |= {"messages": USER} if path == CHAT else {"prompt": "Hi"}
    body = {key: value for key, value in {**right, **change}.items() if value is not ...}
    content = json.dumps(body)
    error = check_error(server.web.post(path, content=content, headers=JSON), status, said)
    if param is not None:
        assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    if "maximum context length" in error["message"]:
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "said"),
    [
        ("POST", TEXT, b"{", 400, "not JSON"),
        ("POST", TEXT, b"", 400, "JSON object"),
        ("POST", TEXT, b"[1]", 400, "JSON object"),
        ("POST", TEXT, b'"text"', 400, "JSON object"),
        ("POST", TEXT, b"\xff\xfe", 400, ""),
        ("POST", TEXT, b'{"prompt": NaN}', 400, ""),
        ("POST", TEXT, b'{"prompt": ' + b"[" * 100_000, 400, ""),
        ("POST", TEXT, b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, ""),
        ("GET", TEXT, None, 405, "does not take GET"),
        ("DELETE", "/v1/models", None, 405, "does not take DELETE"),
        ("GET", "/nothing/here", None, 404, "no /nothing/here"),
        ("POST", "/v1/embeddings", b"{}", 404, "no /v1/embeddings"),
        ("GET", "/v1/models/some/other", None, 404, "some/other"),
    ],
)
def test_refused_before_it_is_a_request(
    server: Any, method: str, path: str, content: bytes | None, status: int, said: str
) -> None:
    response = server.web.request(method, path, content=content, headers=JSON)
    check_error(response, status, said)
    assert (status == 405) == ("allow" in response.headers)


def test_nothing_of_all_that_is_left_running(server: Any) -> None:
    assert server.call(lambda: server.frontend.in_flight) == 0
