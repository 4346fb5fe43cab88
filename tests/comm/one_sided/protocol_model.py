"""The protocol of the one-sided all-to-all as words and waits, and a search through all orders they can come in.

What stands for what, by the names of layout.py; a word holds the epoch that last wrote it:

    x          a source's slice of rows on a rank, and its records (meta); also which half of z the source uses
    slot_cnt   counts of a source on a rank, two by parity of the epoch
    mail       the word that releases both, two by parity
    z          one result cell of a token; holds who wrote it, too. Two halves where half is kept spare
    y          a source's slice of results on the rank that made them
    done       the word that releases z or y, and says that the rows have been read

One rank's step is a list of actions, each one store, look or wait in one rank's block, in the order in which the
engines make them: put (x, slot_cnt, mail), receive (mail, x), push or answer (z or y, done), finish or reduce (done,
then z or y). Data is stored before its word and looked at after it: that is what x86 and release/acquire promise, so
between those the search assumes no more than program order. A rank may stop for any time between two actions.

A zombie is a rank that others may take for late in any wait, and that goes on, or takes them for late, whenever it
likes. Nobody counts its own results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NOBODY = -1

CHANGES = {
    "no mail wait": "rows are read without waiting for their mail",
    "no done wait": "results are summed without waiting for done",
    "mail first": "the mail word is released before the rows are stored",
    "counts after mail": "the counts are stored after the mail word",
    "done first": "done is released before the results are stored",
    "rows read late": "done is released before the rows are read",
    "put early": "rows of the next step are put before the results of this one are there",
    "one mail": "one mail word and one row of counts instead of two by parity",
    "wait for used": "under pull, done is awaited only from ranks that rows went to",
    "mail after wait": "mail is released only once the mail of all others is there",
    "done to used": "every rank is awaited, but done goes only to ranks that sent rows",
}
"""Ways to break the protocol, or to change it."""


class Violation(Exception):
    """An order of actions in which the protocol goes wrong: what, and the actions before."""


@dataclass(frozen=True)
class Step:
    """What one epoch moves.

    rows: by source, the ranks that get rows of it. cells: by source, the rank that gives the result in each of its
    cells, or NOBODY. Usually these are the same; where more rows are moved than a window holds, results come in
    steps of their own, and everyone tells everyone (`everyone`).
    """

    rows: tuple[frozenset[int], ...]
    cells: tuple[tuple[int, ...], ...]
    everyone: bool = False


@dataclass(frozen=True)
class Model:
    """What is searched. changes: keys of CHANGES. spare: half of z is kept free for after a fault.

    counts_void: whether results after a fault are held against what they should be although none is spare.
    """

    world: int
    steps: tuple[Step, ...]
    pull: bool = False
    changes: frozenset[str] = frozenset()
    zombies: frozenset[int] = frozenset()
    spare: bool = False
    counts_void: bool = False


class Action(NamedTuple):
    kind: str
    step: int
    peer: int


class _State(NamedTuple):
    at: tuple[int, ...]  # by rank, number of its next action
    masks: tuple[int, ...]  # by rank, a bit for each rank that it takes for late
    since: tuple[int, ...]  # by rank, the step in which it first did, 0 for none
    memory: tuple[int, ...]


def usual(cells: Sequence[Sequence[int]]) -> Step:
    """A step whose rows come back as results: cells by source."""
    rows = tuple(frozenset(target for target in own if target != NOBODY) for own in cells)
    return Step(rows, tuple(tuple(own) for own in cells))


def random_steps(world: int, count: int, cells: int, seed: int, own: bool = False) -> tuple[Step, ...]:
    """Random targets, none as often as another rank; own: a rank's own slots too."""
    random = np.random.default_rng(seed)
    steps = []
    for _ in range(count):
        drawn = random.integers(NOBODY, world, (world, cells)).tolist()
        steps.append(
            usual([[NOBODY if t == rank and not own else t for t in row] for rank, row in enumerate(drawn)])
        )
    return tuple(steps)


def in_parts(world: int, parts: int, cells: int, seed: int) -> tuple[Step, ...]:
    """A dispatch of `parts` windows of rows, then its results: the last rows' step brings the first results."""
    wanted = random_steps(world, parts, cells, seed)
    nothing = usual([[NOBODY] * cells] * world)
    rows = [step.rows for step in wanted] + [nothing.rows] * (parts - 1)
    results = [nothing.cells] * (parts - 1) + [step.cells for step in wanted]
    return tuple(Step(r, c, everyone=True) for r, c in zip(rows, results, strict=True))


def program(model: Model, rank: int) -> list[Action]:
    """All actions of a rank, in order."""
    actions: list[Action] = []
    for number, step in enumerate(model.steps, 1):
        parts = _parts(model, rank, number, step)
        put, mail, arrive, read, result, done, there, total = parts
        if "mail first" in model.changes:
            put, mail = mail, put
        if "mail after wait" in model.changes:
            mail, arrive = arrive, mail
        if "rows read late" in model.changes:
            read, result, done = [], result, done + read
        if "done first" in model.changes:
            result, done = done, result
        if "put early" in model.changes and number > 1:
            place = next(i for i, a in enumerate(actions) if a.step == number - 1 and a.kind in _LAST)
            actions[place:place] = put
            put = []
        actions += put + mail + arrive + read + result + done + there + total
    return actions


_LAST = ("await done", "sum")


def _parts(model: Model, rank: int, number: int, step: Step) -> list[list[Action]]:
    world, changes = model.world, model.changes
    others = [(rank + i) % world for i in range(1, world)]
    targets = [d for d in others if d in step.rows[rank]]
    sources = [s for s in others if rank in step.rows[s]]
    all_tell = model.pull or step.everyone
    told = others if all_tell and "done to used" not in changes else sources
    awaited = others if all_tell and "wait for used" not in changes else targets
    owed = [s for s in [*others, rank] if rank in step.cells[s]]
    if model.pull:
        owed = [s for s in owed if s != rank]
        sums = [d for d in others if d in step.cells[rank]]
    else:
        sums = [NOBODY]
    release = [[("count", d), ("mail", d)] for d in others]
    if "counts after mail" in changes:
        release = [pair[::-1] for pair in release]
    parts = [
        [("x", d) for d in targets],
        [action for pair in release for action in pair],
        [] if "no mail wait" in changes else [("await mail", s) for s in others],
        [("read", s) for s in sources],
        [("result", s) for s in owed],
        [("done", s) for s in told],
        [] if "no done wait" in changes else [("await done", d) for d in awaited],
        [("sum", d) for d in sums],
    ]
    return [[Action(kind, number, peer) for kind, peer in part] for part in parts]


def search(model: Model, limit: int = 5_000_000) -> int:
    """Goes through all orders -> states seen. Raises Violation for one that goes wrong."""
    return _Search(model).run(limit)


class _Search:
    def __init__(self, model: Model) -> None:
        self._model = model
        self._programs = [program(model, rank) for rank in range(model.world)]
        self._places: dict[tuple[object, ...], int] = {}

    def run(self, limit: int) -> int:
        world = self._model.world
        self._number_places()
        first = _State((0,) * world, (0,) * world, (0,) * world, (0,) * len(self._places))
        parents: dict[_State, tuple[_State, int] | None] = {first: None}
        stack = [first]
        while stack:
            state = stack.pop()
            stuck = True
            for rank in range(world):
                try:
                    following = list(self._following(state, rank))
                except Violation as error:
                    raise Violation(f"{error}\n{self._trace(parents, state, rank)}") from None
                for after in following:
                    stuck = False
                    if after not in parents:
                        parents[after] = state, rank
                        stack.append(after)
            done = all(at == len(own) for at, own in zip(state.at, self._programs, strict=True))
            if stuck and not done:
                raise Violation(f"all ranks wait\n{self._trace(parents, state, NOBODY)}")
            assert len(parents) <= limit, "too many states"
        return len(parents)

    def _number_places(self) -> None:
        model = self._model
        ranks = range(model.world)
        cells = len(model.steps[0].cells[0])
        for me in ranks:
            for other in ranks:
                for name in ("x", "y", "done", "mail0", "mail1", "count0", "count1"):
                    self._places[name, me, other] = len(self._places)
            for half in (0, 1):
                for cell in range(cells):
                    self._places["z", me, half, cell] = len(self._places)

    def _following(self, state: _State, rank: int) -> Iterator[_State]:
        """The states to which the next action of a rank can lead; none while it waits."""
        at = state.at[rank]
        if at == len(self._programs[rank]):
            return
        action = self._programs[rank][at]
        kind, epoch, peer = action
        forward = state._replace(at=_with(state.at, rank, at + 1))
        if peer != NOBODY and state.masks[rank] >> peer & 1:
            yield forward
        elif kind.startswith("await"):
            word = state.memory[self._word(kind.split()[1], rank, peer, epoch)]
            if word == epoch:
                yield forward
            elif word > epoch:
                if rank not in self._model.zombies:
                    raise Violation(f"rank {rank} waits for {kind.split()[1]} of epoch {epoch}, finds {word}")
                yield state._replace(at=_with(state.at, rank, len(self._programs[rank])))  # it is evicted
            elif not self._model.zombies.isdisjoint((rank, peer)):
                yield forward._replace(
                    masks=_with(state.masks, rank, state.masks[rank] | 1 << peer),
                    since=_with(state.since, rank, state.since[rank] or epoch),
                )
        elif kind in ("read", "sum"):
            self._look(state, rank, action)
            yield forward
        else:
            memory = state.memory
            for place, value in self._stores(state, rank, action):
                memory = _with(memory, place, value)
            yield forward._replace(memory=memory)

    def _stores(self, state: _State, rank: int, action: Action) -> Iterator[tuple[int, int]]:
        kind, epoch, peer = action
        if kind == "x":
            yield self._places["x", peer, rank], epoch * 2 + self._half(state, rank, epoch)
        elif kind != "result":
            yield self._word(kind, peer, rank, epoch), epoch
        elif self._model.pull:
            yield self._places["y", rank, peer], epoch
        else:
            half = self._half(state, rank, epoch)
            if peer != rank:
                half = state.memory[self._places["x", rank, peer]] & 1
            for cell, target in enumerate(self._model.steps[epoch - 1].cells[peer]):
                if target == rank:
                    yield self._places["z", peer, half, cell], self._written(epoch, rank)

    def _look(self, state: _State, rank: int, action: Action) -> None:
        kind, epoch, peer = action
        model, memory = self._model, state.memory
        if kind == "read":
            found = memory[self._places["x", rank, peer]] >> 1
            counted = memory[self._word("count", rank, peer, epoch)]
            if (found, counted) != (epoch, epoch):
                raise Violation(f"rank {rank} reads rows of epoch {found}, counts of {counted}, in {epoch}")
            return
        void = state.since[rank] and state.since[rank] < epoch and not (model.spare or model.pull)
        if rank in model.zombies or (void and not model.counts_void):
            return
        if model.pull:
            found = memory[self._places["y", peer, rank]]
            if found != epoch:
                raise Violation(f"rank {rank} sums results of epoch {found} of rank {peer} in {epoch}")
            return
        half = self._half(state, rank, epoch)
        for cell, target in enumerate(model.steps[epoch - 1].cells[rank]):
            if target == NOBODY or state.masks[rank] >> target & 1:
                continue
            found = memory[self._places["z", rank, half, cell]]
            if found != self._written(epoch, target):
                by = divmod(found, model.world)
                raise Violation(f"rank {rank} sums a result of (epoch, rank) {by}, wants {(epoch, target)}")

    def _half(self, state: _State, rank: int, epoch: int) -> int:
        """Of z, which a rank's tokens use in a step: the second from the step after a fault on."""
        return int(self._model.spare and 0 < state.since[rank] < epoch)

    def _written(self, epoch: int, rank: int) -> int:
        return epoch * self._model.world + rank

    def _word(self, kind: str, owner: int, writer: int, epoch: int) -> int:
        if kind in ("mail", "count"):
            kind += str(0 if "one mail" in self._model.changes else epoch & 1)
        return self._places[kind, owner, writer]

    def _trace(self, parents: dict[_State, tuple[_State, int] | None], state: _State, last: int) -> str:
        steps = [(last, state)] if last != NOBODY else []
        while (link := parents[state]) is not None:
            state, rank = link
            steps.append((rank, state))
        lines = []
        for rank, before in reversed(steps):
            kind, epoch, peer = self._programs[rank][before.at[rank]]
            lines.append(f"  rank {rank}, step {epoch}: {kind} {peer if peer != NOBODY else ''}".rstrip())
        return "\n".join(lines)


def _with(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])
