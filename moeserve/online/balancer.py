"""Decides, in the front process, when experts and routes change, orders it from the ranks and keeps account of it.

Windows of counts go to a solver in a process of its own; a plan that pays becomes orders to every replica; what the
ranks answer moves the placement in force, layer by layer. Knows neither HTTP nor how messages travel.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moeserve.eplb.rebalancer import Costs
from moeserve.eplb.service import Answer
from moeserve.eplb.types import MigrationPlan, Placement
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import LayersSwitched, Migrate, Migrated
from moeserve.online.orders import Moves, Order, by_link, moves_of, plan_to, rank_bytes
from moeserve.online.records import Ledger, Rebalance, Result, Trigger
from moeserve.online.windows import BalancedPhase, Windows
from moeserve.stats.snapshot import PHASES, LoadWindow, Phase

log = logging.getLogger(__name__)

State = Literal["idle", "solving", "migrating", "paused", "dead"]

SILENCE_SECONDS = (
    60.0  # beyond what the bytes of a layer take, until a migration without a word counts as failed
)
RESUMES = 2  # times that what is left of an order is tried again
MOST_WAITED = 64  # windows between decisions after failure upon failure
STALL_PART, BYTES_PER_SECOND = 0.2, 1e9  # of a transfer, until one was measured


class Solver(Protocol):
    """What RebalanceService offers; nothing of it waits."""

    @property
    def state(self) -> str: ...

    def observe(self, load: npt.NDArray[np.int64], forget: bool = False) -> None: ...

    def request(self, costs: Costs | None = None, force: bool = False) -> None: ...

    def applied(self, placement: Placement) -> None: ...

    def poll(self) -> Answer | None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class OnlineSettings:
    """window_steps: steps whose counts make a window; windows: that the solver remembers. layers_per_step and
    bytes_per_second bound a migration. num_ranks: that answer an order. ranks_an_expert: that share one expert's
    weights, so that a move is as many transfers. survive_rank_loss: no placement may leave an expert on one rank."""

    window_steps: int
    windows: int
    layers_per_step: int
    num_ranks: int
    bytes_per_second: float | None = None
    ranks_an_expert: int = 1
    survive_rank_loss: bool = False


class Busy(RuntimeError):
    """It cannot be done now, but later."""


class OnlineBalancer:
    """Told of reports and answers as they come and of the time by tick; take_orders is what is to be sent."""

    def __init__(
        self,
        balance: ExpertBalance,
        settings: OnlineSettings,
        start_solver: Callable[[Placement], Solver],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """start_solver: begins one that knows no window yet."""
        self.balance, self.settings = balance, settings
        self.ledger = Ledger()
        self.newest: dict[Phase, LoadWindow] = {}
        self._start_solver, self._clock = start_solver, clock
        self._solver = start_solver(balance.placement)
        self._windows = Windows(settings.num_ranks, settings.window_steps)
        self._balanced = BalancedPhase()
        self._fed: deque[npt.NDArray[np.int64]] = deque(maxlen=settings.windows)  # for the next solver
        self._step_seconds: deque[float] = deque(maxlen=settings.windows)
        self._transfer: tuple[float, float] | None = None  # measured: bytes a second, part that held up steps
        self._asked: deque[Trigger] = deque()
        self._unmeasured: list[tuple[Rebalance, Placement, int]] = []  # and windows to pass over
        self._outbox: deque[Migrate] = deque()
        self._order: Order | None = None
        self._left: Order | None = None  # failed, with layers that are not done
        self._orders = 0
        self._generation = balance.placement.generation  # the highest that was ever ordered
        self._failures = self._wait = 0  # in a row, and windows to wait for them
        self._paused = self._told_dead = False
        self._broken = ""

    # ------------------------------------------------------------------ what it is asked

    @property
    def state(self) -> State:
        if self._order is not None and not self._order.lost:
            return "migrating"
        if self.trouble:
            return "dead"
        if self._paused:
            return "paused"
        return "solving" if self._asked else "idle"

    @property
    def trouble(self) -> str:
        """Why it balances no more, "" while it does."""
        if self._order is not None and self._order.lost:
            return f"the ranks give no sign of life in migration {self._order.number}"
        if self._broken:
            return self._broken
        return "the solver's process crashed too often" if self._solver.state == "dead" else ""

    def progress(self) -> dict[str, int] | None:
        """Of the migration that is under way, None without one."""
        if self._order is None:
            return None
        done, total = len(self._order.switched), len(self._order.moves)
        return {"order": self._order.number, "layers_done": done, "layers_total": total}

    def history(self) -> list[dict[str, Any]]:
        return [record.as_json() for record in self.ledger.newest_first()]

    def rebalance(self) -> None:
        """Decide now, however little it brings; also while paused. Raises Busy during a migration or a decision that
        was asked for, before the first window, and after death."""
        self._check_free()
        if "requested" in self._asked:
            raise Busy("a decision that was asked for is being made; try again when it is there")
        if self.trouble:
            raise Busy(f"the balancer is dead: {self.trouble}; resume starts it again")
        if not self._fed:
            wanted = f"{self.settings.window_steps} steps"
            raise Busy(f"no window of {wanted} was counted yet: send requests and try again")
        self._ask("requested", force=True)

    def plan(self, placement: Placement) -> MigrationPlan:
        """From the placement in force to this one; slow for many moves, so not on the event loop's thread.

        With even routing the placement's own shares are left out. Raises ValueError where it cannot be served.
        """
        if self.settings.survive_rank_loss and not placement.survives_rank_loss(self.balance.topology):
            raise ValueError(
                "slot_to_expert leaves experts on one rank alone, and the engine was told survive_rank_loss; solve "
                "with --survive-rank-loss"
            )
        if self.balance.routing == "even":
            placement = Placement(placement.slot_to_expert, placement.num_experts, placement.generation)
        return plan_to(self.balance.placement, placement, self.balance.topology)

    def apply(self, plan: MigrationPlan, predicted: float | None = None) -> int | None:
        """Order a given placement; the order's number, None where it is in force already. Raises Busy during a
        migration, and where another placement has come into force since the plan was made."""
        self._check_free()
        if plan.old_digest != self.balance.placement.digest:
            raise Busy("another placement came into force meanwhile; try again")
        record = Rebalance("placement", self._balanced.phase, reason="asked for", predicted=predicted)
        record.before = self._imbalance_now()
        if not plan.layers:
            self._finish(record, "skipped", "it is in force already")
            return None
        self._begin(record, plan.new, moves_of(plan))
        return self._orders

    def pause(self) -> None:
        """Decide nothing until resume; a migration under way is finished."""
        self._paused = True
        log.info("balancing is paused at placement generation %d", self.balance.placement.generation)

    def resume(self) -> None:
        """Decide again, also after death: with a new solver that gets the windows that are kept. Raises Busy where
        ranks owe an answer to an order: what they hold is not known, and only that answer can tell."""
        if self._order is not None and self._order.lost:
            raise Busy(f"{self.trouble}; it goes on by itself once they answer")
        self._paused = False
        self._failures = self._wait = 0
        self._broken = ""
        if self._solver.state == "dead":
            self._restart_solver()
        log.info("balancing goes on from placement generation %d", self.balance.placement.generation)

    def regroup(self, why: str) -> None:
        """Go on with fewer ranks and what the balance now says is in force: what was under way is over.

        Where this placement would not survive another loss the next ones need not either.
        """
        with self._guarded():
            if self._order is not None:
                self._finish(self._order.record, "failed", why)
            self._order = self._left = None
            for waiting in (self._outbox, self._asked, self._unmeasured):
                waiting.clear()
            placement, topology = self.balance.placement, self.balance.topology
            self.settings = replace(
                self.settings,
                num_ranks=topology.num_ranks,
                survive_rank_loss=self.settings.survive_rank_loss and placement.survives_rank_loss(topology),
            )
            self.newest.clear()
            self._windows = Windows(topology.num_ranks, self.settings.window_steps)
            self._generation = max(self._generation, placement.generation)
            self._restart_solver()

    def close(self) -> None:
        self._solver.close()

    def _restart_solver(self) -> None:
        """With the windows that are kept."""
        self._solver.close()
        self._solver = self._start_solver(self.balance.placement)
        self._asked.clear()
        for load in self._fed:
            self._solver.observe(load)

    def _check_free(self) -> None:
        if self._order is not None:
            raise Busy(f"migration {self._order.number} is under way; try again when it is over")

    # ------------------------------------------------------------------ what it is told

    def report(self, rank: int, report: LoadWindow) -> None:
        """What one rank has counted since its last report."""
        with self._guarded():
            for window in self._windows.add(rank, report):
                self._observe(window)

    def handle(self, message: LayersSwitched | Migrated) -> None:
        with self._guarded():
            self._hear(message)

    def tick(self) -> None:
        """Look after answers of the solver and after silence; some times a second."""
        with self._guarded():
            while (answer := self._solver.poll()) is not None:
                self._decide(self._asked.popleft() if self._asked else "periodic", answer)
            self._watch()

    def take_orders(self) -> list[Migrate]:
        """What every replica must be sent, in order; each once."""
        orders = list(self._outbox)
        self._outbox.clear()
        return orders

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """A mistake here ends the balancing, never the serving, and everyone is told."""
        try:
            yield
        except Exception as error:
            log.exception("balancing failed")
            self._broken = f"{type(error).__name__}: {error}"

    def _hear(self, message: LayersSwitched | Migrated) -> None:
        order = self._order
        if order is None or message.order != order.number:
            log.warning("rank %d answers order %d, which is not under way", message.rank, message.order)
            return
        order.heard = self._clock()
        if order.lost:
            order.lost = False
            log.warning("migration %d shows signs of life again", order.number)
        if isinstance(message, LayersSwitched):
            order.switched.update(message.layers)
            self.balance.follow(self.balance.placement.with_layers(message.layers, order.target))
            return
        order.answers[message.rank] = message
        self.balance.generations[self.balance.name_of(message.rank)] = message.generation
        if len(order.answers) == self.settings.num_ranks:
            self._end(order)

    def _watch(self) -> None:
        order = self._order
        if order is not None and not order.lost and self._clock() - order.heard > self._patience(order):
            order.lost = True
            missing = sorted(set(range(self.settings.num_ranks)) - set(order.answers))
            ranks = f"ranks {missing}" if order.answers else "the ranks"
            silence = f"no sign of life from {ranks} for {self._clock() - order.heard:.0f} s"
            self._finish(order.record, "failed", silence)
        if bool(self.trouble) != self._told_dead:
            self._told_dead = not self._told_dead
            if self._told_dead:
                generation = self.balance.placement.generation
                log.error("the balancer is dead: %s; placement generation %d stays", self.trouble, generation)

    def _patience(self, order: Order) -> float:
        """Seconds that the ranks may be silent: as long as the layers that are under way together take at the ordered
        rate, if all their moves were of one rank, and then some."""
        if self.settings.bytes_per_second is None:
            return SILENCE_SECONDS
        most = max((len(pairs) for _, pairs in order.moves), default=0) * self.settings.layers_per_step
        return SILENCE_SECONDS + most * self.balance.expert_bytes / self.settings.bytes_per_second

    # ------------------------------------------------------------------ windows

    def _observe(self, window: LoadWindow) -> None:
        if window.end > window.start:
            self._step_seconds.append((window.end - window.start) / window.steps)
        for phase, tokens in zip(PHASES, window.tokens, strict=True):
            if tokens:
                self.newest[phase] = window
        former = self._balanced.phase
        chosen = self._balanced.choose(window)
        self._measure(window, chosen)
        if chosen is None:
            return
        load = window.load[PHASES.index(chosen)]
        if chosen != former:
            self._fed.clear()
        self._fed.append(load)
        self._solver.observe(load, forget=chosen != former)
        self._go_on()

    def _go_on(self) -> None:
        """What a new window gives rise to: what is left of a failed order, or the next question."""
        if self._paused or self.trouble or self._order is not None or self._asked:
            return
        if self._wait:
            self._wait -= 1
        elif self._left is not None:
            self._begin_again(self._left)
        else:
            self._ask("periodic")

    def _ask(self, trigger: Trigger, force: bool = False) -> None:
        self._asked.append(trigger)
        self._solver.request(self._costs(), force)

    def _costs(self) -> Costs | None:
        """As measured so far; None while nothing is known of the steps or of an expert's size. The gain is expected
        to last as long as the windows that it is seen in."""
        if not self._step_seconds or not self.balance.expert_bytes:
            return None
        unmeasured = (self.settings.bytes_per_second or BYTES_PER_SECOND, STALL_PART)
        speed, stall_part = self._transfer or unmeasured
        return Costs(
            self.balance.expert_bytes,
            speed,
            statistics.median(self._step_seconds),
            horizon_steps=self.settings.windows * self.settings.window_steps,
            stall_part=stall_part,
        )

    def _imbalance_now(self) -> float | None:
        phase = self._balanced.phase
        if phase is None or phase not in self.newest:
            return None
        return self.balance.imbalance_of(self.newest[phase], phase).mean

    def _measure(self, window: LoadWindow, chosen: Phase | None) -> None:
        """Imbalance of the first full window after a rebalance, under the placement that it has led to; of the phase
        chosen now where it came before any traffic."""
        waiting, self._unmeasured = self._unmeasured, []
        for record, placement, windows in waiting:
            phase = record.phase = record.phase or chosen
            if phase is None or not window.tokens[PHASES.index(phase)]:
                self._unmeasured.append((record, placement, windows))
            elif windows:
                self._unmeasured.append((record, placement, windows - 1))
            else:
                record.after = self._after(window, phase, placement)

    def _after(self, window: LoadWindow, phase: Phase, placement: Placement) -> float:
        found = self.balance.imbalance_of(window, phase, placement)
        split_by_step = self.balance.routing == "step" and placement is self.balance.placement
        return found.measured_mean if split_by_step and found.measured_mean is not None else found.mean

    # ------------------------------------------------------------------ decisions

    def _decide(self, trigger: Trigger, answer: Answer) -> None:
        self.ledger.solve.observe(answer.seconds)
        record = Rebalance(trigger, self._balanced.phase, solve_seconds=answer.seconds)
        if answer.decision is None:
            lines = [line.strip() for line in answer.error.splitlines() if line.strip()]
            self._finish(record, "failed", lines[-1] if lines else "the solver failed")
            return
        record.expect(answer.decision)
        plan, routes = answer.decision.plan, answer.decision.routes
        if plan is None:
            self._finish(record, "skipped", record.reason)
        elif self._order is not None:
            self._finish(record, "skipped", f"migration {self._order.number} is under way")
        elif self._paused and trigger == "periodic":
            self._finish(record, "skipped", "balancing was paused meanwhile")
        elif plan.old_digest != self.balance.placement.digest:
            self._finish(record, "skipped", "another placement came into force meanwhile")
        elif routes is None:
            self._begin(record, plan.new, self._worst_first(plan))
        else:  # routes first: shares that help the slots as they are come into force while the weights travel
            self._begin(record, routes.new, moves_of(routes), then=(plan.new, self._worst_first(plan)))

    def _worst_first(self, plan: MigrationPlan) -> Moves:
        """The layers whose busiest rank is relieved most come first."""
        moves, phase = moves_of(plan), self._balanced.phase
        if phase is None or phase not in self.newest:
            return moves
        load, balance = self.newest[phase].load[PHASES.index(phase)], self.balance
        gain = balance.by_layer(load, balance.placement) - balance.by_layer(load, plan.new)
        return tuple(sorted(moves, key=lambda item: -gain[item[0]]))

    def _finish(self, record: Rebalance, result: Result, reason: str) -> None:
        """Automatic decisions wait longer after each failure in a row."""
        if record.result is not None:  # it had been given up
            record.reason = f"{record.reason}; later {result}: {reason}"
            return
        self.ledger.finish(record, result, reason, self.balance.placement.generation)
        if result == "failed":
            self._wait = min(MOST_WAITED, 2**self._failures - 1)
            self._failures += 1
        elif result == "applied":
            self._failures = 0
            self._unmeasured.append((record, self.balance.placement, 1))
            self.balance.predicted = {}
            if record.predicted is not None and record.phase is not None:
                self.balance.predicted[record.phase] = record.predicted

    # ------------------------------------------------------------------ orders

    def _begin(
        self,
        record: Rebalance,
        target: Placement,
        moves: Moves,
        then: tuple[Placement, Moves] | None = None,
        resumes: int = 0,
    ) -> None:
        start, self._left = self.balance.placement, None
        self._orders += 1
        self._generation += 1
        # rows that the order does not name stay to the last bit, so that what results has the digest it promises
        target = start.with_layers([layer for layer, _ in moves], target).with_generation(self._generation)
        self._order = Order(self._orders, start, target, moves, record, then, self._clock(), resumes)
        self._outbox.append(
            self._order.message(self.settings.layers_per_step, self.settings.bytes_per_second)
        )
        log.info(
            "order %d (%s): generation %d to %d, %d layers, %d moves: %s",
            *(self._orders, record.trigger, start.generation, target.generation, len(moves)),
            *(sum(len(pairs) for _, pairs in moves), record.reason),
        )

    def _begin_again(self, order: Order) -> None:
        """Layers that a failed order has left undone still are as it found them."""
        old = order.record
        record = Rebalance("resume", old.phase, reason=f"what order {order.number} has left undone")
        record.before, record.predicted = self._imbalance_now(), old.predicted
        record.gain_seconds = old.gain_seconds
        self._begin(record, order.target, order.left, order.then, order.resumes + 1)

    def _end(self, order: Order) -> None:
        """All ranks have answered."""
        self._order = None
        answers = [order.answers[rank] for rank in sorted(order.answers)]
        self._account(order, answers)
        here = self.balance.placement.digest
        astray = [f"rank {answer.rank} {answer.digest[:12]}" for answer in answers if answer.digest != here]
        if astray:
            self._broken = (
                f"placements differ after order {order.number}: {', '.join(astray)}, here {here[:12]}"
            )
            self._finish(order.record, "failed", self._broken)
            return
        self._solver.applied(self.balance.placement)
        bad = next((answer for answer in answers if answer.result != "applied"), None)
        if bad is not None:
            if order.left and order.resumes < RESUMES:
                self._left = order
            if order.switched:
                self.balance.predicted = {}  # nobody has promised anything of the mixture
            done = f"{len(order.switched)} of {len(order.moves)} layers done"
            self._finish(order.record, "failed", f"{done}, then rank {bad.rank}: {bad.reason}")
        elif order.then is not None and order.record.result is None:
            self._begin(order.record, *order.then)
        else:
            self._finish(order.record, "applied", order.record.reason)
            if order.record.trigger != "placement" and not (self._paused or self._asked or self.trouble):
                self._ask("periodic")  # bounded moves may have left more to gain from the same windows

    def _account(self, order: Order, answers: Sequence[Migrated]) -> None:
        """What the order has cost, in its record and the totals."""
        record, ledger, topology = order.record, self.ledger, self.balance.topology
        seconds = max(answer.seconds for answer in answers)
        stall = max(answer.stall_seconds for answer in answers)
        moves, sent = answers[0].moves, answers[0].bytes
        table = rank_bytes(order.done, topology, self.balance.expert_bytes * self.settings.ranks_an_expert)
        links = by_link(table, topology)
        record.migration_seconds += seconds
        record.stall_seconds += stall
        record.moves += moves
        record.bytes += sent
        record.bytes_by_link.update(links)
        record.rank_bytes = table if record.rank_bytes is None else record.rank_bytes + table
        ledger.slots += moves
        ledger.bytes.update(links)
        ledger.stall_seconds += stall
        ledger.migration.observe(seconds)
        most = max(table.sum(axis=0).max(), table.sum(axis=1).max()) / self.settings.ranks_an_expert
        if most and seconds > 0:
            self._transfer = (float(most) / seconds, min(1.0, stall / seconds))
