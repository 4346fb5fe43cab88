"""Migration plans reach the new placement, overwrite nothing that is still to be read, and choose near sources."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.eplb.metrics import moves_between
from moeserve.eplb.migration import apply_plan, plan_migration, traffic
from moeserve.eplb.types import Placement, Topology


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[Placement, Placement, Topology, int | None]:
    ranks, per_rank = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    topology = Topology.of(ranks, ranks * per_rank, draw(st.integers(1, 3)))
    experts = draw(st.integers(1, ranks * per_rank))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))

    def one(generation: int) -> Placement:
        rows = []
        for _ in range(2):
            extra = rng.integers(0, experts, topology.num_slots - experts)
            rows.append(rng.permutation(np.concatenate([np.arange(experts), extra])))
        return Placement(np.array(rows), experts, generation)

    return one(3), one(4), topology, draw(st.sampled_from([None, 1, 2]))


@settings(max_examples=150, deadline=None)
@given(_pairs())
def test_plan_reaches_the_new_placement_in_safe_rounds(
    pair: tuple[Placement, Placement, Topology, int | None],
) -> None:
    old, new, topology, staging = pair
    plan = plan_migration(old, new, topology, staging)
    assert apply_plan(old, plan) == new
    assert plan.num_moves == int((old.slot_to_expert != new.slot_to_expert).sum())
    for _, rounds in plan.layers:
        written: set[int] = set()
        for moves in rounds:
            targets = [move.target_slot for move in moves]
            assert len(set(targets)) == len(targets)
            # a slot written in an earlier round holds something else by now: nobody may read it
            assert not written & {move.source_slot for move in moves}
            written |= set(targets)
            if staging == 1:
                # more than one slot a rank in a round only for moves in a circle
                ranks = [t // topology.slots_per_rank for t in targets]
                if len(set(ranks)) < len(ranks):
                    sources = {move.source_slot for move in moves}
                    assert sources & set(targets)


def test_sources_are_near_and_spread() -> None:
    topology = Topology.of(4, 8, ranks_per_node=2)
    # expert 0 stands on ranks 1 and 3; ranks 0 and 2 want it
    old = Placement(np.array([[1, 2, 0, 3, 4, 1, 0, 2]]), 5)
    new = Placement(np.array([[0, 2, 0, 3, 4, 0, 0, 1]]), 5)
    plan = plan_migration(old, new, topology)
    sources = {
        move.target_slot: move.source_slot for _, rounds in plan.layers for moves in rounds for move in moves
    }
    assert sources[0] == 2  # rank 0 takes it from rank 1, its node
    assert sources[5] == 6
    found = traffic(plan, topology)
    assert (found.local, found.intra_node, found.inter_node) == (0, 3, 0)
    assert found.bytes_by_link(10) == {"local": 0, "intra_node": 30, "inter_node": 0}


def test_sources_of_equal_distance_take_turns() -> None:
    topology = Topology.of(4, 8)
    old = Placement(np.array([[0, 1, 0, 2, 3, 4, 1, 2]]), 5)
    new = Placement(np.array([[0, 1, 0, 2, 3, 0, 4, 0]]), 5)
    plan = plan_migration(old, new, topology)
    sources = [m.source_slot for _, rounds in plan.layers for moves in rounds for m in moves if m.expert == 0]
    assert sorted(sources) == [0, 2]


def test_only_the_shares_differ() -> None:
    slots = np.array([[0, 1, 0, 1]])
    old = Placement(slots, 2)
    new = Placement(slots, 2, 1, np.array([[0.25, 0.5, 0.75, 0.5]]))
    plan = plan_migration(old, new, Topology.of(2, 4))
    assert plan.layers == ((0, ()),)
    assert apply_plan(old, plan) == new


def test_a_plan_for_another_placement_is_refused() -> None:
    topology = Topology.of(2, 4)
    old, new = Placement(np.array([[0, 1, 0, 1]]), 2), Placement(np.array([[1, 0, 0, 1]]), 2, 1)
    plan = plan_migration(old, new, topology)
    with pytest.raises(ValueError, match="starts from generation"):
        apply_plan(new, plan)
    with pytest.raises(ValueError, match="cannot migrate"):
        plan_migration(old, Placement(np.array([[0, 1, 2, 1]]), 3), topology)


def test_moves_count_weights_a_rank_did_not_hold() -> None:
    topology = Topology.of(2, 4)
    old, new = Placement(np.array([[0, 1, 2, 3]]), 4), Placement(np.array([[1, 0, 2, 3]]), 4)
    assert moves_between(old, new, topology).tolist() == [0]
    assert moves_between(old, Placement(np.array([[2, 1, 0, 3]]), 4), topology).tolist() == [2]
