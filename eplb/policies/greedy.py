"""DeepSeek's EPLB (deepseek-ai/EPLB, MIT licence), our own writing of it: the baseline of every report.

Replicas go one by one to the expert with the largest load a replica, then replicas, heaviest first, to the rank
with the least load that has a slot free. Two replicas of an expert may land on one rank. The hierarchical form
packs expert groups on nodes and replicates within a node; it is used when the groups divide among the nodes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeserve.eplb.policies.problem import Problem
from moeserve.eplb.types import Floats, Ints


def greedy(problem: Problem) -> Ints:
    """slots [L, P] for the summed load; hierarchical if expert groups and nodes allow."""
    load = problem.windows.sum(axis=0)
    topology = problem.topology
    nodes = topology.num_nodes
    if topology.num_ranks % nodes or problem.expert_groups % nodes:
        return _global(load, topology.num_ranks, topology.num_slots, problem.least)
    return _hierarchical(
        load, problem.expert_groups, nodes, topology.num_ranks, topology.num_slots, problem.least
    )


def greedy_global(problem: Problem) -> Ints:
    """The form without groups and nodes."""
    topology = problem.topology
    return _global(problem.windows.sum(axis=0), topology.num_ranks, topology.num_slots, problem.least)


def _global(load: Floats, ranks: int, slots: int, least: int) -> Ints:
    expert, weight = _replicate(load, slots, least)
    rank, place = _pack(weight, ranks)
    result = np.empty(expert.shape, np.int32)
    np.put_along_axis(result, rank * (slots // ranks) + place, expert, axis=1)
    return result


def _hierarchical(load: Floats, groups: int, nodes: int, ranks: int, slots: int, least: int) -> Ints:
    layers, experts = load.shape
    size, rows = experts // groups, np.arange(layers)[:, None]
    node, place = _pack(load.reshape(layers, groups, size).sum(axis=2), nodes)
    at = (node * (groups // nodes) + place)[:, :, None] * size + np.arange(size)
    order = np.empty((layers, experts), np.int64)  # order[i]: the expert that stands i-th, node by node
    order[rows, at.reshape(layers, -1)] = np.arange(experts)
    by_node = np.take_along_axis(load, order, axis=1).reshape(layers * nodes, -1)
    inner = _global(by_node, ranks // nodes, slots // nodes, least).reshape(layers, nodes, -1)
    inner = inner + np.arange(nodes)[:, None] * (experts // nodes)
    return np.take_along_axis(order, inner.reshape(layers, -1), axis=1).astype(np.int32)


def _replicate(load: Floats, slots: int, least: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """(expert, load) of each replica [L, P]."""
    layers, experts = load.shape
    rows = np.arange(layers)
    expert = np.empty((layers, slots), np.int64)
    expert[:, : experts * least] = np.tile(np.arange(experts), least)
    count = np.full((layers, experts), float(least))
    for slot in range(experts * least, slots):
        best = np.argmax(load / count, axis=1)
        expert[:, slot] = best
        count[rows, best] += 1
    return expert, np.take_along_axis(load / count, expert, axis=1)


def _pack(weight: Floats, packs: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(pack, place within it) of each item [L, n], heaviest first to the lightest pack with room."""
    layers, items = weight.shape
    room, rows = items // packs, np.arange(layers)
    pack, place = np.empty((layers, items), np.int64), np.empty((layers, items), np.int64)
    total, used = np.zeros((layers, packs)), np.zeros((layers, packs), np.int64)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        best = np.argmin(np.where(used < room, total, np.inf), axis=1)
        pack[rows, item], place[rows, item] = best, used[rows, best]
        total[rows, best] += weight[rows, item]
        used[rows, best] += 1
    return pack, place
