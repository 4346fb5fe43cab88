"""Our own OpenAPI document under a fuzzer, and LangChain, which speaks through it: both once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.online.fakes import Engine


def test_schema_has_the_declared_statuses_and_the_model(server: Any) -> None:
    schema = server.web.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = schema["paths"][path]["post"]["responses"]
        assert set(responses) == {"200", "400", "401", "404", "413", "429", "500", "503", "504"}
        name = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert schema["components"]["schemas"][name.rsplit("/", 1)[1]]["properties"]["model"]["enum"] == [
            "toy/model"
        ]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    for page in ("/docs", "/redoc"):  # they would load scripts from elsewhere
        assert server.web.get(page).status_code == 404


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_and_no_undeclared_answer(
    start_server: Any, tmp_path: Path
) -> None:
    pytest.importorskip("schemathesis")
    # short, else most of the time goes into the toy's speech
    server = start_server(max_seq_len=64, max_choices=3, balance=Engine().balance)
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--max-examples", "25", "--continue-on-failure", "--suppress-health-check=all", "--no-color"]
    command += ["--checks", checks, "--seed", "1", "--phases", "examples,coverage,fuzzing"]
    command += ["--exclude-path", "/readyz", "--exclude-path", "/health"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert server.call(lambda: server.frontend.in_flight) == 0


@pytest.mark.slow
def test_langchain(server: Any) -> None:
    langchain = pytest.importorskip("langchain_openai")
    common: dict[str, Any] = {
        "model": "toy/model",
        "base_url": f"{server.url}/v1",
        "api_key": "none",
        "seed": 1,
    }
    chat = langchain.ChatOpenAI(**common, temperature=0, max_retries=0)
    speech = "The quick brown fox costs 5 € in 日本, naïve 🦊 said. STOP here\n"
    assert chat.invoke("Hello").content == speech
    assert "".join(chunk.content for chunk in chat.stream("Hello")) == speech
    assert [message.content for message in chat.batch(["Hello", "again"])] == [speech, speech]
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke("Hello")
    assert len(scored.response_metadata["logprobs"]["content"]) == scored.usage_metadata["output_tokens"]
    text = langchain.OpenAI(**common, temperature=0, max_tokens=200, max_retries=0)
    assert text.invoke("Say") == speech
    assert "".join(text.stream("Say")) == speech
