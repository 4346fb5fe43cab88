"""An order leads where it says or is refused; ranks take the same turns; slots end up with what the plan has there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.weight_mover import TransferError, WeightMover
from moeserve.comm.weight_mover.exchange import ExchangeMover
from moeserve.eplb.migration import plan_migration
from moeserve.eplb.types import Placement, Topology
from moeserve.messages import FromRank, LayerOrder, LayersSwitched, Migrate, Migrated
from moeserve.moe import migrator as migrator_module
from moeserve.moe.expert_map import ExpertMap
from moeserve.moe.migration import (
    IDLE_BYTES,
    LEAST_BYTES,
    MOST_SKIPPED,
    STEP_PART,
    Pace,
    Rounds,
    State,
    Word,
    fingerprint,
    ordered_placement,
)
from moeserve.moe.migrator import Migrator

TOPOLOGY = Topology(num_ranks=2, slots_per_rank=3)
OLD = Placement(np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 1, 2], [0, 1, 2, 3, 3, 3]]), 4, generation=4)


@st.composite
def placements(draw: st.DrawFn, generation: int, layers: int = 3) -> Placement:
    """Any placement of 4 experts on 6 slots; some layers have OLD's slots, some its shares too."""
    rows, shares = [], []
    for layer in range(layers):
        kind = draw(st.sampled_from(["same", "shares", "all"]))
        row = list(OLD.slot_to_expert[layer])
        if kind == "all":
            row = draw(st.permutations([0, 1, 2, 3, *draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))]))
        weight = np.array(draw(st.lists(st.integers(1, 9), min_size=6, max_size=6)), float)
        even = kind == "same"
        total = np.bincount(row, weights=np.ones(6) if even else weight, minlength=4)
        rows.append(row)
        shares.append((1.0 if even else weight) / total[row])
    return Placement(np.array(rows), 4, generation, np.array(shares))


def order_to(new: Placement, old: Placement = OLD, number: int = 1, **more: float) -> Migrate:
    plan = plan_migration(old, new, TOPOLOGY)
    layers = [
        LayerOrder(
            layer,
            new.slot_to_expert[layer].tolist(),
            new.share[layer].tolist(),
            [(move.source_slot, move.target_slot) for moves in rounds for move in moves],
        )
        for layer, rounds in plan.layers
    ]
    order = Migrate(number, old.generation, old.digest, new.generation, new.digest, layers)
    return msgspec.structs.replace(order, **more)


NEW = Placement(
    np.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 1, 2], [0, 1, 2, 3, 0, 1]]), 4, 5,
    np.array([[0.25, 0.5, 1, 1, 0.75, 0.5], [1, 0.5, 0.5, 1, 0.5, 0.5], [0.5, 0.5, 1, 1, 0.5, 0.5]]),
)  # fmt: skip


@given(placements(5))
def test_an_order_made_from_a_plan_leads_to_the_plans_placement(new: Placement) -> None:
    order = order_to(new)
    if order.layers:
        assert ordered_placement(order, OLD, TOPOLOGY) == new


def changed(order: Migrate, index: int = 0, **fields: object) -> Migrate:
    layers = list(order.layers)
    layers[index] = msgspec.structs.replace(layers[index], **fields)
    return msgspec.structs.replace(order, layers=layers)


GOOD = order_to(NEW)
BAD: dict[str, tuple[Migrate, str]] = {
    "another start": (msgspec.structs.replace(GOOD, old_digest="f" * 64), "starts from generation 4"),
    "another generation": (msgspec.structs.replace(GOOD, old_generation=3), "in force is generation 4"),
    "another end": (msgspec.structs.replace(GOOD, digest="f" * 64), "it leads to .* as it says"),
    "no layers": (msgspec.structs.replace(GOOD, layers=[]), "0 layers"),
    "no layer at a time": (msgspec.structs.replace(GOOD, layers_per_step=0), "0 at a time"),
    "no bytes": (msgspec.structs.replace(GOOD, bytes_per_second=0.0), "bytes_per_second = 0.0"),
    "a layer too many": (changed(GOOD, layer=3), "layer 3: the model has 0 to 2"),
    "a layer twice": (msgspec.structs.replace(GOOD, layers=[GOOD.layers[0]] * 2), "named twice"),
    "a slot too few": (changed(GOOD, slot_to_expert=[0, 1, 2, 3, 0]), "5 slots and 6 shares, expected 6"),
    "a move left out": (changed(GOOD, 1, moves=GOOD.layers[1].moves[1:]), "layer 1: slot . would hold"),
    "a move into nowhere": (changed(GOOD, 1, moves=[(0, 6)]), "no move from slot 0 to 6"),
    "two moves into a slot": (changed(GOOD, 1, moves=[*GOOD.layers[1].moves[:1]] * 2), "two moves into one"),
    "a lost expert": (
        changed(GOOD, 1, slot_to_expert=[3, 3, 3, 3, 3, 3], moves=[(0, i) for i in range(1, 6)]),
        "expert 0 has no slot",
    ),
    "shares that do not add up": (changed(GOOD, share=[0.5] * 6), "add up to"),
}


@pytest.mark.parametrize(("order", "named"), BAD.values(), ids=BAD)
def test_an_order_that_does_not_fit_is_refused(order: Migrate, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ordered_placement(order, OLD, TOPOLOGY)


@given(placements(5), st.permutations(range(3)))
def test_the_generation_is_the_new_one_once_all_layers_follow(new: Placement, layers: list[int]) -> None:
    current = OLD
    for count, layer in enumerate(layers):
        assert (current.digest == new.digest) == (current.generation == 5) or count == 0
        current = current.with_layers([layer], new)
    assert current == new
    assert fingerprint(new) != fingerprint(new.with_generation(6))


def words_of(rounds: Rounds, states: Sequence[State], results: Sequence[int]) -> list[Word]:
    return [Word(1, state, result, 8) for state, result in zip(states, results, strict=True)]


@given(
    placements(5),
    st.integers(1, 4),
    st.sets(st.integers(0, 2)),
    st.integers(2, 4),
    st.integers(0, 2**32),
)
def test_every_layer_that_can_is_done_and_ranks_take_the_same_turns(
    new: Placement, width: int, faulty: set[int], ranks: int, seed: int
) -> None:
    random = Random(seed)
    order = order_to(new, layers_per_step=width)
    every = [Rounds.of(order) for _ in range(ranks)]
    shares_alone = {layer.layer for layer in order.layers if not layer.moves}
    faulty -= shares_alone
    turns = 0
    while every[0].current:
        turns += 1
        assert turns < 1000
        layers = every[0].current
        assert len(layers) <= width or set(layers) == shares_alone
        states = [random.choice([State.UNDER_WAY, State.READY]) for _ in range(ranks)]
        if faulty & set(layers) and random.random() < 0.5:
            states[random.randrange(ranks)] = State.FAILED
        elif faulty & set(layers):
            states[0] = State.UNDER_WAY
        words = words_of(every[0], states, [7] * ranks)
        assert len({rounds.hear(words) for rounds in every}) == 1
        assert all(rounds == every[0] for rounds in every)
    named = {layer.layer for layer in order.layers}
    assert set(every[0].skipped) == faulty & named
    assert set(every[0].done) == named - faulty
    assert every[0].done[: len(shares_alone)] == sorted(shares_alone), "routes first"


def test_only_equal_results_are_switched() -> None:
    rounds = Rounds.of(GOOD)
    assert rounds.hear(words_of(rounds, [State.READY, State.UNDER_WAY], [7, 7])) == "wait"
    assert rounds.hear(words_of(rounds, [State.READY] * 2, [7, 8])) == "end"
    assert rounds.done == [] and rounds.current == ()
    assert rounds.why.startswith("the ranks would not agree on the placement after layers [0]: rank 0 ")


def test_a_refusal_and_too_many_failures_end_an_order() -> None:
    rounds = Rounds.of(GOOD)
    assert rounds.hear(words_of(rounds, [State.READY, State.REFUSED], [7, 0])) == "end"
    assert rounds.why == "refused by ranks 1"
    layers = [msgspec.structs.replace(GOOD.layers[1], layer=layer) for layer in range(MOST_SKIPPED + 1)]
    rounds = Rounds.of(msgspec.structs.replace(GOOD, layers=layers))
    turns = [rounds.hear(words_of(rounds, [State.FAILED], [7])) for _ in range(MOST_SKIPPED)]
    assert turns == ["abandon"] * (MOST_SKIPPED - 1) + ["end"]
    assert rounds.current == () and "3 failed layers" in rounds.why


def test_bytes_follow_the_time_they_take() -> None:
    pace = Pace()
    assert pace.max_bytes(None, 0.0) == LEAST_BYTES
    for _ in range(9):
        pace.saw_step(0.01)
    for _ in range(30):  # at 1 GB/s
        sent = pace.max_bytes(None, 0.0)
        pace.saw_transfer(sent, sent / 1e9)
    assert pace.max_bytes(None, 0.0) == pytest.approx(0.01 * STEP_PART * 1e9, rel=0.01)
    pace.saw_transfer(400_000, 1.0)  # held up by something: less, but not nothing
    assert 190_000 < pace.max_bytes(None, 0.0) < 210_000
    for _ in range(30):
        pace.saw_transfer(pace.max_bytes(None, 0.0), 1.0)
    assert pace.max_bytes(None, 0.0) == LEAST_BYTES


def test_a_given_rate_is_kept() -> None:
    pace = Pace()
    pace.spent(10.0)
    assert pace.max_bytes(1e6, 10.01) == 0, "too little to be worth a message"
    total, now = 0, 10.0
    while now < 20.0:
        now += 0.007
        if due := pace.max_bytes(1e6, now):
            assert due >= LEAST_BYTES
            total += due
            pace.spent(now)
    assert 9e6 < total <= 10e6
    assert pace.max_bytes(1e6, 1000.0) == 1_000_000, "what was not used in a second is lost"
    assert pace.max_bytes(1000.0, 21.0) >= 8


# ------------------------------------------------------------------ one rank, with real weights


WEIGHTS = [[torch.arange(4.0) * 10 + layer, torch.arange(8.0).view(4, 2) * 100 + layer] for layer in range(3)]
ONE_RANK = Topology(num_ranks=1, slots_per_rank=6)


def start(
    make_mover: Callable[[], WeightMover] | None = None, device: str = "cpu"
) -> tuple[Migrator, ExpertMap, list[list[Tensor]]]:
    mesh = Mesh(ParallelLayout(), 0)
    expert_map = ExpertMap(OLD, ONE_RANK, 0, device)
    weights = [
        [tensor[torch.tensor(OLD.slot_to_expert[layer]).long()].to(device) for tensor in tensors]
        for layer, tensors in enumerate(WEIGHTS)
    ]
    return (
        Migrator(mesh, expert_map, weights, make_mover or (lambda: ExchangeMover(mesh.ep, 6))),
        expert_map,
        weights,
    )


def check_contents(expert_map: ExpertMap, weights: list[list[Tensor]]) -> None:
    for layer, tensors in enumerate(weights):
        held = torch.tensor(expert_map.placement.slot_to_expert[layer]).long()
        for tensor, expected in zip(tensors, WEIGHTS[layer], strict=True):
            assert torch.equal(tensor.cpu(), expected[held])
        device = tensors[0].device
        expert_map.begin_step(torch.ones(60, dtype=torch.bool, device=device))
        experts = torch.arange(4, device=device).expand(60, 4)
        slots = expert_map.look_up(layer, experts)
        assert torch.equal(held[slots.cpu()], experts.cpu())


def run(migrator: Migrator, order: Migrate, busy: bool = False) -> list[FromRank]:
    migrator.offer(order)
    said: list[FromRank] = []
    for _ in range(200):
        if not migrator.order:
            return said
        said += migrator.step([order.order], idle=not busy)
    raise AssertionError("no end")


def outcome(said: list[FromRank]) -> Migrated:
    assert isinstance(said[-1], Migrated)
    return said[-1]


@given(placements(5), st.integers(1, 3), st.booleans())
def test_applying_an_order_gives_the_plan(new: Placement, width: int, busy: bool) -> None:
    migrator, expert_map, weights = start()
    order = order_to(new, layers_per_step=width)
    if not order.layers:
        return
    migrator.offer(order)
    said: list[FromRank] = []
    while migrator.order:
        said += migrator.step([1], idle=not busy)
        check_contents(expert_map, weights)
    assert expert_map.placement == new
    result = outcome(said)
    moves = sum(len(layer.moves) for layer in order.layers)
    assert (result.result, result.reason, result.moves, result.bytes) == ("applied", "", moves, 0)
    assert (result.generation, result.digest, result.layers_done) == (5, new.digest, len(order.layers))
    switched = [message.layers for message in said if isinstance(message, LayersSwitched)]
    assert sorted(layer for layers in switched for layer in layers) == [layer.layer for layer in order.layers]
    shares_alone = [layer.layer for layer in order.layers if not layer.moves]
    assert not shares_alone or switched[0] == shares_alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("busy", [False, True])
def test_applying_an_order_on_a_gpu(busy: bool) -> None:
    migrator, expert_map, weights = start(device="cuda")
    assert outcome(run(migrator, GOOD, busy)).result == "applied"
    check_contents(expert_map, weights)


def test_nothing_begins_before_all_replicas_hold_the_order() -> None:
    migrator, expert_map, _ = start()
    assert migrator.step([0, 0], idle=False) == []
    migrator.offer(GOOD)
    assert migrator.order == 1
    for orders in ([1, 0], [0, 1], [1, 2]):
        assert migrator.step(orders, idle=True) == []
    assert expert_map.placement == OLD
    while migrator.order:
        migrator.step([1, 1], idle=True)
    assert expert_map.placement == NEW


def test_a_later_order_replaces_one_that_has_not_begun() -> None:
    migrator, expert_map, _ = start()
    migrator.offer(GOOD)
    assert migrator.step([1, 0], idle=True) == []
    other = OLD.with_layers([1], NEW).with_generation(5)
    (result,) = [m for m in run(migrator, order_to(other, OLD, 2)) if isinstance(m, Migrated)]
    assert (result.order, result.result) == (2, "applied")
    assert expert_map.placement == other


def test_an_order_that_comes_meanwhile_waits() -> None:
    migrator, expert_map, weights = start()
    migrator.offer(GOOD)
    migrator.step([1], idle=False)
    migrator.offer(order_to(OLD.with_generation(6), NEW, 2))
    assert migrator.order == 1
    said: list[FromRank] = []
    while migrator.order:
        said += migrator.step([migrator.order], idle=False)
    assert [m.result for m in said if isinstance(m, Migrated)] == ["applied", "applied"]
    assert expert_map.placement == OLD.with_generation(6)
    check_contents(expert_map, weights)


def test_a_refused_order_changes_nothing_and_says_why() -> None:
    migrator, expert_map, weights = start()
    (result,) = run(migrator, BAD["another start"][0])
    assert isinstance(result, Migrated)
    assert (result.result, result.layers_done, result.generation) == ("failed", 0, 4)
    assert "refused by ranks 0; it starts from generation 4" in result.reason
    assert expert_map.placement == OLD
    check_contents(expert_map, weights)


class Faulty:
    """A mover that cannot move into some layers, known by their tensors; why: late, broken or no memory."""

    def __init__(self, mover: WeightMover, is_bad: Callable[[Tensor], bool], why: str) -> None:
        self.mover, self.is_bad, self.why, self.bad = mover, is_bad, why, False
        self.advances = 0

    def begin(self, tensors: Sequence[Tensor], moves: Sequence[tuple[int, int]]) -> None:
        self.bad = self.is_bad(tensors[0])
        self.mover.begin(tensors, moves)
        if self.bad and self.why == "no memory":  # which is found when the moves are already noted
            raise TransferError(self.why)

    def advance(self, max_bytes: int) -> bool:
        self.advances += 1
        if not self.bad:
            return self.mover.advance(max_bytes)
        if self.why == "late":
            return False
        raise TransferError(self.why)

    def commit(self) -> None:
        assert not self.bad
        self.mover.commit()

    def abandon(self) -> None:
        self.mover.abandon()


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("why", ["late", "broken", "no memory"])
@pytest.mark.parametrize("width", [1, 2])
def test_a_layer_that_fails_stays_and_a_new_order_does_the_rest(
    width: int, why: str, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrator_module, "ROUND_SECONDS", 0.0)
    bad_layers = {1}
    mesh = Mesh(ParallelLayout(), 0)

    def is_bad(tensor: Tensor) -> bool:
        return any(tensor is weights[layer][0] for layer in bad_layers)

    migrator, expert_map, weights = start(lambda: Faulty(ExchangeMover(mesh.ep, 6), is_bad, why))
    result = outcome(run(migrator, msgspec.structs.replace(GOOD, layers_per_step=width), busy))
    assert (result.result, result.layers_done, result.generation) == ("partial", 2, 4)
    assert ("not complete after" if why == "late" else f"layer 1: {why}") in result.reason
    check_contents(expert_map, weights)
    between = OLD.with_layers([0, 2], NEW)
    assert expert_map.placement == between and result.digest == between.digest

    bad_layers.clear()
    assert outcome(run(migrator, order_to(NEW, between, 2))).result == "applied"
    assert expert_map.placement == NEW
    check_contents(expert_map, weights)


def test_a_rank_that_failed_goes_on_sending_until_all_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrator_module, "AGREE_EVERY", 8)
    mesh, movers = Mesh(ParallelLayout(), 0), []

    def make_mover() -> Faulty:
        movers.append(Faulty(ExchangeMover(mesh.ep, 6), lambda tensor: True, "broken"))
        return movers[-1]

    order = msgspec.structs.replace(order_to(NEW), layers=order_to(NEW).layers[1:2])
    new = OLD.with_layers([order.layers[0].layer], NEW)
    order = msgspec.structs.replace(order, generation=5, digest=new.digest)
    migrator, _, _ = start(make_mover)
    assert outcome(run(migrator, order, busy=True)).result == "failed"
    assert movers[0].advances == 8 - 1, "in each step until the ranks agree again"


def test_a_busy_step_moves_no_more_than_it_may() -> None:
    asked: list[int] = []

    class Counting(ExchangeMover):
        def advance(self, max_bytes: int) -> bool:
            asked.append(max_bytes)
            return super().advance(max_bytes)

    mesh = Mesh(ParallelLayout(), 0)
    migrator, _, _ = start(lambda: Counting(mesh.ep, 6))
    run(migrator, GOOD, busy=True)
    assert asked and max(asked) <= 4 * LEAST_BYTES
    asked.clear()
    migrator, _, _ = start(lambda: Counting(mesh.ep, 6))
    run(migrator, GOOD)
    assert asked == [IDLE_BYTES] * 2


def test_leaving_drops_what_is_under_way() -> None:
    migrator, expert_map, weights = start()
    migrator.offer(GOOD)
    for _ in range(6):
        migrator.step([1], idle=False)
    assert migrator.order == 1
    migrator.abandon()
    assert migrator.order == 0
    check_contents(expert_map, weights)
    assert migrator.step([0], idle=False) == []
