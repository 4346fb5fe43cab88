"""Text to tokens and back: a model directory's tokenizer and template, incremental decoding, stop strings.

Knows files and strings; nothing of requests, sequences or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

REPLACEMENT = "\ufffd"
MAX_HELD = 7  # undecodable characters: a split one shows as at most three, more are really broken
MAX_CONTEXT = 32  # tokens


@dataclass(frozen=True)
class SamplingDefaults:
    """What generation_config.json says for requests that leave a field out; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


class Tokenizer:
    """The tokenizer of a Hugging Face style directory.

    Reads tokenizer.json, and where they exist tokenizer_config.json, chat_template.jinja,
    generation_config.json and config.json. Raises ValueError that names the file which is missing or broken.
    """

    def __init__(self, model_dir: Path | str, *, vocab_size: int | None = None) -> None:
        """vocab_size: rows of the model's embedding, read from config.json when left out; a tokenizer with
        more tokens than that belongs to another model and is refused."""
        directory = Path(model_dir)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a model directory needs its tokenizer.json")
        try:
            self.backend: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from None
        config = _read_json(directory / "config.json")
        generation = _read_json(directory / "generation_config.json")
        settings = _read_json(directory / "tokenizer_config.json")
        self.vocab_size = vocab_size or int(config.get("vocab_size", self.backend.get_vocab_size()))
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.longest_token = max(map(len, vocabulary), default=1)  # characters
        largest = max(vocabulary.values(), default=-1)
        if largest >= self.vocab_size:
            raise ValueError(
                f"{path}: has token id {largest}, but the model's vocab_size is {self.vocab_size}: "
                "the tokenizer of another model; copy the one that came with these weights"
            )
        self.special_tokens = {
            key: _content(settings[key])
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
            if settings.get(key)
        }
        self.eos_token_ids = self._end_tokens(config, generation)
        self.defaults = _sampling_defaults(generation)
        self._template = _compile_template(directory, settings)
        self._special_ids = {
            i for i, token in self.backend.get_added_tokens_decoder().items() if token.special
        }
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str()).get("decoder"))
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """ValueError when the text is no Unicode (half a surrogate pair). Lets other threads run meanwhile."""
        if not text.isascii():
            text.encode()  # the library would raise TypeError
        # Of the library's calls only the one for batches gives up the interpreter's lock.
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def fewest_tokens(self, text: str) -> int:
        """No fewer than this many tokens, found without tokenizing (a normalizer may shorten text a little)."""
        return len(text) // (4 * self.longest_token)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_values: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the model's prompt. ValueError when there is no template or it refuses."""
        if self._template is None:
            raise ValueError(
                "messages: this model has no chat template (tokenizer_config.json or chat_template.jinja); "
                "send plain text to /v1/completions"
            )
        values = {**self.special_tokens, **(template_values or {})}
        try:
            return self._template.render(
                values, messages=list(messages), add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # the template is a program of the model's, its errors are of any kind
            raise ValueError(f"messages: the model's chat template refuses them: {error}") from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for; alone they need not be valid UTF-8."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self.backend.id_to_token(token_id)
        if piece is None:  # a row of the embedding that no token uses
            return b""
        if token_id in self.backend.get_added_tokens_decoder():
            return str(piece).encode()
        if self._byte_level:
            return b"".join(_BYTE_OF.get(char, char.encode()) for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def _end_tokens(self, config: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
        found = generation.get("eos_token_id", config.get("eos_token_id"))
        ids = list(found) if isinstance(found, list) else [] if found is None else [found]
        named = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        if named is not None:
            ids.append(named)
        return tuple(dict.fromkeys(int(i) for i in ids))


class IncrementalDecoder:
    """Turns a growing list of tokens into text piece by piece; the pieces join to the text of the whole.

    Text that may still change with the next token (a UTF-8 character split over tokens) is held back.
    """

    __slots__ = ("_backend", "_context", "_ids", "_shown", "_skip")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._backend = tokenizer.backend
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # tokens of pieces already shown, as context for decoding, then new ones
        self._context = 0  # how many are context
        self._shown = 0  # characters of their text that have been given out

    def push(self, ids: Sequence[int]) -> str:
        """Text that these tokens add and that is final. Best with one step's tokens at a time."""
        if not ids:
            return ""
        self._ids.extend(ids)
        text: str = self._backend.decode(self._ids, skip_special_tokens=self._skip)
        final = len(text.rstrip(REPLACEMENT))
        if final < len(text) <= final + MAX_HELD:
            new = text[self._shown : final]
            self._shown = max(self._shown, final)
            return new
        return self._take(text)

    def flush(self) -> str:
        """What is still held back, after the last token."""
        return self._take(self._backend.decode(self._ids, skip_special_tokens=self._skip))

    def _take(self, text: str) -> str:
        new = text[self._shown :]
        if new or len(self._ids) > MAX_CONTEXT:  # special tokens alone make no text
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._shown = len(self._backend.decode(self._ids, skip_special_tokens=self._skip))
        return new


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces, and lets no part of one through."""

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was found: it and what follows it is dropped)."""
        text = self._held + text
        self._held = ""
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            return text[: min(found)], True
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        if hold:
            self._held = text[-hold:]
            text = text[:-hold]
        return text, False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop (shorter than stop itself)."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: should hold a JSON object, not a {type(value).__name__}")
    return value


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _sampling_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    values = {name: generation[name] for name in names if isinstance(generation.get(name), (int, float))}
    if generation.get("do_sample") is False:
        values["temperature"] = 0.0
    return SamplingDefaults(**values)


def _compile_template(directory: Path, settings: dict[str, Any]) -> jinja2.Template | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        source: Any = path.read_text(encoding="utf-8")
    else:
        path = directory / "tokenizer_config.json"
        source = settings.get("chat_template")
    if isinstance(source, list):  # several named ones; the plain one answers chats
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if source is None:
        return None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"{path}: the chat template does not compile: {error}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-ins for bytes, as every byte-level tokenizer uses them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): bytes([byte]) for byte in plain} | {
        chr(256 + i): bytes([byte]) for i, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()
