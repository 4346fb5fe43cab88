"""From logits to tokens and log-probabilities, one row a token, each row on its own.

A row's result depends on its logits, its parameters and its position alone: not on the other rows, and not on
the rank that computes it. Semantics of the parameters are OpenAI's and vLLM's. Knows no model and no
schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Listing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.engine.scheduler import ScheduledBatch
from moeserve.engine.sequence import GREEDY_BELOW, Sequence, StepResult, adjusts_logits
from moeserve.messages import SamplingParams, TokenLogprob

# The most likely tokens are looked at first, the whole vocabulary only where they do not decide.
NUM_CANDIDATES = 1024
SCORED_AT_ONCE = 256  # rows of log-probabilities held at a time

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def sample(logits: Tensor, batch: ScheduledBatch) -> list[StepResult]:
    """One result a chunk from float32 [M, V] logits of ForwardBatch.logit_rows, before `finish` is told of
    it."""
    chunks = batch.chunks
    if all(chunk.samples and chunk.sequence.plain for chunk in chunks):
        return [StepResult(token) for token in logits.argmax(-1).tolist()] if chunks else []

    rows: list[int] = []
    sequences: list[Sequence] = []
    scores: list[list[TokenLogprob] | None] = []
    row = 0
    for chunk in chunks:
        scores.append(None)
        if chunk.num_scored:
            first = chunk.score_start + 1
            targets = chunk.sequence.tokens[first : first + chunk.num_scored]
            num_top = chunk.sequence.params.prompt_logprobs or 0
            scores[-1] = token_logprobs(logits[row : row + chunk.num_scored], targets, num_top)
            row += chunk.num_scored
        if chunk.samples:
            rows.append(row)
            sequences.append(chunk.sequence)
            row += 1
    assert row == len(logits), f"{len(logits)} rows of logits for {row} wanted"
    tokens = choose_tokens(_select(logits, rows), sequences)
    logprobs = _chosen_logprobs(logits, rows, sequences, tokens)
    drawn = zip(tokens, logprobs, strict=True)
    results: list[StepResult] = []
    for chunk, score in zip(chunks, scores, strict=True):
        token, logprob = next(drawn) if chunk.samples else (None, None)
        results.append(StepResult(token, logprob, score))
    return results


def choose_tokens(logits: Tensor, sequences: Listing[Sequence]) -> list[int]:
    """The next token of each sequence from float32 [R, V] logits: bias and penalties, then temperature,
    top-k, top-p (of what top-k left), min-p, and the inverse of the cumulative distribution in descending
    order."""
    params = [sequence.params for sequence in sequences]
    adjusted = [row for row, p in enumerate(params) if adjusts_logits(p)]
    if adjusted:
        logits = logits.clone()
        _adjust(logits, adjusted, sequences)
    tokens = [0] * len(params)
    greedy = [row for row, p in enumerate(params) if p.temperature < GREEDY_BELOW]
    drawn = [row for row, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
    if greedy:
        for row, token in zip(greedy, _select(logits, greedy).argmax(-1).tolist(), strict=True):
            tokens[row] = token
    if drawn:
        of = [params[row] for row in drawn]
        random = [uniform(params[row].seed, len(sequences[row].tokens)) for row in drawn]
        temperature = torch.tensor([p.temperature for p in of], dtype=torch.float32, device=logits.device)
        probabilities = (_select(logits, drawn) / temperature[:, None]).softmax(-1)
        for row, token in zip(drawn, _draw(probabilities, of, random), strict=True):
            tokens[row] = token
    return tokens


def token_logprobs(logits: Tensor, tokens: Listing[int], num_top: int) -> list[TokenLogprob]:
    """For each row of float32 [N, V] logits: the token's natural log-probability, its rank and the num_top
    best."""
    found: list[TokenLogprob] = []
    for start in range(0, len(tokens), SCORED_AT_ONCE):
        block = logits[start : start + SCORED_AT_ONCE]
        of = tokens[start : start + SCORED_AT_ONCE]
        index = torch.tensor(of, dtype=torch.int64, device=logits.device)[:, None]
        logprobs = block.log_softmax(-1)
        ranks = ((block > block.gather(1, index)).sum(-1) + 1).tolist()
        chosen = logprobs.gather(1, index)[:, 0].tolist()
        if num_top:
            ids = _top_ids(block, num_top)
            best = logprobs.gather(1, torch.from_numpy(ids).to(logits.device)).tolist()
            tops = [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), best, strict=True)]
        else:
            tops = [[] for _ in of]
        found += map(TokenLogprob, of, chosen, ranks, tops)
    return found


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a sequence's token at a position: splitmix64 of the two (Steele et al.
    2014)."""
    return (_mix(_mix(seed & _MASK) + position) >> 11) * 2.0**-53


# ------------------------------------------------------------------ parts

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _select(logits: Tensor, rows: Listing[int]) -> Tensor:
    """These rows, ascending, without a copy when they are all."""
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, torch.tensor(rows, dtype=torch.int64, device=logits.device))


def _chosen_logprobs(
    logits: Tensor, rows: list[int], sequences: list[Sequence], tokens: list[int]
) -> Iterator[TokenLogprob | None]:
    """The log-probabilities of the sampled tokens, for the sequences that want them, None for the others."""
    wanted = [i for i, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    num_top = [sequence.params.logprobs or 0 for sequence in sequences]
    found: dict[int, TokenLogprob] = {}
    if wanted:
        picked = _select(logits, [rows[i] for i in wanted])
        entries = token_logprobs(picked, [tokens[i] for i in wanted], max(num_top[i] for i in wanted))
        for i, entry in zip(wanted, entries, strict=True):
            found[i] = TokenLogprob(entry.token_id, entry.logprob, entry.rank, entry.top[: num_top[i]])
    return (found.get(i) for i in range(len(sequences)))


def _adjust(logits: Tensor, rows: list[int], sequences: Listing[Sequence]) -> None:
    """Add the biases, then apply repetition (prompt and output), frequency and presence penalty (output), in
    place."""
    vocabulary = logits.shape[1]
    flat = logits.view(-1)
    biases = [(row * vocabulary + t, b) for row in rows for t, b in sequences[row].params.logit_bias.items()]
    if biases:
        index, bias = zip(*biases, strict=True)
        flat[torch.tensor(index, device=flat.device)] += torch.tensor(
            bias, dtype=flat.dtype, device=flat.device
        )
    keys: list[Ints] = []
    output: list[NDArray[np.bool_]] = []
    for row in rows:
        sequence = sequences[row]
        first = 0 if sequence.params.repetition_penalty != 1.0 else sequence.num_prompt
        tokens = np.array(sequence.tokens[first:], dtype=np.int64)
        keys.append(row * vocabulary + tokens)
        output.append(np.arange(first, first + len(tokens)) >= sequence.num_prompt)
    unique, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    if not len(unique):
        return
    counts = np.bincount(inverse, weights=np.concatenate(output))
    row_of = (unique // vocabulary).tolist()
    params = [sequences[row].params for row in row_of]
    repetition = np.array([p.repetition_penalty for p in params])
    loss = counts * [p.frequency_penalty for p in params]
    loss += (counts > 0) * np.array([p.presence_penalty for p in params])

    index_of = torch.from_numpy(unique).to(flat.device)
    penalty = torch.from_numpy(repetition).to(flat)
    values = flat[index_of]
    values = torch.where(values > 0, values / penalty, values * penalty)
    flat[index_of] = values - torch.from_numpy(loss).to(flat)


def _draw(probabilities: Tensor, params: Listing[SamplingParams], random: Listing[float]) -> list[int]:
    """One token a row of float32 [R, V] probabilities."""
    top, ids, num_known = _descending(probabilities, NUM_CANDIDATES)
    picked = _pick(top, num_known, probabilities.shape[1], params, random)
    tokens = np.take_along_axis(ids, np.maximum(picked, 0)[:, None], axis=1)[:, 0]
    for row in np.flatnonzero(picked < 0).tolist():
        # Each on its own, so that no row's arithmetic depends on which others are undecided.
        top, ids, num_known = _descending(probabilities[row : row + 1], probabilities.shape[1])
        pick = _pick(top, num_known, probabilities.shape[1], params[row : row + 1], random[row : row + 1])
        tokens[row] = ids[0, pick[0]]
    found: list[int] = tokens.tolist()
    return found


def _pick(
    probabilities: Floats,
    num_known: Ints,
    vocabulary: int,
    params: Listing[SamplingParams],
    random: Listing[float],
) -> Ints:
    """The place in each row's descending probabilities [R, C] that its random number falls on; -1 where the
    first num_known of them (all of the vocabulary, or those that are surely the most likely) do not decide
    it.

    The three filters each keep the most likely so many, so together they keep the fewest of these.
    """
    rows, width = np.arange(len(params)), probabilities.shape[1]
    cumulative = probabilities.cumsum(axis=1)
    known = np.arange(width) < num_known[:, None]
    known_mass = np.where(num_known > 0, cumulative[rows, num_known - 1], 0.0)
    whole = num_known == vocabulary

    top_k = np.array([min(p.top_k, vocabulary) if p.top_k > 0 else vocabulary for p in params])
    mass = np.where(top_k <= num_known, cumulative[rows, np.minimum(top_k, width) - 1], 1.0)
    needed = np.array([p.top_p for p in params]) * mass
    before = np.zeros_like(cumulative)
    before[:, 1:] = cumulative[:, :-1]
    num_top_p = ((before < needed[:, None]) & known).sum(axis=1)
    has_top_p = np.array([p.top_p < 1 for p in params])
    unsure = (known_mass < needed) | ((num_known < top_k) & (top_k < vocabulary))
    num_top_p[~has_top_p | (~whole & unsure)] = vocabulary
    least = np.array([p.min_p for p in params]) * probabilities[:, 0]
    num_min_p = ((probabilities >= least[:, None]) & known).sum(axis=1)
    num_min_p[num_min_p == num_known] = vocabulary
    kept = np.maximum(np.minimum(np.minimum(top_k, num_top_p), num_min_p), 1)

    unfiltered = np.array([p.top_k <= 0 and p.top_p >= 1 and p.min_p <= 0 for p in params])
    kept_mass = np.where(kept <= num_known, cumulative[rows, np.minimum(kept, width) - 1], 1.0)
    target = np.array(random) * kept_mass
    decided = (kept <= num_known) | (unfiltered & (target < known_mass))
    place = np.minimum((cumulative <= target[:, None]).sum(axis=1), kept - 1)
    return np.where(decided, place, -1)


def _top_ids(logits: Tensor, count: int) -> Ints:
    """[N, count] ids of the largest values, in descending order, equal ones by the lowest id first."""
    count = min(count, logits.shape[1])
    _, ids, num_known = _descending(logits, count + 16)
    for row in np.flatnonzero(num_known < count).tolist():
        ids[row, :count] = _descending(logits[row : row + 1], logits.shape[1])[1][0, :count]
    return ids[:, :count]


def _descending(values: Tensor, count: int) -> tuple[Floats, Ints, Ints]:
    """Of each row of float32 [R, V]: its largest min(count, V) values, their ids, equal ones by the lowest
    id, and how many of these are sure: those equal to the last may have equals of a lower id outside, unless
    all are in."""
    num_rows, width = values.shape
    if count >= width:
        all_of = values.sort(dim=-1, descending=True, stable=True)
        return all_of.values.double().cpu().numpy(), all_of.indices.cpu().numpy(), np.full(num_rows, width)
    top = values.topk(count, dim=-1)
    # One integer a value, ascending as the value descends (IEEE 754 order), with the id below it.
    bits = (top.values.cpu().numpy() + np.float32(0)).view(np.int32).astype(np.int64)
    bits ^= (bits >> 63) & 0x7FFFFFFF
    keys = np.sort((-bits << 32) | top.indices.cpu().numpy(), axis=1)
    bits = -(keys >> 32)
    bits ^= (bits >> 63) & 0x7FFFFFFF
    ordered = bits.astype(np.int32).view(np.float32)
    num_known = (ordered > ordered[:, -1:]).sum(axis=1)
    return ordered.astype(np.float64), keys & 0xFFFFFFFF, num_known
