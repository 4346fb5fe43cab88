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
from moeserve.engine.sequence import GREEDY_BELOW, NO_TOKEN, Sequence, StepResult, adjusts_logits
from moeserve.messages import SamplingParams, TokenLogprob

BLOCK = 128  # tokens whose probabilities are summed first when a token is drawn from all
SCORED_AT_ONCE = 256  # rows of log-probabilities held at a time

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def sample(logits: Tensor, batch: ScheduledBatch) -> list[StepResult]:
    """One result a chunk from float32 [M, V] logits of ForwardBatch.logit_rows, before `finish` is told of
    it. A row with a logit that is not a number, or infinite, gives NO_TOKEN."""
    chunks = batch.chunks
    if all(chunk.samples and chunk.sequence.plain for chunk in chunks):
        if not chunks:
            return []
        best, tokens_of = logits.max(-1)
        return [StepResult(token) for token in torch.where(best.isfinite(), tokens_of, NO_TOKEN).tolist()]

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
    sampled = _select(logits, rows)
    tokens = choose_tokens(sampled, sequences)
    logprobs = _chosen_logprobs(logits, rows, sequences, tokens)
    sound = sampled.amax(-1).isfinite().tolist()
    tokens = [token if is_sound else NO_TOKEN for token, is_sound in zip(tokens, sound, strict=True)]
    drawn = zip(tokens, logprobs, strict=True)
    results: list[StepResult] = []
    for chunk, score in zip(chunks, scores, strict=True):
        token, logprob = next(drawn) if chunk.samples else (None, None)
        results.append(StepResult(token, logprob, score))
    return results


def choose_tokens(logits: Tensor, sequences: Listing[Sequence]) -> list[int]:
    """The next token of each sequence from float32 [R, V] logits: bias and penalties, then temperature,
    top-k, top-p (of what top-k left), min-p, and the inverse of the cumulative distribution.

    That is taken in the order of ids: two tokens of nearly equal probability, which rounding may swap, then
    do not swap places in it."""
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
        ranks = (1 + np.count_nonzero((block > block.gather(1, index)).cpu().numpy(), axis=1)).tolist()
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
    row_of = unique // vocabulary
    params = [sequence.params for sequence in sequences]
    repetition = np.array([p.repetition_penalty for p in params])[row_of]
    loss = counts * np.array([p.frequency_penalty for p in params])[row_of]
    loss += (counts > 0) * np.array([p.presence_penalty for p in params])[row_of]

    index_of = torch.from_numpy(unique).to(flat.device)
    penalty = torch.from_numpy(repetition).to(flat)
    values = flat[index_of]
    values = torch.where(values > 0, values / penalty, values * penalty)
    flat[index_of] = values - torch.from_numpy(loss).to(flat)


def _draw(probabilities: Tensor, params: Listing[SamplingParams], random: Listing[float]) -> list[int]:
    """One token a row of float32 [R, V] probabilities."""
    tokens = [0] * len(params)
    filtered = [p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params]
    for draw, which in ((_draw_from_all, False), (_draw_from_likely, True)):
        rows = [row for row, is_filtered in enumerate(filtered) if is_filtered == which]
        if rows:
            of = [params[row] for row in rows]
            drawn = draw(_select(probabilities, rows), of, np.array([random[row] for row in rows]))
            for row, token in zip(rows, drawn.tolist(), strict=True):
                tokens[row] = token
    return tokens


def _draw_from_all(probabilities: Tensor, params: Listing[SamplingParams], random: Floats) -> Ints:
    """Rows without a filter: first the block of tokens, then the token in it."""
    blocks = torch.nn.functional.pad(probabilities, (0, -probabilities.shape[1] % BLOCK))
    blocks = blocks.view(len(params), -1, BLOCK)
    block, rest = _invert(blocks.sum(-1).double().cpu().numpy(), random)
    inside = blocks[torch.arange(len(params)), torch.from_numpy(block)]
    place, _ = _invert(inside.double().cpu().numpy(), rest)
    return block * BLOCK + place


def _draw_from_likely(probabilities: Tensor, params: Listing[SamplingParams], random: Floats) -> Ints:
    """Rows with a filter: only tokens that may pass, mostly few, are put in order."""
    vocabulary = probabilities.shape[1]
    least = _least_probability(probabilities, params)
    flat = np.flatnonzero((probabilities >= least[:, None]).cpu().numpy())
    values = probabilities.reshape(-1)[torch.from_numpy(flat).to(probabilities.device)].double().cpu().numpy()
    edges = np.searchsorted(flat, np.arange(len(params) + 1) * vocabulary).tolist()
    tokens = np.zeros(len(params), dtype=np.int64)
    for row, p in enumerate(params):
        value = values[edges[row] : edges[row + 1]]
        if not len(value):  # not a number among them: `sample` sees it too; other rows must not suffer
            continue
        kept = _kept(value, p)
        place, _ = _invert(value[kept][None], random[row : row + 1])
        tokens[row] = flat[edges[row] + kept[place[0]]] - row * vocabulary
    return tokens


def _least_probability(probabilities: Tensor, params: Listing[SamplingParams]) -> Tensor:
    """[R] a probability that every token which passes the filters has at least."""
    vocabulary = probabilities.shape[1]
    # All tokens below (1 - top_p) / V together have less than 1 - top_p: the others reach top_p without them.
    # Both bounds are a little low, so that rounding excludes nothing.
    nucleus = [0.0 if p.top_k > 0 else max(0.0, 1 - p.top_p) / (2 * vocabulary) for p in params]
    # With top_k the nucleus is of the mass that top_k left, which tokens below min_p are a part of.
    share = [0.0 if p.top_k > 0 and p.top_p < 1 else p.min_p * (1 - 1e-6) for p in params]
    least = torch.tensor(share, device=probabilities.device) * probabilities.amax(-1)
    least = torch.maximum(least, torch.tensor(nucleus, device=probabilities.device))
    limited = [row for row, p in enumerate(params) if p.top_k > 0]
    if limited:
        last = torch.tensor([min(params[row].top_k, vocabulary) - 1 for row in limited])
        top = _select(probabilities, limited).topk(int(last.max()) + 1, dim=-1).values
        rows = torch.tensor(limited, device=probabilities.device)
        least[rows] = torch.maximum(least[rows], top.gather(1, last.to(top.device)[:, None])[:, 0])
    return least


def _kept(values: Floats, params: SamplingParams) -> Ints:
    """The places, ascending, of the probabilities that pass all filters. Each keeps the most likely so many,
    of equals the first, so together they keep the fewest of these, and one at least."""
    likely = np.flatnonzero(values > 1e-4)
    if params.top_k <= 0 and values[likely].sum() > params.top_p + 1e-6:
        order = likely[np.argsort(-values[likely], kind="stable")]  # they hold the nucleus: the rest may go
    else:
        order = np.argsort(-values, kind="stable")
    mass = 1.0
    if params.top_k > 0:
        order = order[: params.top_k]
        mass = float(values[order].sum())
    descending = values[order]
    count = len(order)
    if params.top_p < 1:
        count = min(count, 1 + int((descending.cumsum() < params.top_p * mass).sum()))
    if params.min_p > 0:
        count = min(count, max(1, int((descending >= params.min_p * descending[0]).sum())))
    return np.sort(order[:count])


def _invert(weights: Floats, random: Floats) -> tuple[Ints, Floats]:
    """Where each row's random number in [0, 1) falls on its weights [R, C], never on a zero, and how far
    in."""
    rows = np.arange(len(weights))
    cumulative = weights.cumsum(axis=1)
    target = random * cumulative[:, -1]
    place = np.minimum((cumulative <= target[:, None]).sum(axis=1), cumulative.argmax(axis=1))
    rest = (target - (cumulative - weights)[rows, place]) / weights[rows, place]
    return place, rest.clip(0.0, 1.0)


def _top_ids(logits: Tensor, count: int) -> Ints:
    """[N, count] ids of the largest values, in descending order, equal ones by the lowest id first."""
    vocabulary = logits.shape[1]
    count = min(count, vocabulary)
    more = min(count + 16, vocabulary)
    top = logits.topk(more, dim=-1)
    values, ids = top.values.cpu().numpy(), top.indices.cpu().numpy()
    # Both sorts are stable: by id, then by value.
    by_id = ids.argsort(axis=1)
    values, ids = np.take_along_axis(values, by_id, 1), np.take_along_axis(ids, by_id, 1)
    by_value = (-values).argsort(axis=1, kind="stable")
    ids = np.take_along_axis(ids, by_value, 1)[:, :count].copy()
    # Equals of the least may have been left out: where they are wanted, look at all.
    doubtful = (values > values.min(axis=1, keepdims=True)).sum(axis=1) < count
    for row in np.flatnonzero(doubtful & (more < vocabulary)).tolist():
        ids[row] = logits[row].sort(descending=True, stable=True).indices[:count].cpu().numpy()
    found: Ints = ids
    return found
