"""The plain numpy form of kernels.c: the reference of its tests, and what runs where nothing can compile.

The same operations in the same order in the same precision, so the same bits. Letters as there: N layers, E
experts, T windows, G ranks, K slots a rank; slots slot-major.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeserve.eplb.types import Floats, Ints

Singles = npt.NDArray[np.float32]
F = np.float32

_CANDIDATES = 24
_LANES = 16


class Options(NamedTuple):
    """How improve works.

    beta: steepness of the penalty. least_gain: smallest relative gain on the ranks concerned. rounds: tries at
    most. patience: hottest ranks without a gain before giving up. budget: changed slots at most, below 0 no
    limit. connect: the number of components does not rise. reassign: redundant slots may go to another expert.
    least: replicas that every expert keeps.
    """

    beta: float
    least_gain: float
    rounds: int
    patience: int
    budget: int
    connect: bool
    reassign: bool
    least: int


def prepare(windows: Floats, ranks: int) -> tuple[Singles, Floats, Floats]:
    """(load [N, E, T], mean [N, E], std [N, E]) of windows [T, N, E], with a mean rank load of 1."""
    total = _in_order(np.moveaxis(windows, 2, 0))[..., None]
    some = total > 0
    scale = np.where(some, ranks / np.where(some, total, 1.0), 0.0)
    scaled = windows * scale + np.where(some, 0.0, ranks / windows.shape[2])
    mean = _in_order(scaled) / float(len(windows))
    load = np.ascontiguousarray(scaled.transpose(1, 2, 0), F)
    apart = load.transpose(2, 0, 1).astype(np.float64) - mean
    return load, mean, np.sqrt(_in_order(apart * apart) / float(len(windows)))


def replicate(weight: Singles, ranks: int, slots: int, least: int) -> Ints:
    """Replica counts [N, E] for weight [N, E], `least` each and `slots` in all."""
    weight = np.asarray(weight, F)
    counts = np.full(weight.shape, least, np.int32)
    for w, count in zip(weight, counts, strict=True):
        each = w / F(least)
        for _ in range(slots - len(w) * least):
            free = np.where(count < ranks, each, F(-1))
            best = int(np.argmax(free if (count < ranks).any() else each))
            count[best] += 1
            each[best] = w[best] / F(count[best])
    return counts


def place(load: Singles, count: Ints, order: Ints, ranks: int, z: float, connect: bool) -> Ints:
    """slots [N, K, G] for load [N, E, T], the experts taken in order [N, E]."""
    rows = [
        _part_doubles(_place(x, c, o, ranks, F(z), connect), len(c))
        for x, c, o in zip(np.asarray(load, F), count, order, strict=True)
    ]
    return np.stack(rows)


def _place(load: Singles, count: Ints, order: Ints, ranks: int, z: F, connect: bool) -> Ints:
    windows, per_rank = load.shape[1], int(count.sum()) // ranks
    inverse = F(1) / F(windows)
    slots = np.full((per_rank, ranks), -1, np.int32)
    mean, dev = np.zeros(ranks, F), np.zeros((windows, ranks), F)
    used, degree, size = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64), np.ones(ranks, np.int64)
    parent = np.arange(ranks)
    for spread in (True, False) if connect else (False,):
        for e in order:
            if connect and (count[e] > 1) != spread:
                continue
            own = load[e] / F(count[e])
            each = _in_order(own) * inverse
            own = own - each
            holds = np.zeros(ranks, bool)
            for _ in range(count[e]):
                if spread:
                    component = np.isin(parent, parent[holds])
                    cost = (mean + (100 * degree).astype(F)) + np.where(
                        component, F(1e8), (10000 * size[parent]).astype(F)
                    )
                else:
                    step = dev + own[:, None]
                    cost = (mean + each) + z * np.sqrt(_in_order(step * step) * inverse)
                cost = np.where(holds, cost + F(1e9), cost)
                best = int(np.argmin(np.where(used < per_rank, cost, np.inf)))
                slots[used[best], best] = e
                used[best] += 1
                holds[best] = True
                mean[best] += each
                dev[:, best] += own
                degree[best] += spread
            if spread:
                first = parent[np.flatnonzero(holds)[0]]
                for g in np.flatnonzero(holds):
                    if parent[g] != first:
                        size[first] += size[parent[g]]
                        parent[parent == parent[g]] = first
    return slots


def _part_doubles(slots: Ints, num_experts: int) -> Ints:
    """Where an expert stands twice on a rank, swap one of the two for what another rank can give."""
    ranks = slots.shape[1]
    flat = slots.ravel()
    has = np.zeros((num_experts, ranks), np.int32)
    np.add.at(has, (flat, np.arange(len(flat)) % ranks), 1)
    for p in range(len(flat)):
        e, g = flat[p], p % ranks
        if has[e, g] < 2:
            continue
        for q in range(len(flat)):
            x, h = flat[q], q % ranks
            if not has[e, h] and (not has[x, g] or has[x, h] > 1):
                flat[p], flat[q] = x, e
                has[e, g] -= 1
                has[x, h] -= 1
                has[x, g] += 1
                has[e, h] += 1
                break
    return slots


def components(slots: Ints, count: Ints) -> int:
    """Number of components of the graph of ranks joined by a shared expert; slots [K, G]."""
    ranks = slots.shape[1]
    parent = np.arange(ranks)
    first: dict[int, int] = {}
    for p, e in enumerate(slots.ravel().tolist()):
        if count[e] < 2:
            continue
        a, b = parent[first.setdefault(e, p % ranks)], parent[p % ranks]
        if a != b:
            parent[parent == b] = a
    return len(set(parent.tolist()))


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
        self.at_rank: Singles = np.ascontiguousarray(_in_order(self.of_slot.transpose(1, 0, 2)).T)  # [G, T]
        self.highest = np.maximum(self.at_rank.max(), F(0))
        self.penalty = self._power(self.at_rank)
        self.parts = components(slots, count) if options.connect else 0
        self.changed = 0

    def _power(self, load: Singles) -> Singles:
        y: Singles = F(1) + (self.beta * (load - self.highest)) * F(1 / 1024)
        y = np.maximum(y, F(0.92))
        for _ in range(10):
            y = y * y
        return y

    def _weigh(self, which: npt.NDArray[np.bool_]) -> None:
        """The loads of the chosen slots anew."""
        e = self.slots[which]
        each = self.load[e] * (F(1) / self.count[e].astype(F))[:, None]
        self.of_slot[:, which] = each.T
        self.bar[which] = _in_order(each.T) * (F(1) / F(self.windows))

    def run(self) -> int:
        skip = np.zeros(self.ranks, bool)
        for _ in range(self.o.rounds):
            if skip.sum() >= self.o.patience or skip.all():
                break
            weight = np.ascontiguousarray(self.penalty.T)
            sums = _in_order(weight)
            h = int(np.argmax(np.where(skip, F(-1), sums)))
            chosen = self._choose(h, self._candidates(h, weight, sums))
            if chosen is None:
                skip[h] = True
            else:
                self._apply(h, *chosen)
        return self.changed

    def _candidates(self, h: int, weight: Singles, sums: Singles) -> list[tuple[int, int, int]]:
        """(kind, i, p) in order of their estimated score: kind 0 swaps slot i of rank h with slot p, kind 1 puts
        a replica of its expert into slot p."""
        o, half = self.o, self.beta * self.beta * F(0.5)
        own = _in_order(weight[:, None, :] * self.of_slot)
        cross = _in_order(weight[:, h, None, None] * self.of_slot)
        hosts, weights = np.zeros(self.experts, F), np.zeros(self.experts, F)
        np.add.at(hosts, self.slots.ravel(), own.ravel())
        np.add.at(weights, self.slots.ravel(), np.tile(sums, self.per_rank))
        near = self.node == self.node[h]
        scores: list[Singles] = []
        names: list[tuple[int, int, npt.NDArray[np.int64]]] = []
        for i in range(self.per_rank):
            a = self.slots[i, h]
            sa = _in_order(weight * self.of_slot[:, i, h, None])
            mine = self.bar[i, h]
            if o.budget < 0 or self.changed + 2 <= o.budget:
                d = mine - self.bar
                s = self.beta * ((sa - sa[h]) + (cross - own)) + half * ((sums + sums[h]) * (d * d))
                fits = (s < 0) & (near & (self.has[a] == 0)) & (self.has[self.slots, h] == 0)
                scores.append(s[fits])
                names.append((0, i, np.flatnonzero(fits)))
            if o.reassign and self.count[a] < self.ranks and (o.budget < 0 or self.changed < o.budget):
                s, fits = self._reassignments(a, sa, mine, own, hosts, weights, sums, half)
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
        half: F,
    ) -> tuple[Singles, npt.NDArray[np.bool_]]:
        b = self.slots
        r = F(self.count[a]) / F(self.count[a] + 1)
        rest = F(1) - r
        base = half * ((rest * mine) * (rest * mine) * weights[a]) - self.beta * (rest * hosts[a])
        q = F(1) / np.maximum(self.count[b] - 1, 1).astype(F)
        d, f = r * mine - self.bar, q * self.bar
        s = self.beta * ((r * sa - own) + q * (hosts[b] - own)) + base
        s = s + half * (sums * (d * d) + (weights[b] - sums) * (f * f))
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
            before, after = _by_lanes(self.penalty[touched]), _by_lanes(self._power(now))
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
        self.at_rank[ranks] = _in_order(self.of_slot[:, :, ranks].transpose(1, 2, 0))
        self.penalty[ranks] = self._power(self.at_rank[ranks])
        if self.o.connect:
            self.parts = components(self.slots, self.count)


def _exchange(slots: Ints, count: Ints, h: int, kind: int, i: int, p: int) -> None:
    a, b = slots[i, h], slots.flat[p]
    slots.flat[p] = a
    if kind:
        count[a] += 1
        count[b] -= 1
    else:
        slots[i, h] = b


def anneal(
    load: Singles, count: Ints, slots: Ints, beta: float, steps: int, connect: bool, least: int, seed: int
) -> None:
    """Changes count [N, E] and slots [N, K, G] in place."""
    for x, c, s in zip(np.asarray(load, F), count, slots, strict=True):
        _anneal(x, c, s, F(beta), steps, connect, least, seed)


def _anneal(
    load: Singles, count: Ints, slots: Ints, beta: F, steps: int, connect: bool, least: int, seed: int
) -> None:
    ranks = slots.shape[1]
    flat, experts = slots.reshape(-1), len(count)
    has = np.zeros((experts, ranks), np.int32)
    np.add.at(has, (flat, np.arange(len(flat)) % ranks), 1)
    each = load[slots] * (F(1) / count[slots].astype(F))[..., None]
    at_rank: Singles = _in_order(each)
    highest = np.maximum(at_rank.max(), F(0))

    def power(x: Singles) -> Singles:
        y: Singles = np.maximum(F(1) + (beta * (x - highest)) * F(1 / 1024), F(0.92))
        for _ in range(10):
            y = y * y
        return y

    energy = _in_order(power(at_rank).T)
    total, spare = _in_order(energy), int(count.sum()) - experts * least
    best, parts = _highest_mean(at_rank), components(slots, count) if connect else 0
    kept = count.copy(), slots.copy()
    random = _SplitMix(seed)
    for step in range(steps):
        left = F(steps - step) / F(steps)
        heat = F(4) * (left * left) + F(0.002)
        kind, one, two = random.next(), random.next(), random.next()
        chance = F(random.next() >> 40) * F(1 / 16777216)
        reassign = spare > 0 and kind % 2 == 0
        p, q = one % len(flat), two % len(flat)
        g, h, b = p % ranks, q % ranks, int(flat[p])
        a = two % experts if reassign else int(flat[q])
        if a == b or has[a, g] or (count[b] <= least or count[a] >= ranks if reassign else has[b, h]):
            continue
        na, nb = F(count[a]), F(count[b])
        if reassign:
            ranks_touched = [g, *(int(x) for x in np.flatnonzero(has[a] + has[b]) if x != g)]
            fa = has[a, ranks_touched].astype(F) * (F(1) / (na + F(1)) - F(1) / na)
            fb = has[b, ranks_touched].astype(F) * (F(1) / (nb - F(1)) - F(1) / nb)
            fa[0], fb[0] = F(1) / (na + F(1)), fb[0] - F(1) / (nb - F(1))
        else:
            ranks_touched = [g, h]
            fa = np.array([F(1) / na, F(-1) / na], F)
            fb = np.array([F(-1) / nb, F(1) / nb], F)
        now = (at_rank[ranks_touched] + fa[:, None] * load[a]) + fb[:, None] * load[b]
        after = _in_order(power(now).T)
        change = _in_order(after - energy[ranks_touched])
        if change > 0 and not chance < _power_of(-(change / (heat * total))):
            continue
        before = int(flat[q])
        flat[p] = a
        if reassign:
            count[a] += 1
            count[b] -= 1
        else:
            flat[q] = b
        if connect and components(slots, count) > parts:
            flat[p] = b
            if reassign:
                count[a] -= 1
                count[b] += 1
            else:
                flat[q] = before
            continue
        has[a, g] += 1
        has[b, g] -= 1
        if not reassign:
            has[b, h] += 1
            has[a, h] -= 1
        energy[ranks_touched], at_rank[ranks_touched] = after, now
        total = _in_order(energy)
        score = _highest_mean(at_rank)
        if score < best:
            best, kept = score, (count.copy(), slots.copy())
    count[:], slots[:] = kept


def _highest_mean(at_rank: Singles) -> F:
    total: F = _in_order(at_rank.max(axis=0)) / F(at_rank.shape[1])
    return total


def _power_of(x: F) -> F:
    y = np.maximum(F(1) + x * F(1 / 1024), F(0.92))
    for _ in range(10):
        y = y * y
    result: F = F(y)
    return result


class _SplitMix:
    """Random 64-bit numbers (Steele, Lea, Flood 2014)."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        mask = (1 << 64) - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        z = ((self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)


def fill(
    load: Floats, slots: Ints, rank_of: Ints, share: Floats, base: Floats | None, sweeps: int, omega: float
) -> Floats:
    """Changes share [N, B, P] in place for loads [N, B, E] over slots [N, P]; load of each rank [N, B, G]."""
    ranks = np.zeros((*load.shape[:2], int(rank_of.max()) + 1))
    for n, row in enumerate(slots):
        if base is not None:
            ranks[n] += base[n]
        _fill(load[n], row, rank_of, share[n], sweeps, omega, ranks[n])
    return ranks


def _fill(
    load: Floats, slots: Ints, rank_of: Ints, share: Floats, sweeps: int, omega: float, ranks: Floats
) -> None:
    for p, e in enumerate(slots):
        ranks[:, rank_of[p]] += load[:, e] * share[:, p]
    hosts = []
    for e in range(load.shape[1]):
        at = np.flatnonzero(slots == e).astype(np.int32)
        on, first, which = np.unique(rank_of[at], return_index=True, return_inverse=True)
        for i, slot in enumerate(at):  # of slots on one rank the first takes all
            if sweeps and first[which[i]] != i:
                share[:, at[first[which[i]]]] += share[:, slot]
                share[:, slot] = 0.0
        if len(on) > 1:
            hosts.append((e, np.sort(at[first])))
    for s in range(sweeps):
        step = omega if 3 * s < 2 * sweeps and s + 1 < sweeps else 1.0
        for e, at in hosts:
            rows = np.flatnonzero(load[:, e] > 0)
            spread = _fill_two if len(at) == 2 else _fill_many
            spread(rows, load[rows, e], at, rank_of[at], step, share, ranks)


def _fill_two(
    rows: npt.NDArray[np.int64], w: Floats, at: Ints, rank: Ints, step: float, share: Floats, ranks: Floats
) -> None:
    x = share[rows, at[0]]
    a, b = ranks[rows, rank[0]] - w * x, ranks[rows, rank[1]] - w * (1.0 - x)
    y = np.clip(x + step * (((b - a) + w) / (2.0 * w) - x), 0.0, 1.0)
    share[rows, at[0]], share[rows, at[1]] = y, 1.0 - y
    ranks[rows, rank[0]], ranks[rows, rank[1]] = a + w * y, b + w * (1.0 - y)


def _fill_many(
    rows: npt.NDArray[np.int64], w: Floats, at: Ints, rank: Ints, step: float, share: Floats, ranks: Floats
) -> None:
    level = np.sort(ranks[rows[:, None], rank] - w[:, None] * share[rows[:, None], at], axis=1)
    water = (w[:, None] + np.cumsum(level, axis=1)) / np.arange(1.0, len(at) + 1)
    full = np.concatenate([water[:, :-1] <= level[:, 1:], np.ones((len(rows), 1), bool)], axis=1)
    surface = water[np.arange(len(rows)), np.argmax(full, axis=1)]
    total = np.zeros(len(rows))
    for slot, g in zip(at, rank, strict=True):
        x = share[rows, slot]
        b = ranks[rows, g] - w * x
        y = np.maximum(x + step * (np.maximum(surface - b, 0.0) / w - x), 0.0)
        ranks[rows, g], share[rows, slot] = b, y
        total += y
    for slot, g in zip(at, rank, strict=True):
        share[rows, slot] = share[rows, slot] / total
        ranks[rows, g] += w * share[rows, slot]


def _in_order(values: npt.NDArray[Any]) -> Any:
    """Sum over axis 0 from first to last; numpy's own sum may go in another order."""
    return np.add.accumulate(values, axis=0)[-1]


def _by_lanes(values: Singles) -> F:
    """Sum of [ranks, T], 16 lanes at a time, as kernels.c does."""
    short = -values.shape[1] % _LANES
    padded = np.pad(values, ((0, 0), (0, short))).reshape(len(values), -1, _LANES)
    lanes = _in_order(np.concatenate([np.zeros((1, len(values), _LANES), F), padded.transpose(1, 0, 2)]))
    total: F = _in_order(lanes.ravel())
    return total
