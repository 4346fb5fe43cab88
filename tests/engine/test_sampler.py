"""The sampler against an obvious float64 form, exact probabilities, and itself in other batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moeserve.engine.sampler import choose_tokens, sample, token_logprobs, uniform
from moeserve.engine.scheduler import ScheduledBatch
from moeserve.engine.sequence import NO_TOKEN, Chunk, Sequence
from moeserve.messages import AddRequest, SamplingParams

torch.set_num_threads(1)
BIG = 3001  # not a multiple of anything


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Sequence:
    made = Sequence.from_request(AddRequest("r", prompt or [0], SamplingParams(**params)), 0)
    made.tokens.extend(output or [])
    return made


def plain_form(logits: np.ndarray[Any, Any], of: Sequence) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Probabilities of the tokens that may be drawn and these tokens, ascending: one row, plain loops."""
    p = of.params
    z = logits.astype(np.float64)
    for token, bias in p.logit_bias.items():
        z[token] += bias
    output = list(of.tokens[of.num_prompt :])
    for token in set(of.tokens):
        z[token] = z[token] / p.repetition_penalty if z[token] > 0 else z[token] * p.repetition_penalty
    for token in set(output):
        z[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    order = sorted(range(len(z)), key=lambda token: (-np.float32(z[token]), token))
    if p.temperature == 0:
        return np.ones(1), order[:1]
    weight = np.exp((z - z.max()) / p.temperature)
    if p.top_k:
        order = order[: p.top_k]
    mass = weight[order].sum()
    kept, so_far = [], 0.0
    for token in order:
        if kept and so_far >= p.top_p * mass and p.top_p < 1:
            break
        if kept and weight[token] < p.min_p * weight[order[0]]:
            break
        kept.append(token)
        so_far += weight[token]
    kept.sort()
    return weight[kept] / weight[kept].sum(), kept


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 0, 1, 7, 2000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.0, 0.3, 0.95]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        "logit_bias": st.dictionaries(st.integers(0, 49), st.sampled_from([-100.0, 1.5, 4.0]), max_size=3),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)
TOKENS = st.lists(st.integers(0, 49), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(PARAMS, TOKENS, TOKENS), min_size=1, max_size=6),
    vocabulary=st.sampled_from([50, BIG]),
    spread=st.sampled_from([0.01, 1.0, 4.0, 9.0]),
    noise=st.integers(0, 2**31),
)
def test_equals_the_plain_form_whatever_the_batch(
    rows: list[Any], vocabulary: int, spread: float, noise: int
) -> None:
    random = np.random.default_rng(noise)
    logits = torch.from_numpy(random.normal(size=(len(rows), vocabulary)).astype(np.float32) * spread)
    before = logits.clone()
    sequences = [sequence(prompt, output, **params) for params, prompt, output in rows]
    tokens = choose_tokens(logits, sequences)
    assert torch.equal(logits, before), "the logits given are still wanted for log-probabilities"
    for row, (of, token) in enumerate(zip(sequences, tokens, strict=True)):
        assert choose_tokens(logits[row : row + 1].clone(), [of]) == [token], "another batch, another token"
        probabilities, kept = plain_form(logits[row].numpy(), of)
        drawn = uniform(of.params.seed, len(of.tokens))
        place = int(np.searchsorted(probabilities.cumsum(), drawn, side="right"))
        # Rounding may move an edge by some 1e-5 of the mass: any token that close to the number drawn will do.
        edges = np.concatenate([[0.0], probabilities.cumsum()])
        near = [i for i in range(len(kept)) if edges[i] - 1e-4 <= drawn <= edges[i + 1] + 1e-4]
        assert token in {kept[i] for i in near} | {kept[min(place, len(kept) - 1)]}


def test_top_p_is_of_what_top_k_left_however_small_the_probabilities() -> None:
    logits = torch.from_numpy(np.random.default_rng(2).normal(size=BIG).astype(np.float32) * 2)
    filters: dict[str, Any] = {"top_k": 2000, "top_p": 0.8}
    probabilities, kept = plain_form(logits.numpy(), sequence(**filters))
    of = [sequence(seed=seed, **filters) for seed in range(40)]
    exact = [
        kept[int(np.searchsorted(probabilities.cumsum(), uniform(seed, 1), "right"))] for seed in range(40)
    ]
    assert sum(a != b for a, b in zip(choose_tokens(logits.expand(40, -1), of), exact, strict=True)) <= 1


def test_top_p_is_of_what_top_k_left_with_the_tokens_that_min_p_drops() -> None:
    probabilities = torch.tensor([0.40, 0.20, 0.18] + [0.01] * 22)
    filters: dict[str, Any] = {"top_k": 20, "top_p": 0.65, "min_p": 0.05, "temperature": 1.0}
    of = [sequence(seed=seed, **filters) for seed in range(60)]
    drawn = choose_tokens(probabilities.log().expand(60, -1), of)
    assert set(drawn) == {0, 1, 2}, "two have 0.60 of 0.95, less than 0.65: the third belongs to the nucleus"


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 2.0}])
def test_frequencies_are_the_probabilities(filters: dict[str, float]) -> None:
    logits = torch.linspace(2, -2, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    draws = 20_000
    of = [sequence(seed=seed, **filters) for seed in range(draws)]
    counts = np.bincount(choose_tokens(logits.expand(draws, -1), of), minlength=16)
    probabilities, kept = plain_form(logits.numpy(), of[0])
    assert counts.sum() == counts[kept].sum(), "a token was drawn that the filters exclude"
    assert stats.chisquare(counts[kept], probabilities * draws).pvalue > 1e-3


def test_the_positions_of_one_seed_are_as_even_as_the_seeds_of_one_position() -> None:
    for numbers in ([uniform(7, i) for i in range(20_000)], [uniform(i, 7) for i in range(20_000)]):
        assert min(numbers) >= 0 and max(numbers) < 1
        assert stats.chisquare(np.bincount((np.array(numbers) * 50).astype(int), minlength=50)).pvalue > 1e-3
        pairs = (np.array(numbers[:-1]) * 7).astype(int) * 7 + (np.array(numbers[1:]) * 7).astype(int)
        assert stats.chisquare(np.bincount(pairs, minlength=49)).pvalue > 1e-3


def test_a_random_number_depends_on_seed_and_position_alone() -> None:
    assert uniform(1, 2) == pytest.approx(0.7376992526901169, abs=1e-15)
    assert len({uniform(seed, position) for seed in range(50) for position in range(50)}) == 2500
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


@pytest.mark.parametrize("vocabulary", [8, BIG])
def test_equal_logits_go_by_the_lowest_id(vocabulary: int) -> None:
    logits = torch.zeros(1, vocabulary)
    assert choose_tokens(logits, [sequence(temperature=0.0)]) == [0]
    assert choose_tokens(logits, [sequence(top_k=1)]) == [0]
    for seed in range(20):
        token = choose_tokens(logits, [sequence(seed=seed)])[0]
        assert token == int(uniform(seed, 1) * vocabulary), "the distribution is inverted in the order of ids"
    entry = token_logprobs(logits, [3], 4)[0]
    assert [token for token, _ in entry.top] == [0, 1, 2, 3]
    assert entry.rank == 1


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.full((1, BIG), -1e9)
    logits[0, [5, 700, 3000]] = torch.tensor([1.0, 2.0, 0.0])
    for filters in ({}, {"top_p": 0.999999}, {"top_k": 100}):
        drawn = [choose_tokens(logits, [sequence(seed=seed, **filters)])[0] for seed in range(200)]
        assert set(drawn) == {5, 700, 3000}


def test_log_probabilities_are_the_models_own() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(300, 40, generator=generator) * 3
    tokens = torch.randint(40, (300,), generator=generator).tolist()
    entries = token_logprobs(logits, tokens, 3)
    exact = torch.log_softmax(logits.double(), -1)
    for row, entry in enumerate(entries):
        order = exact[row].argsort(descending=True).tolist()
        assert entry.token_id == tokens[row]
        assert entry.logprob == pytest.approx(exact[row, tokens[row]].item(), abs=1e-5)
        assert order[entry.rank - 1] == tokens[row]
        assert [token for token, _ in entry.top] == order[:3]
        assert [p for _, p in entry.top] == pytest.approx(exact[row, order[:3]].tolist(), abs=1e-5)
    assert token_logprobs(logits[:1], tokens[:1], 0)[0].top == []


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    assert len(token_logprobs(torch.randn(1, 5), [0], 20)[0].top) == 5


def chunk(of: Sequence, start: int, num_tokens: int, scores: tuple[int, int] = (0, 0)) -> Chunk:
    return Chunk(of, start, num_tokens, start + num_tokens == len(of.tokens), *scores)


def test_a_mixed_step_takes_the_rows_in_order() -> None:
    """Greedy with log-probabilities, drawn, half a prompt that is scored, the rest of one, one unscored part."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(7, 30, generator=generator)
    greedy = sequence([1], [2], temperature=0.0, logprobs=2)
    drawn = sequence([1], [2], seed=9)
    begun = sequence([1, 2, 3, 4, 5], prompt_logprobs=1)
    ending = sequence([6, 7, 8], prompt_logprobs=0, temperature=0.0)
    part = sequence([1, 2, 3, 4])
    chunks = (
        chunk(greedy, 1, 1),
        chunk(drawn, 1, 1),
        chunk(begun, 0, 2, (0, 2)),
        chunk(ending, 0, 3, (0, 2)),
        chunk(part, 0, 2),
    )
    results = sample(logits, ScheduledBatch(chunks, 2, 9, False))
    assert [r.token for r in results] == [
        int(logits[0].argmax()),
        choose_tokens(logits[1:2], [drawn])[0],
        None,
        int(logits[6].argmax()),
        None,
    ]
    assert [r.logprob is None for r in results] == [False, True, True, True, True]
    assert results[0].logprob == token_logprobs(logits[:1], [int(logits[0].argmax())], 2)[0]
    assert results[2].prompt_logprobs == token_logprobs(logits[2:4], [2, 3], 1)
    assert results[3].prompt_logprobs == token_logprobs(logits[4:6], [7, 8], 0)
    assert results[4].prompt_logprobs is None


def test_all_greedy_is_one_argmax_and_an_empty_step_is_nothing() -> None:
    logits = torch.randn(3, 30)
    of = [sequence(temperature=0.0) for _ in range(3)]
    batch = ScheduledBatch(tuple(chunk(one, 0, 1) for one in of), 3, 3, False)
    assert [r.token for r in sample(logits, batch)] == logits.argmax(-1).tolist()
    assert sample(logits[:0], ScheduledBatch((), 0, 0, False)) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 5}], ids=str)
def test_a_row_that_is_no_numbers_harms_no_other(bad: float, params: dict[str, Any]) -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    asked = [sequence(temperature=1.0, seed=seed, **params) for seed in (1, 2)]
    (alone,) = choose_tokens(logits[1:], asked[1:])
    logits[0, 7] = bad
    broken, healthy = choose_tokens(logits, asked)
    assert healthy == alone
    assert 0 <= broken < 300


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 0.0, "logprobs": 1}, {"top_p": 0.9}], ids=str
)
def test_a_row_that_is_no_numbers_gives_no_token(bad: float, params: dict[str, Any]) -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    of = [sequence(seed=1, **params) for _ in range(2)]
    batch = ScheduledBatch(tuple(chunk(one, 0, 1) for one in of), 2, 2, False)
    (_, healthy) = sample(logits, batch)
    logits[0, 7] = bad
    broken, same = sample(logits, batch)
    assert broken.token == NO_TOKEN
    assert same.token == healthy.token
