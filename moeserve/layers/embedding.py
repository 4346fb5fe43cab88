"""Token embedding and output head, both cut over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moeserve.layers.context import LayerContext, Piece


class VocabMatrix:
    """A matrix [vocab, H] of which each tp rank holds ceil(vocab / tp) rows; the last ones may be padding."""

    def __init__(self, context: LayerContext, name: str, vocab_size: int, hidden_size: int):
        tp = context.mesh.tp
        self._name = name
        self.vocab_size = vocab_size
        self.rows = -(-vocab_size // tp.size)
        self.start = min(tp.rank * self.rows, vocab_size)
        self.held = min(self.rows, vocab_size - self.start)
        self.weight = context.empty(self.rows, hidden_size)
        self.weight[self.held :].zero_()

    def pieces(self) -> Iterator[Piece]:
        kept = slice(self.start, self.start + self.held)
        shape = (self.vocab_size, self.weight.shape[1])
        yield Piece(f"{self._name}.weight", shape, (kept, slice(None)), (self.weight[: self.held],))


class Embedding:
    """token ids int64 [T] -> this rank's rows [T / tp, H]."""

    def __init__(self, context: LayerContext, matrix: VocabMatrix):
        self._tp = context.mesh.tp
        self._matrix = matrix

    def __call__(self, token_ids: Tensor) -> Tensor:
        if self._tp.size == 1:
            return self._matrix.weight[token_ids]
        local = token_ids - self._matrix.start
        mine = (local >= 0) & (local < self._matrix.held)
        rows = self._matrix.weight[local.where(mine, 0)] * mine.unsqueeze(-1)
        return self._tp.reduce_scatter(rows)


class Head:
    """hidden rows [M, H] -> logits float32 [M, vocab]; both the same on every tp rank."""

    def __init__(self, context: LayerContext, matrix: VocabMatrix):
        self._tp = context.mesh.tp
        self._linear = context.ops.linear
        self._matrix = matrix

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._linear(hidden, self._matrix.weight).float()
        return self._tp.all_gather_last(logits)[:, : self._matrix.vocab_size]
