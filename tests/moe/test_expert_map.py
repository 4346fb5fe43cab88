"""Looking up slots, and switching a layer to a new placement."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from moeserve.eplb.types import Placement, Topology
from moeserve.moe.expert_map import ExpertMap, Routing

TOPOLOGY = Topology(num_ranks=2, slots_per_rank=3)
OLD = Placement(np.array([[0, 1, 2, 3, 0, 0], [3, 2, 1, 0, 1, 2]]), 4, generation=4)
NEW = Placement(np.array([[0, 1, 2, 3, 3, 3], [0, 1, 2, 3, 0, 1]]), 4, generation=5)


ROUTINGS: tuple[Routing, ...] = ("even", "shares", "step")


def make(routing: Routing = "shares") -> ExpertMap:
    return ExpertMap(OLD, TOPOLOGY, source_rank=1, device="cpu", routing=routing)


def all_valid(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_slots_hold_the_expert_and_padding_has_none(routing: Routing) -> None:
    expert_map = make(routing)
    experts = torch.tensor([[0, 2], [1, 3], [3, 0]])
    expert_map.begin_step(torch.tensor([True, True, False]))
    for layer in range(2):
        slots = expert_map.look_up(layer, experts)
        assert slots[2].tolist() == [-1, -1]
        assert torch.equal(torch.tensor(OLD.slot_to_expert[layer])[slots[:2]], experts[:2].int())


def test_replicas_share_tokens_evenly_within_a_step_and_over_steps() -> None:
    expert_map = make()
    zeros = torch.zeros(60, 1, dtype=torch.int64)
    expert_map.begin_step(all_valid(60))
    assert Counter(expert_map.look_up(0, zeros).flatten().tolist()) == {0: 20, 4: 20, 5: 20}
    seen: Counter[int] = Counter()
    for _ in range(60):  # steps of one token
        expert_map.begin_step(all_valid(1))
        seen.update(expert_map.look_up(0, zeros[:1]).flatten().tolist())
    assert seen == {0: 20, 4: 20, 5: 20}


def test_replicas_take_the_shares_of_the_placement() -> None:
    share = np.array([[0.5, 1, 1, 1, 0.2, 0.3], [1, 0.75, 0.75, 1, 0.25, 0.25]])
    expert_map = ExpertMap(Placement(OLD.slot_to_expert, 4, share=share), TOPOLOGY, 1, device="cpu")
    expert_map.begin_step(all_valid(60))
    zeros = torch.zeros(60, 1, dtype=torch.int64)
    assert Counter(expert_map.look_up(0, zeros).flatten().tolist()) == {0: 30, 4: 12, 5: 18}
    assert Counter(expert_map.look_up(1, zeros + 1).flatten().tolist()) == {2: 45, 4: 15}


def test_even_routing_looks_at_no_share_and_step_routing_levels_the_ranks() -> None:
    share = np.array([[0.5, 1, 1, 1, 0.2, 0.3], [1, 0.75, 0.75, 1, 0.25, 0.25]])
    placement = Placement(OLD.slot_to_expert, 4, share=share)
    experts = torch.tensor([[0], [0], [1], [0], [0]] * 12)  # expert 0: ranks 0 and 1; expert 1: rank 0
    even, step = (ExpertMap(placement, TOPOLOGY, 1, "cpu", routing) for routing in ("even", "step"))
    for expert_map in (even, step):
        expert_map.begin_step(all_valid(60))
    counts = Counter(even.look_up(0, experts * 0).flatten().tolist())
    assert counts == {0: 20, 4: 20, 5: 20}
    counts = Counter(step.look_up(0, experts).flatten().tolist())
    assert counts == {1: 12, 0: 18, 4: 30}


def test_local_experts() -> None:
    assert make().local_experts(0) == [3, 0, 0]
    assert make().local_experts(1) == [0, 1, 2]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_switching_layer_by_layer(routing: Routing) -> None:
    expert_map = make(routing)
    experts = torch.tensor([[0], [1], [2], [3]])
    expert_map.begin_step(all_valid(4))
    before = expert_map.look_up(0, experts)
    between = OLD.with_layers([1], NEW)
    expert_map.switch(between, {1: expert_map.view(1, between)})
    assert expert_map.generation == 4 and expert_map.digest not in (OLD.digest, NEW.digest)
    assert torch.equal(expert_map.look_up(0, experts), before)
    slots = expert_map.look_up(1, experts).flatten()
    assert NEW.slot_to_expert[1][slots].tolist() == [0, 1, 2, 3]
    threes = torch.full((60, 1), 3)
    expert_map.begin_step(all_valid(60))
    assert set(expert_map.look_up(1, threes).flatten().tolist()) == {3}
    expert_map.switch(NEW, {0: expert_map.view(0, NEW)})
    assert (expert_map.generation, expert_map.digest) == (5, NEW.digest)
    assert set(expert_map.look_up(0, threes).flatten().tolist()) == ({3} if routing == "step" else {3, 4, 5})
    assert expert_map.local_experts(0) == [3, 3, 3]


def test_a_placement_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="6 slots"):
        ExpertMap(OLD, Topology(num_ranks=2, slots_per_rank=4), 0, "cpu")
