"""All orders in which the protocol's actions can come: none goes wrong, and some do once a piece of it is missing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.cpu_engine import CpuEngine
from moeserve.comm.all_to_all.one_sided.layout import EpConfig, EpLayout, RowFormat
from moeserve.comm.all_to_all.one_sided.loops import Counts, PlainLoops
from moeserve.comm.symm import SymmHeap, local_heaps
from tests.comm.one_sided.protocol_model import (
    CHANGES,
    NOBODY,
    Model,
    Step,
    Violation,
    in_parts,
    program,
    random_steps,
    search,
    usual,
)

BREAK_BOTH = {
    "no mail wait": "reads rows of epoch",
    "no done wait": "sums",
    "mail first": "reads rows of epoch",
    "counts after mail": "counts of",
    "done first": "sums",
    "rows read late": "reads rows of epoch",
    "put early": "reads rows of epoch",
    "mail after wait": "all ranks wait",
}
BREAK_PUSH = {"one mail": "waits for mail of epoch"}
BREAK_PULL = {"done to used": "all ranks wait"}


def check(pull: bool, seeds: Sequence[int], sizes: Sequence[tuple[int, int, int]], *changes: str) -> int:
    """Random routings of (ranks, steps, cells) -> states seen."""
    return sum(
        search(Model(world, random_steps(world, count, cells, seed), pull, frozenset(changes)))
        for world, count, cells in sizes
        for seed in seeds
    )


@pytest.mark.parametrize("pull", [False, True])
def test_no_order_goes_wrong(pull: bool) -> None:
    assert check(pull, range(4), [(2, 5, 2), (3, 3, 1), (3, 3, 2)]) > 5000


@pytest.mark.slow
@pytest.mark.parametrize("pull", [False, True])
def test_no_order_goes_wrong_in_longer_runs(pull: bool) -> None:
    assert check(pull, range(12), [(2, 12, 3), (3, 5, 2), (3, 6, 1)]) > 50_000
    assert check(pull, range(2), [(4, 2, 1)]) > 10_000


def test_rows_in_several_windows() -> None:
    for seed in range(4):
        for world, parts in ((2, 3), (3, 2)):
            search(Model(world, in_parts(world, parts, 2, seed)))


@pytest.mark.parametrize(
    ("pull", "change", "message"),
    [(pull, *item) for pull in (False, True) for item in BREAK_BOTH.items()]
    + [(False, *item) for item in BREAK_PUSH.items()]
    + [(True, *item) for item in BREAK_PULL.items()],
)
def test_each_piece_is_needed(pull: bool, change: str, message: str) -> None:
    with pytest.raises(Violation, match=message):
        check(pull, range(6), [(2, 4, 2), (3, 3, 1)], change)


def test_every_change_is_tried() -> None:
    assert set(CHANGES) == {*BREAK_BOTH, *BREAK_PUSH, *BREAK_PULL, "wait for used"}


def test_under_pull_one_mail_word_or_pairwise_waits_would_do_but_not_both() -> None:
    sizes = [(2, 4, 2), (3, 3, 1)]
    check(True, range(3), sizes, "one mail")
    check(True, range(3), sizes, "wait for used")
    with pytest.raises(Violation, match="waits for mail of epoch"):
        check(True, range(3), sizes, "one mail", "wait for used")


def test_a_violation_tells_how_it_came_about() -> None:
    step = usual([[1], [NOBODY]])
    with pytest.raises(Violation) as failure:
        search(Model(2, (step,), changes=frozenset(["no done wait"])))
    lines = str(failure.value).splitlines()
    assert lines[0] == "rank 0 sums a result of (epoch, rank) (0, 0), wants (1, 1)"
    assert "  rank 0, step 1: x 1" in lines and lines[-1] == "  rank 0, step 1: sum"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["spare", "pull", "void"])
def test_a_rank_that_was_taken_for_late_harms_nobody(kind: str, seed: int) -> None:
    """It goes on whenever it likes; with spare cells, under pull, or where results after a fault do not count."""
    steps = random_steps(2, 4, 2, seed, own=True)
    search(Model(2, steps, pull=kind == "pull", zombies=frozenset([1]), spare=kind == "spare"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spare", "pull", "void"])
def test_a_late_rank_of_three_harms_nobody(kind: str) -> None:
    for seed in range(4):
        steps = random_steps(3, 2, 1, seed, own=True)
        search(Model(3, steps, pull=kind == "pull", zombies=frozenset([2]), spare=kind == "spare"))


def test_without_spare_cells_a_late_rank_overwrites_results() -> None:
    """Step 1: rank 0's token goes to rank 1, which wakes up when the cell belongs to rank 0's own slot."""
    steps = (usual([[1], [NOBODY]]), usual([[0], [NOBODY]]))
    with pytest.raises(Violation, match=r"rank 0 sums a result of \(epoch, rank\) \(1, 1\), wants \(2, 0\)"):
        search(Model(2, steps, zombies=frozenset([1]), counts_void=True))
    search(Model(2, steps, zombies=frozenset([1]), counts_void=True, spare=True))


@pytest.mark.slow
def test_spare_cells_are_used_up_by_ranks_late_in_different_steps() -> None:
    """Rank 1 is late in step 1 and rank 2 in step 2: either may still write into one half, and both are in use."""
    steps = (usual([[1], [-1], [-1]]), usual([[2], [-1], [-1]]), usual([[0], [-1], [-1]]))
    with pytest.raises(Violation, match=r"sums a result of \(epoch, rank\) \(2, 2\), wants \(3, 0\)"):
        search(Model(3, steps, zombies=frozenset([1, 2]), spare=True))


class Recording(PlainLoops):
    """Notes what one engine does in the words of the model."""

    def __init__(self, heap: SymmHeap, layout: EpLayout) -> None:
        super().__init__(heap, layout)
        self.calls: list[tuple[str, frozenset[int]]] = []

    def _note(self, kind: str, ranks: Tensor) -> None:
        self.calls.append((kind, frozenset(ranks.nonzero()[:, 0].tolist()) - {self._rank}))

    def put(
        self,
        epoch: int,
        x: Tensor,
        scales: Tensor | None,
        slots: Tensor,
        alive: Tensor,
        first: int,
        version: int,
    ) -> Tensor:
        sent = super().put(epoch, x, scales, slots, alive, first, version)
        self._note("x", sent)
        self._note("mail", alive)
        return sent

    def wait(
        self, words: str, epoch: int, pending: Tensor, low: Tensor, seconds: float, pause: float, spin: bool
    ) -> int:
        self._note(f"await {words}", pending)
        return super().wait(words, epoch, pending, low, seconds, pause, spin)

    def count(self, epoch: int, rows: Tensor) -> Counts:
        self._note("read", rows)
        return super().count(epoch, rows)

    def push(self, epoch: int, y: Tensor, origin: Tensor, low: int, high: int, tell: Tensor) -> None:
        self._note("result", torch.bincount(origin[:, 0], minlength=len(tell)))
        self._note("done", tell)
        super().push(epoch, y, origin, low, high, tell)

    def sum(self, first: int, slots: Tensor, weights: Tensor, alive: Tensor, out: Tensor) -> None:
        self.calls.append(("sum", frozenset()))
        super().sum(first, slots, weights, alive, out)


def of_model(model: Model, rank: int, number: int) -> list[tuple[str, frozenset[int]]]:
    """A step of the model as kinds with the other ranks that they concern."""
    actions = [action for action in program(model, rank) if action.step == number]
    kinds = ["x", "mail", "await mail", "read", "result", "done", "await done", "sum"]
    return [(kind, frozenset(a.peer for a in actions if a.kind == kind) - {rank, NOBODY}) for kind in kinds]


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_cpu_engine_does_what_the_model_does(seed: int, everyone: bool) -> None:
    world, cells = 3, 4
    model = Model(
        world,
        tuple(Step(s.rows, s.cells, everyone) for s in random_steps(world, 3, cells, seed, own=True)),
    )
    form = RowFormat(2, torch.float32)
    layout = EpLayout(EpConfig(world, cells, 1, 1, form, form))
    heaps = local_heaps(world, layout.nbytes)
    loops = [Recording(heap, layout) for heap in heaps]
    engines = [
        CpuEngine(heap, layout, 1.0, keep_spare=False, loops=own)
        for heap, own in zip(heaps, loops, strict=True)
    ]
    for number, step in enumerate(model.steps, 1):
        for rank, engine in enumerate(engines):
            loops[rank].calls = []
            engine.put(torch.ones(cells, 2), torch.tensor(step.cells[rank]).unsqueeze(1))
        received = [engine.receive() for engine in engines]
        for engine, got in zip(engines, received, strict=True):
            engine.push(got.x, got.origin, everyone=everyone)
        for rank, engine in enumerate(engines):
            engine.finish(torch.ones(cells, 1), everyone=everyone)
            assert loops[rank].calls == of_model(model, rank, number)


def test_the_model_speaks_of_the_layouts_words() -> None:
    form = RowFormat(8, torch.bfloat16)
    push = EpLayout(EpConfig(3, 5, 2, 4, form, form))
    pull = EpLayout(EpConfig(3, 5, 2, 4, form, form, "pull"))
    assert push.mail.shape == (2, 3) and push.slot_cnt.shape == (2, 3, 4), "two by parity, one a source"
    assert push.done.shape == (3,) and push.x.shape[:2] == push.meta.shape[:2] == (3, 5)
    assert push.z is not None and push.z.shape[:2] == (5, 2), "a cell has no source of its own"
    assert pull.y is not None and pull.y.shape[:2] == (3, 5)
