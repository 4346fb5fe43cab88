"""From plans to orders: what is named, what it weighs, and which digest it leads to."""

from __future__ import annotations

import numpy as np

from moeserve.eplb import solve
from moeserve.eplb.types import Placement, Topology
from moeserve.online.orders import by_link, moves_of, plan_to, rank_bytes
from tests.online.fakes import EXPERTS, LAYERS, SLOTS, TOPOLOGY, skewed


def test_bytes_go_between_ranks_alone_and_over_the_right_link() -> None:
    topology = Topology.of(4, 8, 2)
    table = rank_bytes(((0, ((0, 1), (0, 2), (3, 4))), (1, ((7, 0),))), topology, 10)
    assert table.tolist() == [[0, 10, 0, 0], [0, 0, 10, 0], [0, 0, 0, 0], [10, 0, 0, 0]]
    assert by_link(table, topology) == {"intra_node": 10, "inter_node": 20}


def test_a_plan_leads_to_the_digest_that_was_given() -> None:
    """Shares that differ too little to be planned for may still be another digest."""
    here = solve(skewed(0), TOPOLOGY)
    share = here.share.copy()
    row, slot = (int(i) for i in np.argwhere((share > 0.1) & (share < 0.9))[0])
    twin = next(int(s) for s in here.slots_of(row, int(here.slot_to_expert[row, slot])) if s != slot)
    share[row, slot] += 4e-7 - (share[row, slot] * 1e6 % 1 - 0.3) * 1e-6
    share[row, twin] -= share[row, slot] - here.share[row, slot]
    there = Placement(here.slot_to_expert, EXPERTS, 5, share)
    plan = plan_to(here, there, TOPOLOGY)
    layers = [layer for layer, _ in moves_of(plan)]
    assert here.with_layers(layers, there).digest == there.digest
    assert here.with_layers(layers, there).generation == (5 if layers else here.generation)


def test_a_mixture_has_the_new_generation_once_it_is_whole() -> None:
    here = Placement.identity(LAYERS, EXPERTS, SLOTS)
    there = solve(skewed(0), TOPOLOGY).with_generation(9)
    for layers in ([], [1], [2, 0], [0, 1, 2]):
        mixed = here.with_layers(layers, there)
        for layer in range(LAYERS):
            of = there if layer in layers else here
            assert np.array_equal(mixed.slot_to_expert[layer], of.slot_to_expert[layer])
            assert np.array_equal(mixed.share[layer], of.share[layer])
        assert mixed.generation == (9 if len(layers) == LAYERS else 0)
