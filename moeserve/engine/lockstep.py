"""What ranks must agree on before a step: the messages that apply, and who brings how many rows.

Every rank of an attention replica runs the same scheduler on the same messages, so no batch travels: the
leader's mail is broadcast inside the replica, and one small header is exchanged across replicas.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Protocol

import msgspec

from moeserve.comm.mesh import Mesh
from moeserve.config import AttentionDPConfig
from moeserve.messages import FromRank, ToRank, decode_to_rank


class Mail(Protocol):
    """A rank's letter box."""

    def take(self, timeout: float) -> list[bytes]:
        """Encoded messages that have arrived; waits up to `timeout` seconds for the first."""
        ...

    def send(self, message: FromRank) -> None: ...


@dataclass(frozen=True)
class ReplicaState:
    """One replica's part of the header."""

    rows: int = 0  # residual rows of each of its ranks in this step
    waiting_prefill: bool = False  # has prompt tokens to compute, whether or not it does so in this step
    queued: bool = False  # has prompts that wait, perhaps for a seat or pages
    decoding: bool = False
    leaving: bool = False
    order: int = 0  # to migrate experts, that it holds or carries out; 0 for none


@dataclass(frozen=True)
class Agreed:
    """What all ranks of the stage know before a step."""

    replicas: tuple[ReplicaState, ...]
    rows_per_rank: tuple[int, ...]

    @property
    def idle(self) -> bool:
        return not any(self.rows_per_rank)

    @property
    def quiet(self) -> bool:
        """No request has anything to do."""
        return self.idle and not any(state.waiting_prefill or state.queued for state in self.replicas)

    @property
    def may_sleep(self) -> bool:
        """Not while one has an order: its migration goes on in steps without tokens too."""
        return self.quiet and not any(state.order for state in self.replicas)

    @property
    def leaving(self) -> bool:
        return all(state.leaving for state in self.replicas)


class Lockstep:
    """The two exchanges of a step; free of communication where a group has one rank."""

    def __init__(self, mesh: Mesh, mail: Mail):
        self.mesh = mesh
        self.mail = mail

    def receive(self, timeout: float) -> list[ToRank]:
        """Messages for this replica, the same on each of its ranks; the leader waits up to `timeout` seconds."""
        tp = self.mesh.tp
        if tp.size == 1:
            return [decode_to_rank(message) for message in self.mail.take(timeout)]
        packed = msgspec.msgpack.encode(self.mail.take(timeout)) if tp.rank == 0 else None
        messages: list[bytes] = msgspec.msgpack.decode(tp.broadcast_bytes(packed), type=list[bytes])
        return [decode_to_rank(message) for message in messages]

    def agree(self, mine: ReplicaState) -> Agreed:
        if self.mesh.dp.size == 1:
            return Agreed((mine,), (mine.rows,) * self.mesh.tp.size)
        rows = self.mesh.dp.all_gather_ints([int(value) for value in astuple(mine)])
        states = tuple(replace(ReplicaState(row[0], *map(bool, row[1:-1])), order=row[-1]) for row in rows)
        return Agreed(states, tuple(state.rows for state in states for _ in range(self.mesh.tp.size)))


@dataclass(frozen=True)
class PrefillGate:
    """Whether a replica holds its prefills back so that replicas prefill together (attention DP balance).

    A step lasts as long as its busiest replica: a prefill on one of them makes the decodes of all others wait.
    So a replica with a prefill waits up to timeout_iters steps for the others to have one, and then up to
    batching_wait_iters for more to join, as TensorRT-LLM's attention_dp_config does. But it waits only while some
    replica decodes, and only for replicas with prompts in their queue: a request that comes when nobody else has
    one starts at once. Pure: each decision gives the next state.
    """

    config: AttentionDPConfig
    waited: int = 0
    batched: int = 0

    def decide(self, last: Agreed, waiting: bool, batch_full: bool) -> tuple[bool, PrefillGate]:
        """Hold now?, and the gate for the next step. last: the header of the step before."""
        queues = sum(state.queued or state.waiting_prefill for state in last.replicas)
        anyone_decodes = any(state.decoding for state in last.replicas)
        if not (self.config.enable_balance and waiting and anyone_decodes and queues > 1):
            return False, replace(self, waited=0, batched=0)
        together = all(state.waiting_prefill or not state.queued for state in last.replicas)
        if not together and self.waited < self.config.timeout_iters:
            return True, replace(self, waited=self.waited + 1)
        if together and not batch_full and self.batched < self.config.batching_wait_iters:
            return True, replace(self, batched=self.batched + 1)
        return False, replace(self, waited=0, batched=0)
