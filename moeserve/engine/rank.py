"""One rank: a process with a device, a scheduler, its pages of the KV cache and its expert slots.

The step is the whole engine in one function; everything it calls is a part that can be read alone.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

import msgspec
import zmq

from moeserve.comm import mesh as comm_mesh
from moeserve.comm.wire import RankLost
from moeserve.engine.expert_reporter import ExpertReporter
from moeserve.engine.lockstep import Agreed, Lockstep, Mail, PrefillGate, ReplicaState
from moeserve.engine.rejoin import Survival
from moeserve.engine.runner import Runner
from moeserve.engine.scheduler import ScheduledBatch, Scheduler
from moeserve.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    FromRank,
    Migrate,
    RankFailed,
    RankReady,
    SequenceOutput,
    Shutdown,
    StepDone,
    ToRank,
    encode,
)

if TYPE_CHECKING:
    from moeserve.launch import RankPlace
    from moeserve.plan import EnginePlan

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
COLLECTIVE_TIMEOUT_SECONDS = 300.0


class Rank:
    """A running rank. `runner` owns the model, the caches and the mesh."""

    def __init__(self, plan: EnginePlan, runner: Runner, scheduler: Scheduler, mail: Mail):
        self.runner = runner
        self.scheduler = scheduler
        self.mail = mail
        self.rank = runner.mesh.world.rank
        self.is_leader = runner.mesh.tp.rank == 0
        self.lockstep = Lockstep(runner.mesh, mail)
        self.gate = PrefillGate(plan.config.attention_dp_config)
        self.agreed = Agreed((ReplicaState(),) * runner.mesh.dp.size, (0,) * runner.mesh.stage.size)
        self.leaving = False
        self.steps = self.replica_tokens = self.busiest_tokens = 0
        self.refused: list[SequenceOutput] = []
        self.held: list[ToRank] = []  # heard where nothing could be done about them, for the next step
        self.last_sent = 0.0
        self.migrator = runner.new_migrator()
        self.survival = Survival(plan, runner.mesh.world.size, COLLECTIVE_TIMEOUT_SECONDS)
        self.experts = ExpertReporter.of(plan, runner.expert_load, self.rank)

    def serve(self) -> None:
        """Step until every replica was told to leave."""
        while self.step():
            pass
        if self.migrator is not None:
            self.migrator.abandon()

    def step(self) -> bool:
        """One step of the engine; False when it was the last."""
        messages, self.held = self.held, []
        may_sleep = self.agreed.may_sleep and not messages
        for message in messages + self.lockstep.receive(timeout=HEARTBEAT_SECONDS if may_sleep else 0.0):
            self.apply(message)
        batch = self.next_batch()
        while True:
            try:
                outputs = self.run(batch)
                break
            except RankLost as loss:
                self.survival.go_on(self, loss)  # and run the step again, without the rank that was lost
        self.answer(outputs)
        return not (self.agreed.quiet and self.agreed.leaving)

    def run(self, batch: ScheduledBatch) -> list[SequenceOutput]:
        """A scheduled step, together with the other ranks."""
        self.agreed = self.lockstep.agree(self.state(batch))
        self.migrate()
        if self.agreed.idle:
            return []
        results, experts = self.runner.run(batch, self.agreed)
        outputs = self.scheduler.finish(batch, results, experts)
        self.count(self.agreed)
        return outputs

    def apply(self, message: ToRank) -> None:
        if isinstance(message, AddRequest):
            error = self.scheduler.add(message)
            if error is not None:
                self.refused.append(
                    SequenceOutput(message.request_id, [], finish_reason="error", error=error)
                )
        elif isinstance(message, AbortRequest):
            self.scheduler.abort(message.request_id)
        elif isinstance(message, Migrate):
            assert self.migrator is not None, "a model without experts has none to migrate"
            self.migrator.offer(message)
        elif isinstance(message, Shutdown):
            self.leaving = True
            self.scheduler.abort_all()

    def next_batch(self) -> ScheduledBatch:
        if self.runner.mesh.dp.size == 1:
            return self.scheduler.next_batch()
        hold, self.gate = self.gate.decide(
            self.agreed, self.scheduler.prefill_ready, self.scheduler.prefill_fills_step
        )
        return self.scheduler.next_batch(hold_prefill=hold)

    def state(self, batch: ScheduledBatch) -> ReplicaState:
        mesh = self.runner.mesh
        prefills = len(batch.chunks) > batch.num_decode
        return ReplicaState(
            rows=-(-batch.num_tokens // mesh.tp.size),
            waiting_prefill=prefills or (mesh.dp.size > 1 and self.scheduler.prefill_ready),
            queued=self.scheduler.has_queue,
            decoding=batch.num_decode > 0,
            leaving=self.leaving,
            order=0 if self.migrator is None else self.migrator.order,
        )

    def migrate(self) -> None:
        """Carry on with what experts are on their way, before the step that may use them."""
        if self.migrator is not None:
            orders = (state.order for state in self.agreed.replicas)
            for message in self.migrator.step(orders, self.agreed.idle):
                self.mail.send(message)

    def count(self, agreed: Agreed) -> None:
        tp = self.runner.mesh.tp.size
        self.steps += 1
        self.replica_tokens += agreed.replicas[self.runner.mesh.dp.rank].rows * tp
        self.busiest_tokens += max(state.rows for state in agreed.replicas) * tp

    def answer(self, outputs: list[SequenceOutput]) -> None:
        """Answer the front-end: the leader with what the step made, any rank with a sign of life."""
        now = time.monotonic()
        answers = self.refused + outputs if self.is_leader else []
        self.refused = []
        if answers or now - self.last_sent >= HEARTBEAT_SECONDS:
            self.mail.send(StepDone(rank=self.rank, outputs=answers, stats=self.stats()))
            self.last_sent = now
        if self.experts is not None and (counts := self.experts.due(self.steps, now)) is not None:
            self.mail.send(counts)

    def report_counts(self) -> None:
        """What was counted so far, though it may not be due."""
        if self.experts is not None:
            since = self.experts.since
            counts = self.experts.report(self.steps, 0.0 if since is None else time.monotonic() - since)
            if counts is not None:
                self.mail.send(counts)

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(
            self.scheduler.stats(self.steps),
            replica_tokens=self.replica_tokens,
            busiest_tokens=self.busiest_tokens,
        )


class SocketMail:
    """A rank's letter box at the front-end's ROUTER socket."""

    def __init__(self, address: str, rank: int):
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, str(rank).encode())
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.set_hwm(0)
        self.socket.connect(address)

    def take(self, timeout: float) -> list[bytes]:
        messages = []
        if timeout and not self.socket.poll(int(timeout * 1000)):
            return []
        try:
            while True:
                messages.append(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return messages

    def send(self, message: FromRank) -> None:
        self.socket.send(encode(message))


def rank_main(plan: EnginePlan, place: RankPlace) -> None:
    """The life of a rank's process. Once it serves, its end is decided by the front-end, not by signals to all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s rank={place.rank} %(message)s", force=True
    )
    mail = SocketMail(place.mail, place.rank)
    try:
        rank = start(plan, place, mail)
        # Only now: a rank that waits for one that will never come must end when its launcher says so.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except ValueError as error:  # of a file or a setting: the text says it all
        report(mail, RankFailed(place.rank, time.time(), str(error), mistake=True))
    except BaseException:
        report(mail, RankFailed(place.rank, time.time(), traceback.format_exc()))
    try:
        rank.serve()
        comm_mesh.stop()
    except BaseException:
        report(mail, RankFailed(place.rank, time.time(), traceback.format_exc()))


def start(plan: EnginePlan, place: RankPlace, mail: Mail) -> Rank:
    """Join the other ranks, load this one's weights, and say that it is ready. ValueErrors are people's mistakes."""
    comm_mesh.start(
        place.rank, place.world_size, *place.store, plan.backend, timeout=COLLECTIVE_TIMEOUT_SECONDS
    )
    runner = Runner(plan, place)
    rank = Rank(plan, runner, runner.new_scheduler(), mail)
    gc.collect()
    gc.freeze()
    generation = None if plan.placement is None else plan.placement.generation
    mail.send(RankReady(place.rank, os.getpid(), runner.kv_tokens, runner.max_seq_len, generation))
    return rank


def report(mail: SocketMail, failure: RankFailed) -> NoReturn:
    """Tell the front-end why this rank ends, and end it."""
    mail.send(failure)
    mail.socket.close()
    zmq.Context.instance().term()
    os._exit(1)  # not sys.exit: a peer's collective may hold a thread that never ends
