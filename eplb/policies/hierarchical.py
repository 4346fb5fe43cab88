"""Nodes first: expert groups are packed on nodes exactly, then each node is solved like `connected`, and a few
replicas across nodes even out what the packing leaves: bridges for routing weights, or levelling for even parts.

Tokens of group-limited routing then mostly stay in the nodes of their groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

from moeserve.eplb.native import Singles
from moeserve.eplb.policies.greedy import greedy
from moeserve.eplb.policies.problem import Problem, rank_major, slot_major
from moeserve.eplb.policies.robust import (
    Effort,
    effort_for,
    explores,
    highest_load,
    node_of,
    order_of,
    refine,
)
from moeserve.eplb.policies.search import SMALL, explore, search
from moeserve.eplb.types import Floats, Ints

_MOST_PACKINGS = 3000
_LEAST_LEVELLED = 1e-3  # lower node load, in rank loads, for which a replica crosses nodes


def hierarchical(problem: Problem) -> Ints:
    """slots [L, P]; ValueError where groups or ranks do not divide among the nodes."""
    topology, nodes = problem.topology, problem.topology.num_nodes
    reason = not_hierarchical(problem)
    if reason:
        raise ValueError(f"policy hierarchical: {reason}")
    effort = replace(effort_for(problem), rounds=200, patience=4)
    if problem.num_windows > 1:
        effort = replace(effort, least_gain=2e-3)  # few slots may swap within a node: small gains count
    counts, placed = _within_nodes(problem, effort)
    _improve(problem, counts, placed, effort)
    if problem.redundant and nodes > 1:
        _across_nodes(problem, counts, placed, effort)
    if not problem.weighted and topology.num_slots <= SMALL:
        _or_greedy(problem, counts, placed)
    return rank_major(placed)


def _within_nodes(problem: Problem, effort: Effort) -> tuple[Ints, Ints]:
    """(replica counts [L, E], slots [L, K, G]) with the groups packed on nodes, each node placed by itself."""
    topology, nodes = problem.topology, problem.topology.num_nodes
    load, mean, std = problem.prepared
    groups, layers = problem.expert_groups, problem.num_layers
    size = problem.num_experts // groups
    node_of_group = _pack(load.reshape(layers, groups, size, -1).sum(axis=2), nodes)  # [L, groups]
    by_node = np.argsort(node_of_group, axis=1, kind="stable")
    experts = (by_node[:, :, None] * size + np.arange(size)).reshape(
        layers, nodes, -1
    )  # [L, nodes, E / nodes]

    ranks = topology.num_ranks // nodes
    part = np.take_along_axis(load, experts.reshape(layers, -1, 1), axis=1).reshape(
        layers * nodes, -1, load.shape[2]
    )
    risk = np.take_along_axis(mean + effort.z * std, experts.reshape(layers, -1), axis=1)
    weight = risk.reshape(layers * nodes, -1).astype(np.float32)
    kernel = problem.kernels
    count = kernel.replicate(weight, ranks, ranks * topology.slots_per_rank, problem.least)
    inner = kernel.place(part, count, order_of(weight, count), ranks, effort.z, problem.weighted)
    named = np.take_along_axis(experts.reshape(layers * nodes, -1), inner.reshape(layers * nodes, -1), axis=1)
    placed = named.reshape(layers, nodes, topology.slots_per_rank, ranks).transpose(0, 2, 1, 3)
    placed = np.ascontiguousarray(placed.reshape(layers, topology.slots_per_rank, -1).astype(np.int32))
    counts = np.empty((layers, problem.num_experts), np.int32)
    np.put_along_axis(counts, experts.reshape(layers, -1), count.reshape(layers, -1), axis=1)
    return counts, placed


def _across_nodes(problem: Problem, counts: Ints, placed: Ints, effort: Effort) -> None:
    """A few replicas in other nodes, in place of redundant ones there."""
    load, mean, _ = problem.prepared
    nodes = problem.topology.num_nodes
    within = counts.copy(), placed.copy()
    for layer in range(problem.num_layers):
        for _ in range(1 if nodes <= 4 else 2):
            if problem.weighted:
                _bridge(problem, mean[layer], counts[layer], placed[layer])
            else:
                _level(problem, load[layer], counts[layer], placed[layer])
    levelled = (placed != within[1]).any(axis=(1, 2))
    _improve(problem, counts, placed, effort)
    if explores(problem):
        explore(problem, counts, placed, node_of(problem.topology, True))
    if not problem.weighted:  # nodes are level now, their ranks not always
        worse = highest_load(load, counts, placed) > highest_load(load, *within) + 1e-6
        back = worse | ~levelled
        counts[back], placed[back] = within[0][back], within[1][back]


def _improve(problem: Problem, counts: Ints, placed: Ints, effort: Effort) -> None:
    """Within nodes, and longer where layers are small."""
    refine(problem, problem.prepared[0], counts, placed, problem.weighted, effort, by_node=True)
    if problem.topology.num_slots <= SMALL and not explores(problem):
        search(problem, counts, placed, node_of(problem.topology, True), problem.weighted)


def _or_greedy(problem: Problem, counts: Ints, placed: Ints) -> None:
    """DeepSeek's placement, which packs the groups otherwise, for layers that it suits better: with few slots the
    packing that makes nodes even need not be the one that lets their ranks be."""
    load, ranks = problem.prepared[0], problem.topology.num_ranks
    slots = greedy(problem)
    other = problem.placement(slots)
    theirs = slot_major(slots, ranks)
    better = highest_load(load, other.replica_count, theirs) < highest_load(load, counts, placed) - 1e-6
    for layer in np.flatnonzero(better):
        pairs = {(int(e), p % ranks) for p, e in enumerate(theirs[layer].flat)}
        if len(pairs) == theirs[layer].size and other.replica_count[layer].min() >= problem.least:
            counts[layer], placed[layer] = other.replica_count[layer], theirs[layer]


def not_hierarchical(problem: Problem) -> str:
    """Why the policy does not fit the problem; empty if it does."""
    topology, nodes = problem.topology, problem.topology.num_nodes
    if topology.num_ranks % topology.ranks_per_node:
        return f"{topology.num_ranks} ranks do not fill nodes of {topology.ranks_per_node}"
    if problem.expert_groups % nodes:
        return f"expert_groups = {problem.expert_groups} does not divide among {nodes} nodes"
    if problem.survive_rank_loss and topology.ranks_per_node < 2:
        return "surviving a rank loss needs two ranks a node"
    return ""


def node_imbalance(problem: Problem) -> float:
    """Max/mean load of nodes under the best packing of groups, mean over windows and layers: what no balance within
    nodes can get below."""
    nodes, groups = problem.topology.num_nodes, problem.expert_groups
    load = problem.prepared[0]
    by_group = load.reshape(problem.num_layers, groups, -1, load.shape[2]).sum(axis=2)
    node = _pack(by_group, nodes)
    by_node = np.stack([np.where((node == n)[..., None], by_group, 0).sum(axis=1) for n in range(nodes)])
    return float(by_node.max(axis=0).mean()) / problem.topology.ranks_per_node


def _pack(load: npt.NDArray[np.float32], nodes: int) -> npt.NDArray[np.int64]:
    """Node of each group [L, groups] for group loads [L, groups, W], equally many groups a node."""
    layers, groups, _ = load.shape
    packings = _packings(groups, nodes)
    if packings is None:
        return _pack_greedily(load, nodes)
    total = np.zeros((len(packings), layers), np.float32)
    highest = np.zeros((len(packings), layers, load.shape[2]), np.float32)
    for node in range(nodes):
        member = (packings == node).astype(np.float32)
        np.maximum(highest, np.einsum("pg,lgw->plw", member, load), out=highest)
    total = highest.mean(axis=2)
    best: npt.NDArray[np.int64] = packings[np.argmin(np.round(total, 5), axis=0)]
    return best


def _pack_greedily(load: npt.NDArray[np.float32], nodes: int) -> npt.NDArray[np.int64]:
    mean = load.mean(axis=2)
    room = mean.shape[1] // nodes
    result = np.empty(mean.shape, np.int64)
    for layer, row in enumerate(mean):
        total, used = np.zeros(nodes), np.zeros(nodes, np.int64)
        for group in np.argsort(-row, kind="stable"):
            node = int(np.argmin(np.where(used < room, total, np.inf)))
            result[layer, group] = node
            total[node] += row[group]
            used[node] += 1
    return result


@lru_cache(maxsize=8)
def _packings(groups: int, nodes: int) -> npt.NDArray[np.int64] | None:
    """All ways to put groups on nodes in equal number, nodes being alike; None if there are too many."""
    found: list[list[int]] = []
    for packing in _enumerate(tuple(range(groups)), groups // nodes):
        row = [0] * groups
        for node, members in enumerate(packing):
            for group in members:
                row[group] = node
        found.append(row)
        if len(found) > _MOST_PACKINGS:
            return None
    return np.array(found)


def _enumerate(left: tuple[int, ...], room: int) -> Iterator[list[tuple[int, ...]]]:
    if not left:
        yield []
        return
    for others in combinations(left[1:], room - 1):
        members = (left[0], *others)
        rest = tuple(g for g in left if g not in members)
        for more in _enumerate(rest, room):
            yield [members, *more]


def _bridge(problem: Problem, mean: Floats, count: Ints, placed: Ints) -> None:
    """Join the nodes by a tree in which every node but the hottest takes in one replica of a hotter node's expert.

    The coldest pairs with the hottest, the next with the next; then the hot ones in a row. The expert that carries
    most load a replica goes into the slot whose loss parts no ranks, then the one whose expert misses it least.
    """
    topology, kernel = problem.topology, problem.kernels
    nodes, width = topology.num_nodes, topology.ranks_per_node
    node = np.arange(topology.num_ranks) // width
    load = np.array([(mean[placed[:, node == n]] / count[placed[:, node == n]]).sum() for n in range(nodes)])
    order = [int(n) for n in np.argsort(-load, kind="stable")]
    pairs = [(order[k], order[-1 - k]) for k in range(nodes // 2)]
    pairs += [(order[k], order[k + 1]) for k in range(nodes - len(pairs) - 1)]
    parts = kernel.components(placed, count)
    for hot, cold in pairs:
        on_hot, on_cold = set(placed[:, node == hot].ravel().tolist()), placed[:, node == cold]
        here = set(on_cold.ravel().tolist())
        wanted = [(float(mean[e] / count[e]), -int(e)) for e in on_hot if e not in here]
        if not wanted:
            continue
        expert = -max(wanted)[1]
        trials = []
        for (j, g), e in np.ndenumerate(on_cold):
            if count[e] <= problem.least or np.count_nonzero(on_cold == e) < 2:
                continue
            slots, counts = placed.copy(), count.copy()
            slots[j, g + cold * width] = expert
            counts[e] -= 1
            counts[expert] += 1
            trials.append(
                (kernel.components(slots, counts), float(mean[e] / (count[e] - 1)), j, g + cold * width)
            )
        if not trials or min(trials)[0] > parts:
            continue
        parts, _, j, g = min(trials)
        count[placed[j, g]] -= 1
        count[expert] += 1
        placed[j, g] = expert


def _level(problem: Problem, load: Singles, count: Ints, placed: Ints) -> None:
    """Give the coldest node a replica of an expert of the hottest one, once less often than there are nodes: the
    expert that leaves the least mean over the windows of the highest node load, if replicas share evenly.

    It goes into the slot of a twin in that node whose expert misses it least.
    """
    topology = problem.topology
    nodes, width = topology.num_nodes, topology.ranks_per_node
    for _ in range(nodes - 1):
        standing = np.zeros((problem.num_experts, nodes), np.int32)  # replicas of each expert in each node
        np.add.at(standing, (placed, np.arange(topology.num_ranks) // width), 1)
        by_node = (standing / count[:, None]).T @ load  # [nodes, W]
        mean = np.round(by_node.mean(axis=1), 5)
        hot, cold = int(mean.argmax()), int(mean.argmin())
        wanted = np.flatnonzero((standing[:, hot] > 0) & (standing[:, cold] == 0))
        spare = np.flatnonzero((standing[:, cold] > 1) & (count > problem.least))
        if hot == cold or not len(wanted) or not len(spare):
            return
        part = standing[wanted] / (count[wanted, None] + 1) - standing[wanted] / count[wanted, None]
        part[:, cold] += 1 / (count[wanted] + 1)
        highest = (by_node + part[:, :, None] * load[wanted, None]).max(axis=1).mean(axis=1)  # [wanted]
        best = int(np.argmin(np.round(highest, 5)))
        if highest[best] > by_node.max(axis=0).mean() - _LEAST_LEVELLED:
            return
        lost = spare[np.argmin(np.round(load[spare].mean(axis=1) / (count[spare] - 1), 6))]
        here = placed[:, cold * width : (cold + 1) * width]
        j, g = np.argwhere(here == lost)[-1]
        here[j, g] = wanted[best]
        count[lost] -= 1
        count[wanted[best]] += 1
