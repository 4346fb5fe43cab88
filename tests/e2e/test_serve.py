"""The server as its users meet it: a real process, real ranks, the embedded model, real clients."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moeserve.config import EMBEDDED_MODEL

ServerProcess = Any  # of conftest.py, which tests do not import
Start = Callable[..., ServerProcess]

MODEL = "tiny_model"
pytestmark = [pytest.mark.slow, pytest.mark.multi_rank]
PROMPTS = ["It is a truth", "def main(", "In the beginning God", "#include <", "Y dijo Dios"]
EP4_DP = ("--tp-size", "4", "--ep-size", "4", "--enable-attention-dp")
EP2_TP = ("--tp-size", "2", "--ep-size", "2")


def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def continue_greedily(server: ServerProcess, prompt: str, max_tokens: int = 24) -> str:
    answer = client(server).completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0
    )
    return answer.choices[0].text


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def metric(server: ServerProcess, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_four_ranks_serve_chat_and_streams_and_drain_on_sigterm(start_server: Start) -> None:
    server = start_server(*EP4_DP)
    api = client(server)
    chat = api.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Tell me about Paris."}], max_tokens=24
    )
    assert chat.usage is not None and chat.usage.completion_tokens <= 24
    assert len(server.rank_pids()) == 4
    texts = [continue_greedily(server, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:  # the same beside others
        together = list(pool.map(lambda prompt: continue_greedily(server, prompt), PROMPTS))
    assert together == texts

    stream = api.completions.create(
        model=MODEL, prompt="Once", max_tokens=60, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.get("/readyz").status_code == 503)
    assert server.get("/livez").status_code == 200
    with pytest.raises(openai.InternalServerError) as refused:
        continue_greedily(server, "late")
    assert refused.value.status_code == 503
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.wait_exit() == 0


def test_a_killed_rank_ends_the_engine_and_is_named_last(start_server: Start) -> None:
    server = start_server(*EP4_DP)
    ranks = server.rank_pids()
    failures: list[Exception] = []

    def ask() -> None:
        try:
            continue_greedily(server, "Once", max_tokens=900)
        except openai.APIError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: metric(server, "moeserve_num_requests_running") > 0)
    os.kill(ranks[2], signal.SIGKILL)
    wait_until(lambda: _not_ready(server), seconds=2)
    assert server.wait_exit() == 1
    asking.join()
    assert len(failures) == 1, "a request whose rank died must get an error, not silence"
    assert f"rank 2 (pid {ranks[2]}) was killed by SIGKILL" in server.lines[-1]
    assert all(map(gone, ranks))


def _not_ready(server: ServerProcess) -> bool:
    try:
        return server.get("/readyz").status_code == 503
    except httpx.TransportError:
        return True


def test_ctrl_c_while_it_loads_ends_it_without_a_word(start_server: Start) -> None:
    server = start_server(*EP2_TP, wait=False)
    wait_until(lambda: bool(server.processes()))  # the fork server, which imports torch
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.wait_exit() == 0
    assert "Traceback" not in server.output and "Error" not in server.output


def test_no_rank_outlives_a_killed_server(start_server: Start) -> None:
    server = start_server(*EP2_TP)
    below = server.processes()
    assert len(server.rank_pids()) == 2
    server.process.kill()
    wait_until(lambda: all(map(gone, below)))


def test_a_hundred_disconnects_leave_nothing_behind(start_server: Start) -> None:
    server = start_server("--max-batch-size", "16")
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 900, "stream": True, "ignore_eos": True}

    def leave_early(number: int) -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            if number % 3:
                next(answer.iter_lines())

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(leave_early, range(100)))
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
    wait_until(lambda: not any(metric(server, f"moeserve_{name}") for name in names))
    assert continue_greedily(server, "Once", 4)


def test_what_cannot_fit_is_refused_and_disturbs_nobody(start_server: Start) -> None:
    server = start_server("--kv-cache-config.max-tokens", "256")
    api = client(server)
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(continue_greedily, server, "Once", 100)
        for prompt, max_tokens in (([5] * 600, 1), ([5] * 200, 100)):
            with pytest.raises(openai.BadRequestError) as refused:
                api.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens)
            assert refused.value.code == "context_length_exceeded"
            assert "maximum context length is 256 tokens" in refused.value.message
        assert len(good.result()) > 0


def test_ten_thousand_requests_are_refused_beyond_the_queue(start_server: Start) -> None:
    server = start_server("--max-queued-requests", "64", "--max-batch-size", "8")
    body = json.dumps({"model": MODEL, "prompt": "Once", "max_tokens": 1})

    def ask_fifty_times(_: int) -> list[int]:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        codes = []
        for _ in range(50):
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            codes.append(answer.status)
        connection.close()
        return codes

    before = resident_mib(server.process.pid)
    with ThreadPoolExecutor(200) as pool:
        codes = [code for some in pool.map(ask_fifty_times, range(200)) for code in some]
    assert set(codes) == {200, 429} and len(codes) == 10_000
    assert resident_mib(server.process.pid) < before + 100
    assert continue_greedily(server, "Once", 4)


def resident_mib(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) // 1024


def copy_model(directory: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED_MODEL, directory / "model"))


def cut_weights(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def spoil_header(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:8] + b"x" * 100 + data[108:])


def cut_config(model: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text[: len(text) // 2])


def other_tokenizer(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))


BROKEN_MODELS = [
    (lambda model: (model / "model.safetensors").unlink(), "model.safetensors"),
    (cut_weights, "model.safetensors"),
    (spoil_header, "model.safetensors"),
    (cut_config, "config.json"),
    (lambda model: (model / "config.json").unlink(), "config.json"),
    (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda model: (model / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    (other_tokenizer, "tokenizer.json"),
]


@pytest.mark.parametrize(("damage", "named"), BROKEN_MODELS)
def test_a_broken_model_is_named_in_one_line(
    damage: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    model = copy_model(tmp_path)
    damage(model)
    done = subprocess.run(
        [sys.executable, "-m", "moeserve", "generate", str(model), "--prompt", "Once", "--tp-size", "2"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("moeserve: ") and named in last
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "moeserve", "serve", "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert f"port: {port} cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr
