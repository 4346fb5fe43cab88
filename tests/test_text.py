"""Tokenizer files, incremental decoding and stop strings: what arrives in pieces equals the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.text import IncrementalDecoder, StopMatcher, Tokenizer

MODEL_DIR = Path(__file__).parents[1] / "moeserve" / "tiny_model"
TOKENIZER = Tokenizer(MODEL_DIR)
TEXTS = st.text(alphabet=st.sampled_from("ab c\n€日🦊é\u0301\u200d👩"), max_size=30)


@given(TEXTS, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_whole_and_none_is_half_a_character(text: str, random: object) -> None:
    ids = TOKENIZER.encode(text)
    decoder = IncrementalDecoder(TOKENIZER)
    pieces = []
    while ids:
        count = random.randint(1, 3)  # type: ignore[attr-defined]
        pieces.append(decoder.push(ids[:count]))
        ids = ids[count:]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text


@given(st.lists(st.integers(0, 4095), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_tokens_give_all_their_characters(ids: list[int]) -> None:
    decoder = IncrementalDecoder(TOKENIZER)
    text = "".join([decoder.push([i]) for i in ids]) + decoder.flush()
    whole = TOKENIZER.decode(ids)
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_broken_bytes_are_not_held_for_ever() -> None:
    half = TOKENIZER.encode("🦊")[0]
    decoder = IncrementalDecoder(TOKENIZER)
    shown = "".join(decoder.push([half]) for _ in range(100))
    assert len(shown) > 80


def test_special_tokens_make_no_text() -> None:
    decoder = IncrementalDecoder(TOKENIZER)
    end = TOKENIZER.eos_token_ids[0]
    pieces = [decoder.push([i]) for i in [*[end] * 100, *TOKENIZER.encode("done"), end]]
    assert "".join(pieces) + decoder.flush() == "done"


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(0, 5), max_size=20),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_in_any_pieces(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher = StopMatcher(stops)
    shown, hit, rest = "", False, text
    for size in [*sizes, len(text)]:
        piece, hit = matcher.push(rest[:size])
        shown += piece
        rest = rest[size:]
        # nothing that could still become a stop string has been let through
        assert not any(stop in shown for stop in stops)
        if hit:
            break
    if not hit:
        shown += matcher.flush()
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    assert hit == bool(found)
    if not found:
        assert shown == text
    else:
        # as soon as a stop string is complete the text ends before it, whatever else is still incomplete
        first_end = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert text.startswith(shown) and len(shown) < first_end


def test_text_that_cannot_be_a_stop_string_is_shown_at_once() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hello\n") == ("Hello", False)
    assert matcher.push("you\n\nUs") == ("\nyou", False)
    assert matcher.push("er: no") == ("", True)


@given(TEXTS)
@settings(deadline=None)
def test_token_bytes_join_to_the_text(text: str) -> None:
    assert b"".join(TOKENIZER.token_bytes(i) for i in TOKENIZER.encode(text)).decode() == text


def test_chat_template_and_defaults() -> None:
    text = TOKENIZER.render_chat([{"role": "user", "content": "Hi"}])
    assert text == "<|endoftext|><|user|>Hi<|end|><|assistant|>"
    assert TOKENIZER.encode(text)[:2] == [0, 1]
    assert TOKENIZER.eos_token_ids == (4, 0)
    assert (TOKENIZER.defaults.temperature, TOKENIZER.defaults.top_p) == (0.7, 0.9)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copy(MODEL_DIR / name, tmp_path / name)
    return tmp_path


def test_template_file_wins_and_is_sandboxed(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{{ raise_exception('no ' ~ bos_token) }}"
    )
    with pytest.raises(ValueError, match="chat template refuses them: no <|endoftext|>"):
        Tokenizer(directory).render_chat([{"role": "user", "content": "Hi"}])
    (directory / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="unsafe"):
        Tokenizer(directory).render_chat([{"role": "user", "content": "Hi"}])


def test_no_template_is_said(directory: Path) -> None:
    settings_file = directory / "tokenizer_config.json"
    values = json.loads(settings_file.read_text())
    del values["chat_template"]
    settings_file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(directory).render_chat([])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", "{", "not a tokenizer"),
        ("config.json", '{"vocab_size": 100}', "tokenizer of another model"),
        ("config.json", "[1]", "JSON object"),
        ("generation_config.json", '{"eos_tok', "not JSON"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "does not compile"),
    ],
)
def test_broken_files_are_named(directory: Path, name: str, content: str | None, said: str) -> None:
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        Tokenizer(directory)
    named = "tokenizer.json" if "vocab_size" in str(content) else name
    assert str(directory / named) in str(caught.value)
