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


def test_completion_stream_joins_to_the_whole(server: Any) -> None:
    client = server.client(_strict_response_validation=False)  # finish_reason null is not in the strict type
    asked: dict[str, Any] = {
        "model": "toy/model",
        "prompt": "Once",
        "max_tokens": 30,
        "seed": 5,
        "logprobs": 2,
    }
    whole = client.completions.create(**asked).choices[0]
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    tokens = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
    offsets = [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset]
    assert tokens == whole.logprobs.tokens and len(tokens) == 30
    assert offsets == whole.logprobs.text_offset


def test_legacy_logprobs_offsets_point_into_the_text(server: Any) -> None:
    got = server.client().completions.create(
        model="toy/model", prompt="x", max_tokens=20, temperature=0, logprobs=3
    )
    choice = got.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.text_offset and logprobs.top_logprobs
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset:].startswith(token)
    assert any(token.startswith("bytes:\\x") for token in logprobs.tokens)  # a character split over tokens
    assert all(len(top) == 3 for top in logprobs.top_logprobs)


def test_echo_scores_the_prompt(server: Any, tokenizer: Any) -> None:
    client = server.client(
        _strict_response_validation=False
    )  # the first token's null is not in the strict type
    prompt = "A 🦊 in 日本"
    ids = tokenizer.encode(prompt)
    for given in (prompt, ids):
        got = client.completions.create(
            model="toy/model", prompt=given, echo=True, logprobs=1, max_tokens=1, seed=1
        )
        choice = got.choices[0]
        assert choice.text.startswith(prompt)
        assert len(choice.logprobs.tokens) == len(ids) + 1
        assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.text_offset[0] == 0 and choice.logprobs.text_offset[-1] == len(prompt)
        assert got.usage.prompt_tokens_details.cached_tokens == len(ids) // 2
    only = client.completions.create(model="toy/model", prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    assert only.choices[0].text == prompt and only.usage.completion_tokens == 0
    assert len(only.choices[0].logprobs.tokens) == len(ids)
    plain = client.completions.create(model="toy/model", prompt=prompt, echo=True, max_tokens=0)
    assert plain.choices[0].text == prompt and plain.choices[0].logprobs is None
    chunks = list(
        client.completions.create(model="toy/model", prompt=prompt, echo=True, max_tokens=2, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks).startswith(prompt)


def test_lists_of_prompts_and_n(server: Any, tokenizer: Any) -> None:
    client = server.client()
    prompts = ["one", "two", "three"]
    got = client.completions.create(model="toy/model", prompt=prompts, n=2, max_tokens=8, seed=3)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3, 4, 5]
    as_ids = [tokenizer.encode(prompt) for prompt in prompts]
    again = client.completions.create(model="toy/model", prompt=as_ids, n=2, max_tokens=8, seed=3)
    assert [choice.text for choice in again.choices] == [choice.text for choice in got.choices]
    second = client.completions.create(model="toy/model", prompt="two", max_tokens=8, seed=4)
    assert second.choices[0].text == got.choices[3].text  # choice j has seed + j
    assert got.choices[2].text != got.choices[3].text
    assert got.usage is not None and got.usage.completion_tokens == 48
    assert got.usage.prompt_tokens == sum(map(len, as_ids))


def test_chat_logprobs_and_n(server: Any) -> None:
    client = server.client()
    asked: dict[str, Any] = {
        "model": "toy/model",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "n": 2,
        "max_tokens": 9,
        "logprobs": True,
        "top_logprobs": 4,
        "seed": 12,
    }
    got = client.chat.completions.create(**asked)
    assert len(got.choices) == 2
    for choice in got.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 9
        assert all(len(token.top_logprobs) == 4 for token in choice.logprobs.content)
        data = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert data.decode("utf-8", "replace") == choice.message.content
    streamed: dict[int, list[str]] = {0: [], 1: []}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for part in chunk.choices:
            if part.logprobs is not None:
                streamed[part.index] += [token.token for token in part.logprobs.content or []]
    for choice in got.choices:
        assert streamed[choice.index] == [token.token for token in choice.logprobs.content]  # type: ignore[union-attr]


def test_routed_experts(server: Any) -> None:
    got = server.client().completions.create(
        model="toy/model", prompt=[7, 8, 9], max_tokens=2, extra_body={"return_routed_experts": True}
    )
    experts = got.choices[0].routed_experts  # type: ignore[attr-defined]
    assert [len(experts), len(experts[0]), len(experts[0][0])] == [4, 4, 4]
    assert experts[1][0] == [16, 17, 18, 19]
    chunks = list(
        server.client().chat.completions.create(
            model="toy/model",
            messages=[{"role": "user", "content": "x"}],
            max_tokens=2,
            stream=True,
            extra_body={"return_routed_experts": True},
        )
    )
    assert chunks[-1].choices[0].routed_experts[0][0] == [0, 1, 2, 3]


def test_fields_that_clients_send_are_taken(server: Any) -> None:
    got = server.client().completions.create(
        model="toy/model",
        prompt=["x"],
        max_tokens=3,
        best_of=1,
        suffix=None,
        user="u" * 40_000,  # a body that is looked at in a thread
        extra_body={"ignore_eos": True, "stream_options": None, "unheard_of": {"a": 1}, "top_k": -1},
    )
    assert got.usage is not None and got.usage.completion_tokens == 3


def test_usage_in_every_chunk_when_asked(server: Any) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    messages: Any = [{"role": "user", "content": "x"}]
    chunks = list(
        server.client().chat.completions.create(
            model="toy/model", messages=messages, max_tokens=5, stream=True, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 5


def test_a_request_that_never_fits_is_refused_alone(server: Any) -> None:
    client = server.client()
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="KV cache holds 1000") as caught:
            client.completions.create(model="toy/model", prompt=[5] * 500, max_tokens=510, stream=stream)
        assert caught.value.code == "request_not_runnable"


def test_stream_helper_ends_well_with_a_stop(server: Any) -> None:
    messages: Any = [{"role": "user", "content": "x"}]
    with server.client().chat.completions.stream(
        model="toy/model", messages=messages, temperature=0, stop="STOP"
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "The quick brown fox costs 5 € in 日本, naïve 🦊 said. "
