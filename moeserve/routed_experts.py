"""The routed experts in an engine's answer, ours, vLLM's or SGLang's, and their counts by window and phase."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.eplb.formats.arrays import parse_npy
from moeserve.eplb.formats.placement import PlacementFile
from moeserve.eplb.load import ExpertLoad, Phase, Window

WINDOWS = 32
"""Of each phase at most: the answers in the order in which they come, cut into equal parts."""
MOST_EXPERTS = 4096
"""Of a layer, unless the number is given: one wrong answer must not take all memory."""
NO_EXPERTS = (
    "the answer has no routed experts: start vLLM and SGLang with --enable-return-routed-experts, and ask for a "
    "model that has experts"
)


@dataclass(frozen=True, eq=False)
class Routed:
    """experts: [tokens, layers, top_k]; the first prompt_tokens of them are of the prompt. dense: layers without
    experts are among them, all zeros."""

    experts: npt.NDArray[Any]
    prompt_tokens: int
    dense: bool


def routed_of(answer: Any, top_k: int | None) -> list[Routed]:
    """The routed experts of each choice. ValueError where there are none, or where they are of no known shape."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, dict):
        raise ValueError(NO_EXPERTS)
    about = answer.get("meta_info") or answer.get("usage") or {}
    prompt, made = (about.get(key) for key in ("prompt_tokens", "completion_tokens"))
    if not isinstance(prompt, int) or not isinstance(made, int):
        raise ValueError("the answer does not say how many tokens prompt and completion have")
    found = [
        _decode(value, prompt, made, top_k) for value in _values(answer, answer.get("choices") or [answer])
    ]
    if not found:
        raise ValueError(NO_EXPERTS)
    # a prompt runs once, however many continuations it has
    return [found[0], *(Routed(one.experts[prompt:], 0, one.dense) for one in found[1:])]


def _values(answer: dict[str, Any], choices: list[dict[str, Any]]) -> list[Any]:
    """What stands under the names that engines use: ours and vLLM's, SGLang's for OpenAI, SGLang's own."""
    outer = (answer.get("sglext") or {}).get("routed_experts")
    if outer is not None:
        return outer if isinstance(outer, list) and outer and isinstance(outer[0], str) else [outer]
    values = []
    for choice in choices:
        for place in (choice, choice.get("sglext") or {}, choice.get("meta_info") or {}):
            if place.get("routed_experts") is not None:
                values.append(place["routed_experts"])
                break
    return values


def _decode(value: Any, prompt: int, made: int, top_k: int | None) -> Routed:
    if isinstance(value, list):  # ours: [tokens][MoE layers][top_k]
        experts = np.asarray(value)
        dense = False
    elif isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except binascii.Error:
            raise ValueError("routed_experts is no base64") from None
        experts = parse_npy(data) if data.startswith(b"\x93NUMPY") else _raw(data, prompt + made - 1, top_k)
        dense = True
    else:
        raise ValueError(f"routed_experts is a {type(value).__name__}, expected a list or base64")
    if experts.ndim != 3 or experts.dtype.kind not in "iu" or 0 in experts.shape[1:]:
        raise ValueError(
            f"routed_experts is {experts.shape} of {experts.dtype}, expected [tokens, layers, top_k]"
        )
    return Routed(experts, prompt, dense)


def _raw(data: bytes, rows: int, top_k: int | None) -> npt.NDArray[Any]:
    """SGLang's int32, which do not say their shape."""
    if top_k is None:
        raise ValueError("SGLang's routed experts do not say their shape: give --top-k")
    if rows < 1 or not data or len(data) % (4 * rows * top_k):
        raise ValueError(
            f"{len(data)} bytes of routed experts are not int32 of [{rows}, layers, top_k = {top_k}]"
        )
    return np.frombuffer(data, "<i4").reshape(rows, -1, top_k)


class Tally:
    """Counts by window and phase. Memory: WINDOWS x 2 phases x layers x experts, however many requests there are."""

    def __init__(self, num_requests: int, num_experts: int | None) -> None:
        self._num_requests, self._num_experts = num_requests, num_experts
        self._counts: dict[tuple[int, Phase], npt.NDArray[np.int64]] = {}
        self._about: dict[tuple[int, Phase], tuple[int, str]] = {}  # tokens, start
        self._shape: tuple[int, int] | None = None  # layers, top_k
        self._dense = False
        self.answers = self.tokens = 0

    def add(self, routed: Sequence[Routed]) -> None:
        """One answer; ValueError, and nothing counted, where it does not fit to those before."""
        for one in routed:
            shape = (one.experts.shape[1], one.experts.shape[2])
            if self._shape is not None and shape != self._shape:
                raise ValueError(
                    f"[layers, top_k] is {list(shape)}, {list(self._shape)} in the answers before"
                )
            low, high = (int(f(one.experts)) for f in (np.min, np.max)) if one.experts.size else (0, 0)
            limit = self._num_experts or MOST_EXPERTS
            if low < -1 or high >= limit:
                raise ValueError(f"expert ids run from {low} to {high}, expected -1 to {limit - 1}")
            self._shape = shape
            self._dense |= one.dense
        window = self.answers * WINDOWS // max(self._num_requests, WINDOWS)
        for one in routed:
            self._count(window, "prefill", one.experts[: one.prompt_tokens])
            self._count(window, "decode", one.experts[one.prompt_tokens :])
        self.answers += 1

    def _count(self, window: int, phase: Phase, experts: npt.NDArray[Any]) -> None:
        if not len(experts):
            return
        key, layers = (window, phase), experts.shape[1]
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        counts = self._counts.get(key, np.zeros((layers, self._num_experts or 1), np.int64))
        more = int(experts.max()) + 1 - counts.shape[1]
        if more > 0:
            counts = np.pad(counts, ((0, 0), (0, more)))
        for layer in range(layers):
            chosen = experts[:, layer].ravel()
            counts[layer] += np.bincount(chosen[chosen >= 0], minlength=counts.shape[1])
        self._counts[key] = counts
        tokens, begun = self._about.get(key, (0, now))
        self._about[key] = (tokens + len(experts), begun)
        self.tokens += len(experts)

    def load(self, model: str, ep_size: int, placed: PlacementFile | None) -> ExpertLoad | None:
        """What was counted; layers without experts are left out. None when nothing was."""
        if not self._counts or self._shape is None:
            return None
        experts = self._num_experts or max(counts.shape[1] for counts in self._counts.values())
        keys = sorted(self._counts)
        load = np.stack(
            [np.pad(c, ((0, 0), (0, experts - c.shape[1]))) for c in map(self._counts.__getitem__, keys)]
        )
        layers = list(range(load.shape[1]))
        if self._dense:
            layers = [layer for layer in layers if load[:, layer, 1:].any()]
            if not layers:
                raise ValueError("all expert ids are 0: " + NO_EXPERTS)
        windows = tuple(Window(phase, window, 1, *self._about[window, phase]) for window, phase in keys)
        fits = (
            placed is not None
            and (len(placed.layers), placed.ep_size) == (len(layers), ep_size)
            and placed.placement.num_experts == experts
        )
        return ExpertLoad(
            load[:, layers],
            layers=placed.layers if placed is not None and fits else tuple(layers),
            windows=windows,
            model=model,
            top_k=self._shape[1],
            ep_size=ep_size,
            placement=placed.placement if placed is not None and fits else None,
        )
