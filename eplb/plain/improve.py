"""The local search: swaps of slots and new owners of redundant slots, by a steep penalty on high rank loads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.eplb.plain.common import F, Options, Singles, by_lanes, in_order, power
from moeserve.eplb.plain.place import components
from moeserve.eplb.types import Ints

_CANDIDATES = 24


def improve(load: Singles, count: Ints, slots: Ints, node: Ints, options: Options) -> Ints:
    """Changes count [N, E] and slots [N, K, G] in place; slots written [N]."""
    layers = zip(np.asarray(load, F), count, slots, strict=True)
    return np.array([_Improver(x, c, s, np.asarray(node), options).run() for x, c, s in layers], np.int32)


class _Improver:
    """One layer of improve: the loads, their penalties, and the search over them."""

    def __init__(self, load: Singles, count: Ints, slots: Ints, node: Ints, options: Options) -> None:
        self.load, self.count, self.slots, self.node, self.o = load, count, slots, node, options
        self.experts, self.windows = load.shape
        self.per_rank, self.ranks = slots.shape
        self.beta = F(options.beta)
        self.has = np.zeros((self.experts, self.ranks), np.int32)
        flat = slots.ravel()
        np.add.at(self.has, (flat, np.arange(len(flat)) % self.ranks), 1)
        self.of_slot = np.empty((self.windows, self.per_rank, self.ranks), F)
        self.bar = np.empty((self.per_rank, self.ranks), F)
        self._weigh(np.ones(slots.shape, bool))
        self.at_rank: Singles = np.ascontiguousarray(in_order(self.of_slot.transpose(1, 0, 2)).T)  # [G, T]
        self.highest = np.maximum(self.at_rank.max(), F(0))
        self.penalty = self._power(self.at_rank)
        self.parts = components(slots, count) if options.connect else 0
        self.changed = 0

    def _power(self, load: Singles) -> Singles:
        found: Singles = power(self.beta * (load - self.highest))
        return found

    def _weigh(self, which: npt.NDArray[np.bool_]) -> None:
        """The loads of the chosen slots anew."""
        e = self.slots[which]
        each = self.load[e] * (F(1) / self.count[e].astype(F))[:, None]
        self.of_slot[:, which] = each.T
        self.bar[which] = in_order(each.T) * (F(1) / F(self.windows))

    def run(self) -> int:
        skip = np.zeros(self.ranks, bool)
        for _ in range(self.o.rounds):
            if skip.sum() >= self.o.patience or skip.all():
                break
            weight = np.ascontiguousarray(self.penalty.T)
            sums = in_order(weight)
            h = int(np.argmax(np.where(skip, F(-1), sums)))
            chosen = self._choose(h, self._candidates(h, weight, sums, F(0)))
            if chosen is None and self.o.budget >= 0:
                chosen = self._choose(h, self._candidates(h, weight, sums, F(1)))
            if chosen is None:
                skip[h] = True
            else:
                self._apply(h, *chosen)
        return self.changed

    def _candidates(self, h: int, weight: Singles, sums: Singles, soft: F) -> list[tuple[int, int, int]]:
        """(kind, i, p) in order of their estimated score: kind 0 swaps slot i of rank h with slot p, kind 1 puts
        a replica of its expert into slot p."""
        o = self.o
        own = in_order(weight[:, None, :] * self.of_slot)
        cross = in_order(weight[:, h, None, None] * self.of_slot)
        hosts, weights = np.zeros(self.experts, F), np.zeros(self.experts, F)
        np.add.at(hosts, self.slots.ravel(), own.ravel())
        np.add.at(weights, self.slots.ravel(), np.tile(sums, self.per_rank))
        near = self.node == self.node[h]
        scores: list[Singles] = []
        names: list[tuple[int, int, npt.NDArray[np.int64]]] = []
        for i in range(self.per_rank):
            a = self.slots[i, h]
            sa = in_order(weight * self.of_slot[:, i, h, None])
            mine = self.bar[i, h]
            if o.budget < 0 or self.changed + 2 <= o.budget:
                d = self.beta * (mine - self.bar)
                s = self.beta * ((sa - sa[h]) + (cross - own)) + (sums + sums[h]) * _bend(d, soft)
                fits = (s < 0) & (near & (self.has[a] == 0)) & (self.has[self.slots, h] == 0)
                scores.append(s[fits])
                names.append((0, i, np.flatnonzero(fits)))
            if o.reassign and self.count[a] < self.ranks and (o.budget < 0 or self.changed < o.budget):
                s, fits = self._reassignments(a, sa, mine, own, hosts, weights, sums, soft)
                fits &= near & (self.has[a] == 0) & (s < 0)
                scores.append(s[fits])
                names.append((1, i, np.flatnonzero(fits)))
        if not scores:
            return []
        flat = [(kind, i, int(p)) for kind, i, places in names for p in places]
        best = np.argsort(np.concatenate(scores), kind="stable")[:_CANDIDATES]
        return [flat[n] for n in best]

    def _reassignments(
        self,
        a: int,
        sa: Singles,
        mine: F,
        own: Singles,
        hosts: Singles,
        weights: Singles,
        sums: Singles,
        soft: F,
    ) -> tuple[Singles, npt.NDArray[np.bool_]]:
        b = self.slots
        r = F(self.count[a]) / F(self.count[a] + 1)
        rest = F(1) - r
        base = weights[a] * _bend(self.beta * (rest * mine), soft) - self.beta * (rest * hosts[a])
        q = F(1) / np.maximum(self.count[b] - 1, 1).astype(F)
        d, f = r * mine - self.bar, q * self.bar
        s = self.beta * ((r * sa - own) + q * (hosts[b] - own)) + base
        s = s + (sums * _bend(self.beta * d, soft) + (weights[b] - sums) * _bend(self.beta * f, soft))
        return s, self.count[b] > self.o.least

    def _choose(self, h: int, found: list[tuple[int, int, int]]) -> tuple[int, int, int] | None:
        """The candidate with the largest gain when it is worked out in full."""
        chosen, best = None, F(0)
        for kind, i, p in found:
            g, a, b = p % self.ranks, self.slots[i, h], self.slots.flat[p]
            touched = [h, g]
            if kind:
                also = np.flatnonzero(self.has[a] + self.has[b])
                touched += [int(x) for x in also if x not in (h, g)]
            na, nb = F(self.count[a]), F(self.count[b])
            fa = np.array([F(-1) / na, F(1) / na], F)
            fb = np.array([F(1) / nb, F(-1) / nb], F)
            if kind:
                fa = self.has[a, touched].astype(F) * (F(1) / (na + F(1)) - F(1) / na)
                fb = self.has[b, touched].astype(F) * (F(1) / (nb - F(1)) - F(1) / nb)
                fa[1] = F(1) / (na + F(1))
                fb[1] = fb[1] - F(1) / (nb - F(1))
            now = (self.at_rank[touched] + fa[:, None] * self.load[a]) + fb[:, None] * self.load[b]
            before, after = by_lanes(self.penalty[touched]), by_lanes(self._power(now))
            gain = before - after
            if not gain > F(self.o.least_gain) * before:
                continue
            if self.o.budget >= 0 and not kind:
                gain = gain * F(0.5)
            if not gain > best or (self.o.connect and self._parts_after(h, kind, i, p) > self.parts):
                continue
            chosen, best = (kind, i, p), gain
        return chosen

    def _parts_after(self, h: int, kind: int, i: int, p: int) -> int:
        a, b = self.slots[i, h], self.slots.flat[p]
        if self.count[a] < 2 and self.count[b] < 2:
            return self.parts
        slots, count = self.slots.copy(), self.count.copy()
        _exchange(slots, count, h, kind, i, p)
        return components(slots, count)

    def _apply(self, h: int, kind: int, i: int, p: int) -> None:
        g, a, b = p % self.ranks, self.slots[i, h], self.slots.flat[p]
        _exchange(self.slots, self.count, h, kind, i, p)
        self.has[a, g] += 1
        self.has[b, g] -= 1
        if not kind:
            self.has[b, h] += 1
            self.has[a, h] -= 1
        self.changed += 1 if kind else 2
        self._weigh((self.slots == a) | (self.slots == b))
        ranks = [h, g]
        if kind:
            ranks += [int(x) for x in np.flatnonzero(self.has[a] + self.has[b]) if x not in (h, g)]
        self.at_rank[ranks] = in_order(self.of_slot[:, :, ranks].transpose(1, 2, 0))
        self.penalty[ranks] = self._power(self.at_rank[ranks])
        if self.o.connect:
            self.parts = components(self.slots, self.count)


def _bend(x: Any, soft: F) -> Any:
    """What follows the first order of a penalty whose exponent changes by x: its second order, or with soft = 1 no
    more than |x|, so that a slot much heavier than those of other ranks is not taken for one that cannot move."""
    return (x * x) / (F(2) + soft * np.abs(x))


def _exchange(slots: Ints, count: Ints, h: int, kind: int, i: int, p: int) -> None:
    a, b = slots[i, h], slots.flat[p]
    slots.flat[p] = a
    if kind:
        count[a] += 1
        count[b] -= 1
    else:
        slots[i, h] = b
