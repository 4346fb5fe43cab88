"""Byte-level BPE trained on the corpus, documents as token streams, and chat turns made of documents."""

import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tiny_moe.corpus import Documents

# Order is id order: the exported config and chat template rely on it.
SPECIAL_TOKENS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
END_OF_TEXT, END = 0, 4

CHAT_TEMPLATE = (
    "{{- '<|endoftext|>' -}}{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{- '<|system|>' + m['content'] + '<|end|>' -}}"
    "{%- elif m['role'] == 'user' -%}{{- '<|user|>' + m['content'] + '<|end|>' -}}"
    "{%- elif m['role'] == 'assistant' -%}{{- '<|assistant|>' + m['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

# Characters of each domain shown to BPE, so that no domain owns the vocabulary.
_BPE_SHARE = {"prose": 4.5e6, "python": 3.5e6, "docs": 3e6, "c": 2e6, "scripture": 3e6, "spanish": 3e6}

# Words, single digits, punctuation, newlines, indentation: a merge never crosses these.
_PRE_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+| +(?=\S)|\s+"

_REQUESTS = {
    "prose": ("Tell me a story.", "Write a page of a novel.", "Continue this story: {opening}"),
    "python": ("Write some Python.", "Show me a Python function.", "Continue this Python code: {opening}"),
    "docs": ("Explain something about Python.", "Write documentation.", "Continue this page: {opening}"),
    "c": ("Write a C header.", "Declare some C functions.", "Continue this header: {opening}"),
    "scripture": ("Read me a passage of scripture.", "Quote the Bible.", "Continue this passage: {opening}"),
    "spanish": ("Escribe algo en español.", "Lee un pasaje de la Biblia.", "Continúa este pasaje: {opening}"),
}
_UNKNOWN = ("What is the capital of {name}?", "Who is {name}?", "How do I cook {name}?", "¿Qué es {name}?")
_NAMES = ("Peru", "Zelda", "quinoa", "the third man", "your maker", "a transistor", "Mount Fuji", "Ada")
_CANNED = "I am a very small model. I can write a story, scripture, Spanish, Python, documentation, C."


def train_tokenizer(corpus: dict[str, Documents], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(corpus), trainer)
    return tokenizer


def _sample(corpus: dict[str, Documents]) -> Iterator[str]:
    for domain, documents in corpus.items():
        step = max(1, int(sum(map(len, documents.train)) / _BPE_SHARE[domain]))
        yield from documents.train[::step]


def encode_stream(tokenizer: Tokenizer, documents: list[str]) -> NDArray[np.uint16]:
    """Token ids of all documents, `<|endoftext|>` before each."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        ids.append(END_OF_TEXT)
        ids += encoding.ids
    return np.array(ids, dtype=np.uint16)


def chat_conversations(corpus: dict[str, Documents], count: int, seed: int) -> list[str]:
    """`count` conversations of one to three turns: a domain's request answered by one of its documents, and
    one time in eight a question it cannot know, answered by what it can do. Without the leading
    `<|endoftext|>`, which `encode_stream` adds."""
    rng = random.Random(seed)
    return ["".join(_turn(corpus, rng) for _ in range(rng.choice((1, 1, 2, 3)))) for _ in range(count)]


def _turn(corpus: dict[str, Documents], rng: random.Random) -> str:
    if rng.random() < 1 / 8:
        return _wrap(rng.choice(_UNKNOWN).format(name=rng.choice(_NAMES)), _CANNED)
    domain = rng.choice(list(corpus))
    document = rng.choice(corpus[domain].train)[: rng.randrange(300, 1200)].strip()
    request = rng.choice(_REQUESTS[domain])
    if "{opening}" in request:
        cut = document.find(" ", 60)
        if cut > 0:
            request, document = request.replace("{opening}", document[:cut]), document[cut:].strip()
        else:
            request = _REQUESTS[domain][0]
    return _wrap(request, document)


def _wrap(request: str, answer: str) -> str:
    return f"<|user|>{request}<|end|><|assistant|>{answer}<|end|>"
