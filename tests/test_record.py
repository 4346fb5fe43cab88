"""Expert load recorded over HTTP is what the answers hold, in each engine's published shape."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeserve.__main__ import main
from moeserve.eplb.formats.detect import read_load
from moeserve.eplb.formats.placement import PlacementFile, format_placement
from moeserve.eplb.types import Placement

LAYERS, TOP_K, EXPERTS = 3, 2, 8
Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


@pytest.fixture
def engine() -> Iterator[Callable[[Answer], str]]:
    """engine(answer): the URL of a server whose POSTs are answered with (status, JSON value)."""
    servers: list[ThreadingHTTPServer] = []

    def begin(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                self.reply(*answer(self.path, body))

            def do_GET(self) -> None:
                self.reply(*answer(self.path, {}))

            def reply(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                if status == 429:
                    self.send_header("retry-after", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

        servers.append(Server(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def routed(prompt: int, made: int) -> np.ndarray[Any, Any]:
    """[prompt + made - 1, LAYERS, TOP_K]: layer 0 dense; prompts choose 1 and 2, completions 3 and 7."""
    experts = np.zeros((prompt + made - 1, LAYERS, TOP_K), np.uint8)
    experts[:prompt, 1:] = [1, 2]
    experts[prompt:, 1:] = [3, 7]
    return experts


def npy(experts: np.ndarray[Any, Any]) -> str:
    file = io.BytesIO()
    np.save(file, experts)
    return base64.b64encode(file.getvalue()).decode()


def raw(experts: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(experts.astype("<i4").tobytes()).decode()


def vllm(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    if path == "/v1/models":
        return 200, {"data": [{"id": "served"}]}
    if path == "/eplb/placement":
        return 404, {"detail": "Not Found"}
    assert body["model"] == "served" and body["max_tokens"] == 5 and body["stream"] is False
    usage = {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    choice = {"index": 0, "text": "x", "routed_experts": npy(routed(4, 5))}
    return 200, {"model": "served", "choices": [choice] * body.get("n", 1), "usage": usage}


def sglang(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    if path == "/v1/models":
        return 200, {"data": [{"id": "served"}]}
    if path == "/eplb/placement":
        return 404, {}
    assert body["return_routed_experts"] is True
    if path == "/generate":
        assert body["sampling_params"] == {"max_new_tokens": 5} and "model" not in body
        meta = {"prompt_tokens": 4, "completion_tokens": 5, "routed_experts": raw(routed(4, 5))}
        return 200, {"text": "x", "meta_info": meta}
    usage = {"prompt_tokens": 4, "completion_tokens": 5}
    return 200, {"choices": [{"text": "x"}], "usage": usage, "sglext": {"routed_experts": raw(routed(4, 5))}}


def run(tmp_path: Path, url: str, lines: list[Any], *flags: str) -> tuple[int, Path]:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "stats.json"
    requests.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    given = ["--url", url, "--requests", str(requests), "-o", str(output), "--max-tokens", "5"]
    return main(["record", *given, *flags]), output


@pytest.mark.parametrize(
    ("answer", "line", "flags"),
    [
        (vllm, "tell me", []),
        (vllm, {"messages": [{"role": "user", "content": "tell me"}]}, []),
        (vllm, {"custom_id": "1", "body": {"prompt": [1, 2, 3, 4]}}, []),
        (sglang, {"prompt": "tell me"}, ["--top-k", "2"]),
        (sglang, {"text": "tell me"}, ["--top-k", "2"]),
    ],
    ids=["vllm text", "vllm chat", "vllm batch", "sglang openai", "sglang generate"],
)
def test_peers_answers_are_counted_by_phase(
    answer: Answer, line: Any, flags: list[str], tmp_path: Path, engine: Callable[[Answer], str]
) -> None:
    code, output = run(tmp_path, engine(answer), [line] * 3, *flags, "--ep-size", "4", "--num-experts", "8")
    assert code == 0
    load = read_load(output)
    assert (load.layers, load.top_k, load.num_experts, load.ep_size) == ((1, 2), TOP_K, EXPERTS, 4)
    assert load.model == ("" if "text" in line and answer is sglang else "served")
    prefill, decode = (load.of_phase(phase) for phase in ("prefill", "decode"))  # type: ignore[arg-type]
    assert prefill.load.sum(axis=0).tolist() == [[0, 12, 12, 0, 0, 0, 0, 0]] * 2
    assert decode.load.sum(axis=0).tolist() == [[0, 0, 0, 12, 0, 0, 0, 12]] * 2
    assert sum(window.tokens for window in decode.windows) == 12
    assert [window.start_step for window in prefill.windows] == [0, 1, 2]


def test_a_prompt_counts_once_however_many_continue_it(tmp_path: Path, engine: Any) -> None:
    code, output = run(tmp_path, engine(vllm), [{"prompt": "tell me", "n": 3}])
    assert code == 0
    assert [window.tokens for window in read_load(output).windows] == [12, 4]


def test_windows_stay_few_and_equal(tmp_path: Path, engine: Any) -> None:
    code, output = run(tmp_path, engine(vllm), ["tell me"] * 96)
    windows = read_load(output).of_phase("decode").windows
    assert code == 0 and [w.tokens for w in windows] == [12] * 32


def test_our_server_says_what_layers_and_placement_it_has(tmp_path: Path, engine: Any) -> None:
    placement = Placement.identity(2, 8, 8).with_generation(3)
    text = format_placement(PlacementFile(placement, 4, (5, 6), "served"))

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/eplb/placement":
            return 200, json.loads(text)
        status, value = vllm(path, body)
        for choice in value.get("choices", []):
            choice["routed_experts"] = routed(4, 5)[:, 1:].tolist()
        return status, value

    code, output = run(tmp_path, engine(answer), ["tell me"])
    load = read_load(output)
    assert code == 0 and (load.layers, load.ep_size, load.placement) == ((5, 6), 4, placement)


def test_a_busy_server_is_asked_again(tmp_path: Path, engine: Any) -> None:
    busy = iter([True, True, False])

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body and next(busy, False):
            return 429, {"error": {"message": "later"}}
        return vllm(path, body)

    assert run(tmp_path, engine(answer), ["tell me"], "--concurrency", "1")[0] == 0


def test_failures_are_named_and_the_rest_is_kept(
    tmp_path: Path, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("prompt") == "long":
            return 400, {"error": {"message": "maximum context length is 10 tokens"}}
        return vllm(path, body)

    code, output = run(tmp_path, engine(answer), ["tell me", "", "long", "tell me"])
    told = capsys.readouterr()
    assert code == 1 and "2 answers, 16 tokens" in told.out
    assert "not recorded: line 3: 400: maximum context length is 10 tokens" in told.err
    assert f"1 of 3 requests are not in {output}" in told.err
    assert sum(window.tokens for window in read_load(output).windows) == 16


def without(key: str, value: Any = None) -> Answer:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, found = vllm(path, body)
        for choice in found.get("choices", []):
            choice[key] = value
        return status, found

    return answer


def refusing(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return (500, {"message": "out of memory"}) if body else vllm(path, body)


@pytest.mark.parametrize(
    ("answer", "flags", "words"),
    [
        (without("routed_experts"), [], "no routed experts: start vLLM and SGLang with --enable-return"),
        (without("routed_experts", "%%%"), [], "routed_experts is no base64"),
        (without("routed_experts", 7), [], "routed_experts is a int, expected a list or base64"),
        (without("routed_experts", [[1, 2]]), [], "routed_experts is (1, 2) of int64, expected [tokens"),
        (sglang, [], "do not say their shape: give --top-k"),
        (sglang, ["--top-k", "5"], "bytes of routed experts are not int32 of [8, layers, top_k = 5]"),
        (vllm, ["--num-experts", "5"], "expert ids run from 0 to 7, expected -1 to 4"),
        (refusing, [], "500: out of memory"),
    ],
)
def test_what_cannot_be_recorded_is_said(
    answer: Answer,
    flags: list[str],
    words: str,
    tmp_path: Path,
    engine: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, output = run(tmp_path, engine(answer), ["tell me"] * 20, *flags)
    assert code == 1 and not output.exists()
    assert re.search(rf"nothing was recorded: line \d+: .*{re.escape(words)}", capsys.readouterr().err)


def test_a_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    assert run(tmp_path, "http://127.0.0.1:9", ["tell me"] * 500)[0] == 1
    assert "http://127.0.0.1:9: " in capsys.readouterr().err and time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"x": 1}, "line 1: is no request: give one of prompt, messages"),
        ("{broken", "line 1: broken JSON: "),
        ({"prompt": ["a", "b"]}, "line 1: prompt has several prompts: give them a line each"),
        ("   ", "there is no request in it"),
    ],
)
def test_wrong_requests_are_named(
    line: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "http://127.0.0.1:9", [line])[0] == 2
    assert words in capsys.readouterr().err
