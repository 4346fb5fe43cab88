"""Which replica gets the next sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeserve.server.replicas import HORIZON, ReplicaLoads

SEQUENCES = st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 4000)), max_size=40)


@given(st.integers(1, 6), SEQUENCES)
def test_the_tokens_stay_within_one_sequence_of_even(count: int, sequences: list[tuple[int, int]]) -> None:
    loads = ReplicaLoads(count)
    heaviest = 0
    for prompt, max_tokens in sequences:
        fewest = min(loads.tokens)
        replica, weight = loads.add(prompt, max_tokens)
        heaviest = max(heaviest, weight)
        assert loads.tokens[replica] == fewest + weight
        assert max(loads.tokens) - min(loads.tokens) <= heaviest


@given(st.integers(1, 6), SEQUENCES, st.booleans())
def test_all_given_back_is_idle(count: int, sequences: list[tuple[int, int]], balance: bool) -> None:
    loads = ReplicaLoads(count, balance=balance)
    taken = [loads.add(*sequence) for sequence in sequences]
    for replica, weight in taken:
        loads.remove(replica, weight)
    assert loads.tokens == loads.sequences == [0] * count
    assert loads.balance == 1.0


def test_idle_replicas_take_turns_and_a_long_limit_counts_as_the_horizon() -> None:
    loads = ReplicaLoads(3)
    for expected in (0, 1, 2, 0):
        replica, weight = loads.add(10, 100_000)
        assert (replica, weight) == (expected, 10 + HORIZON)
        loads.remove(replica, weight)


def test_evening_beats_taking_turns_on_skewed_prompts() -> None:
    prompts = [900, 10, 10, 10] * 8  # in turn, one of four replicas gets all long ones
    balanced, in_turn = ReplicaLoads(4), ReplicaLoads(4, balance=False)
    for prompt in prompts:
        balanced.add(prompt, 16)
        in_turn.add(prompt, 16)
    assert balanced.balance > 0.9
    assert in_turn.balance < 0.3
