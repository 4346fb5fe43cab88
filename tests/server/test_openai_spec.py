"""Answers and stream chunks against OpenAI's own published schema. Skipped where its file is not at hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

jsonschema = pytest.importorskip("jsonschema")

SPEC = Path(__file__).parents[3] / "shared" / "data" / "openai_openapi.json.gz"
if not SPEC.is_file():
    pytest.skip("OpenAI's API description is not at hand (not part of this project)", allow_module_level=True)

USER = [{"role": "user", "content": "Hi"}]
LEGACY_STREAM = {
    ("choices", "finish_reason")
}  # null until the end: all clients want that, the schema does not
LEGACY_ECHO = {("choices", "logprobs", "token_logprobs"), ("choices", "logprobs", "top_logprobs")}


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    document = json.loads(gzip.decompress(SPEC.read_bytes()))
    patch_nullable(document["components"]["schemas"])
    return dict(document)


def patch_nullable(node: Any) -> None:
    """The file says 3.1 but still has 3.0's nullable here and there."""
    if isinstance(node, dict):
        if node.pop("nullable", False) and "type" in node and isinstance(node["type"], str):
            node["type"] = [node["type"], "null"]
            if "enum" in node:
                node["enum"].append(None)
        for value in node.values():
            patch_nullable(value)
    elif isinstance(node, list):
        for value in node:
            patch_nullable(value)


def problems(spec: dict[str, Any], name: str, value: Any) -> set[tuple[str, ...]]:
    schema = {"$ref": f"#/components/schemas/{name}", "components": spec["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    return {path for error in validator.iter_errors(value) for path in leaves(error)}


def leaves(error: Any) -> Iterator[tuple[str, ...]]:
    """Where exactly: of an anyOf's branches, what goes wrong inside them."""
    inner = [one for one in error.context or () if one.relative_path]
    if inner:
        for one in inner:
            yield from leaves(one)
    else:
        yield tuple(part for part in error.absolute_path if isinstance(part, str))


def post(server: Any, path: str, **body: Any) -> Any:
    return server.web.post(f"/v1/{path}", json={"model": "toy/model", "seed": 1, **body}).json()


def events(server: Any, path: str, **body: Any) -> list[Any]:
    body = {
        "model": "toy/model",
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    response = server.web.post(f"/v1/{path}", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    return [json.loads(block[6:]) for block in blocks[:-2]]


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"stop": "q"}])
def test_chat(server: Any, spec: dict[str, Any], extra: dict[str, Any]) -> None:
    answer = post(server, "chat/completions", messages=USER, max_tokens=9, **extra)
    assert not problems(spec, "CreateChatCompletionResponse", answer)
    chunks = events(server, "chat/completions", messages=USER, max_tokens=9, **extra)
    for chunk in chunks:
        assert not problems(spec, "CreateChatCompletionStreamResponse", chunk)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == answer["usage"]
    assert all("usage" not in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize(
    "extra",
    [{}, {"n": 2, "prompt": ["a", "b"]}, {"logprobs": 3}, {"echo": True, "logprobs": 1, "max_tokens": 1}],
)
def test_completions(server: Any, spec: dict[str, Any], extra: dict[str, Any]) -> None:
    asked = {"prompt": "Once", "max_tokens": 9, **extra}
    allowed = LEGACY_ECHO if extra.get("echo") else set()
    answer = post(server, "completions", **asked)
    assert problems(spec, "CreateCompletionResponse", answer) <= allowed
    for chunk in events(server, "completions", **asked):
        assert problems(spec, "CreateCompletionResponse", chunk) <= allowed | LEGACY_STREAM


def test_models_and_errors(server: Any, spec: dict[str, Any]) -> None:
    assert not problems(spec, "ListModelsResponse", server.web.get("/v1/models").json())
    assert not problems(spec, "Model", server.web.get("/v1/models/toy/model").json())
    for wrong in ({"model": "x"}, {"prompt": ""}, {"stop": 5}):
        assert not problems(spec, "ErrorResponse", post(server, "completions", **{"prompt": "a", **wrong}))
    assert not problems(spec, "ErrorResponse", server.web.get("/none").json())


def test_the_check_finds_something(spec: dict[str, Any]) -> None:
    assert problems(spec, "ErrorResponse", {"error": {"message": "m", "type": "t", "param": None}})
    assert ("choices", "finish_reason") in problems(
        spec, "CreateChatCompletionResponse", {"choices": [{"finish_reason": "eos"}]}
    )
