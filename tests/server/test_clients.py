"""OpenAI's own client in strict mode against a real server over the toy engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest


def test_lists_and_finds_the_model(server: Any) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["toy/model"]
    assert client.models.retrieve("toy/model").id == "toy/model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_completion(server: Any) -> None:
    got = server.client().completions.create(
        model="toy/model", prompt="Say it", temperature=0, max_tokens=200
    )
    assert got.choices[0].text == "The quick brown fox costs 5 € in 日本, naïve 🦊 said. STOP here\n"
    assert got.choices[0].finish_reason == "stop"
    assert (
        got.usage is not None
        and got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    )
    assert got.system_fingerprint and got.system_fingerprint.startswith("fp_")


def test_chat(server: Any) -> None:
    got = server.client().chat.completions.create(
        model="toy/model",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        temperature=0,
        max_completion_tokens=3,
    )
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None and got.usage.completion_tokens == 3


@pytest.mark.parametrize("stop", [None, "STOP", ["never", " € in 日"], ["🦊"]])
def test_streams_join_to_the_whole(server: Any, stop: Any) -> None:
    client = server.client()
    asked: dict[str, Any] = {
        "model": "toy/model",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
        "stop": stop,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert "\ufffd" not in text
    for word in [stop] if isinstance(stop, str) else stop or []:
        assert word not in text
    *_, last, usage = chunks
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert usage.choices == [] and usage.usage is not None and whole.usage is not None
    assert usage.usage.model_dump() == whole.usage.model_dump()
