"""From deltas to the bytes of an answer: whole JSON objects and server-sent events, for both endpoints.

Pure but for the clock and the id at the start. A chunk of plain text joins parts made once a request.
"""

from __future__ import annotations

import math
import time
import uuid
from typing import Any, Protocol

import msgspec
import numpy as np

from moeserve.messages import TokenLogprob
from moeserve.server.errors import ApiError
from moeserve.server.generation import Delta, Generation
from moeserve.server.resolve import Resolved
from moeserve.server.settings import ServerSettings
from moeserve.text import Tokenizer

encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"
LOWEST = -9999.0  # JSON has no minus infinity


class Renderer(Protocol):
    """Makes the answer of one request."""

    def chunks(self, deltas: list[Delta], generation: Generation) -> bytes:
        """The events of one step, joined."""

    def end(self, generation: Generation) -> bytes:
        """The events after the last delta."""

    def whole(self, deltas: list[Delta], generation: Generation) -> bytes:
        """The answer without streaming, from all deltas."""


class _Answer:
    """What both endpoints' answers begin with."""

    def __init__(
        self,
        kind: str,
        prefix: str,
        resolved: Resolved,
        tokenizer: Tokenizer,
        settings: ServerSettings,
        fingerprint: str,
    ) -> None:
        self._resolved = resolved
        self._tokenizer = tokenizer
        self._settings = settings
        self._head: dict[str, Any] = {
            "id": prefix + uuid.uuid4().hex,
            "object": kind,
            "created": int(time.time()),
            "model": settings.model_name,
            "system_fingerprint": fingerprint,
        }
        self._opening = b"data: " + encode(self._head)[:-1] + b',"choices":['
        self._num_prompt_tokens = sum(map(len, resolved.prompts))

    def _event(self, choice: bytes, generation: Generation) -> bytes:
        if not self._resolved.continuous_usage:
            return b"%b%b]}\n\n" % (self._opening, choice)
        return b'%b%b],"usage":%b}\n\n' % (self._opening, choice, encode(self._usage(generation)))

    def end(self, generation: Generation) -> bytes:
        if not self._resolved.include_usage:
            return DONE
        return b'%b],"usage":%b}\n\n%b' % (self._opening, encode(self._usage(generation)), DONE)

    def _usage(self, generation: Generation) -> dict[str, Any]:
        made = generation.num_generated
        cached = sum(s.cached_tokens for s in generation.sequences if s.index % self._resolved.n == 0)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._num_prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _whole(self, choices: list[dict[str, Any]], generation: Generation) -> bytes:
        return encode({**self._head, "choices": choices, "usage": self._usage(generation)})

    def _with_experts(self, choice: dict[str, Any], delta: Delta, generation: Generation) -> dict[str, Any]:
        """delta: the choice's last one."""
        if delta.routed_experts is not None:
            sequence = generation.sequences[delta.index]
            num_tokens = len(sequence.prompt) + sequence.num_generated - 1  # the last one was never put in
            choice["routed_experts"] = routed_experts(delta.routed_experts, num_tokens, self._settings)
        return choice


class ChatRenderer(_Answer):
    def __init__(
        self, resolved: Resolved, tokenizer: Tokenizer, settings: ServerSettings, fingerprint: str
    ) -> None:
        kind = "chat.completion.chunk" if resolved.stream else "chat.completion"
        super().__init__(kind, "chatcmpl-", resolved, tokenizer, settings, fingerprint)
        self._begun: set[int] = set()
        self._held: dict[int, list[dict[str, Any]]] = {}

    def chunks(self, deltas: list[Delta], generation: Generation) -> bytes:
        events = []
        for delta in deltas:
            index = delta.index
            logprobs = b"null"
            if delta.logprobs is not None:
                held = self._held.setdefault(index, [])
                held += self._entries(delta.logprobs)
            if delta.text or index not in self._begun or (delta.finish_reason and self._held.get(index)):
                if index in self._begun:
                    content = b'{"content":%b}' % encode(delta.text)
                else:
                    self._begun.add(index)
                    content = b'{"role":"assistant","content":%b}' % encode(delta.text)
                if index in self._held:
                    logprobs = encode({"content": self._held.pop(index), "refusal": None})
                choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null}' % (
                    index,
                    content,
                    logprobs,
                )
                events.append(self._event(choice, generation))
            if delta.finish_reason is not None:
                last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": delta.finish_reason}
                events.append(self._event(encode(self._with_experts(last, delta, generation)), generation))
        return b"".join(events)

    def whole(self, deltas: list[Delta], generation: Generation) -> bytes:
        choices = []
        for index, own in enumerate(_by_choice(deltas, len(generation.sequences))):
            text = "".join(delta.text for delta in own)
            logprobs = None
            if self._resolved.params.logprobs is not None:
                entries = [entry for delta in own for entry in self._entries(delta.logprobs or [])]
                logprobs = {"content": entries, "refusal": None}
            choice = {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": logprobs,
                "finish_reason": own[-1].finish_reason,
            }
            choices.append(self._with_experts(choice, own[-1], generation))
        return self._whole(choices, generation)

    def _entries(self, logprobs: list[TokenLogprob]) -> list[dict[str, Any]]:
        return [
            {
                **self._entry(one.token_id, one.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in one.top],
            }
            for one in logprobs
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, LOWEST),
            "bytes": list(data),
        }


class CompletionRenderer(_Answer):
    def __init__(
        self, resolved: Resolved, tokenizer: Tokenizer, settings: ServerSettings, fingerprint: str
    ) -> None:
        super().__init__("text_completion", "cmpl-", resolved, tokenizer, settings, fingerprint)
        self._held: dict[int, list[Delta]] = {}
        self._offsets: dict[int, int] = {}
        self._begun: set[int] = set()

    def chunks(self, deltas: list[Delta], generation: Generation) -> bytes:
        events = []
        for delta in deltas:
            index = delta.index
            text = delta.text
            first = index not in self._begun
            if self._resolved.echo and first:
                text = self._resolved.texts[index // self._resolved.n] + text
            scored = self._resolved.params.logprobs is not None
            if scored:
                self._held.setdefault(index, []).append(delta)
            if not text and delta.finish_reason is None:
                continue
            self._begun.add(index)
            logprobs = self._logprobs(self._held.pop(index), index) if scored else None
            choice = {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": delta.finish_reason,
            }
            if delta.finish_reason is not None:
                choice = self._with_experts(choice, delta, generation)
            events.append(self._event(encode(choice), generation))
        return b"".join(events)

    def whole(self, deltas: list[Delta], generation: Generation) -> bytes:
        choices = []
        for index, own in enumerate(_by_choice(deltas, len(generation.sequences))):
            text = "".join(delta.text for delta in own)
            if self._resolved.echo:
                text = self._resolved.texts[index // self._resolved.n] + text
            scored = self._resolved.params.logprobs is not None
            choice = {
                "index": index,
                "text": text,
                "logprobs": self._logprobs(own, index) if scored else None,
                "finish_reason": own[-1].finish_reason,
            }
            choices.append(self._with_experts(choice, own[-1], generation))
        return self._whole(choices, generation)

    def _logprobs(self, deltas: list[Delta], index: int) -> dict[str, Any]:
        """OpenAI's old form; offsets count the characters of the choice's text (echo included)."""
        tokenizer = self._tokenizer
        tokens, values, tops, offsets = [], [], [], []
        echoed = self._resolved.texts[index // self._resolved.n] if self._resolved.echo else ""
        at = self._offsets.get(index)
        for delta in deltas:
            if delta.prompt_logprobs is not None:
                prompt = self._resolved.prompts[index // self._resolved.n]
                at = 0
                for token_id, one in zip(prompt, delta.prompt_logprobs, strict=True):
                    tokens.append(legacy_token(tokenizer, token_id))
                    offsets.append(min(at, len(echoed)))
                    values.append(None if one is None else max(one.logprob, LOWEST))
                    tops.append(None if one is None else self._top(one))
                    if at or not tokenizer.is_special(token_id) or echoed.startswith(tokens[-1]):
                        at += _characters(tokenizer.token_bytes(token_id))
            if at is None or delta.prompt_logprobs is not None:
                at = len(echoed)
            for one in delta.logprobs or []:
                tokens.append(legacy_token(tokenizer, one.token_id))
                offsets.append(at)
                values.append(max(one.logprob, LOWEST))
                tops.append(self._top(one))
                if not tokenizer.is_special(one.token_id):
                    at += _characters(tokenizer.token_bytes(one.token_id))
        self._offsets[index] = at or 0
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """The alternatives and the chosen token; of several tokens with one text the likeliest counts."""
        top: dict[str, float] = {}
        for token_id, logprob in [*one.top, (one.token_id, one.logprob)]:
            top.setdefault(legacy_token(self._tokenizer, token_id), max(logprob, LOWEST))
        return top


def legacy_token(tokenizer: Tokenizer, token_id: int) -> str:
    r"""The token's text, or bytes:\xe2\x82 where its bytes are no whole characters (as OpenAI shows them)."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def routed_experts(data: bytes, num_tokens: int, settings: ServerSettings) -> list[list[list[int]]]:
    """[num_tokens][MoE layers][top_k] expert ids from the rank's bytes, one or two an id."""
    shape = (num_tokens, settings.num_moe_layers, settings.top_k)
    width, rest = divmod(len(data), math.prod(shape)) if num_tokens else (1, 0)
    assert width in (1, 2) and rest == 0, f"{len(data)} bytes of routed experts for {shape}"
    nested: list[list[list[int]]] = np.frombuffer(data, f"<u{width}").reshape(shape).tolist()
    return nested


def error_event(error: ApiError) -> bytes:
    return b"data: %b\n\n" % error.body()


def _characters(data: bytes) -> int:
    """UTF-8 characters that begin in data."""
    return sum(1 for byte in data if byte & 0xC0 != 0x80)


def _by_choice(deltas: list[Delta], count: int) -> list[list[Delta]]:
    choices: list[list[Delta]] = [[] for _ in range(count)]
    for delta in deltas:
        choices[delta.index].append(delta)
    return choices
