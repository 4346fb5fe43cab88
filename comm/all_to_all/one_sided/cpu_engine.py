"""One rank's side of the one-sided all-to-all on a CPU: put, receive, push, finish, step after step, and faults.

A step never waits for anything but words in its own block, and each cell of another's block is written only when
its reader can no longer need what was there: rows and counts of a step are read before its results are sent, and a
rank's next mail says that it has read its results. Who is late is masked and the step completes without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.layout import CTL_EPOCH, CTL_GENERATION, CTL_HEARTBEAT, EpLayout
from moeserve.comm.all_to_all.one_sided.loops import Counts, Loops
from moeserve.comm.all_to_all.one_sided.native import make_loops
from moeserve.comm.symm import SymmHeap

SLEEP_SECONDS = 50e-6
IDLE_SECONDS = 20e-3
IDLE_SLEEP_SECONDS = 1e-3
"""A rank that has waited so long sleeps so long at a time."""
CHECK_SECONDS = 0.1
"""How often a waiting rank looks whether the others still live."""
ALL_CELLS = 1 << 62


class Evicted(RuntimeError):
    """The other ranks went on without this one: it must stop, or come back with a new membership."""


@dataclass(frozen=True)
class Received:
    """What arrived in one step. The rows are a copy: the block is free for the next.

    x: [N, H] by local slot, source rank, token and choice. scales: [N, scales] or None.
    counts: by source and slot; counts.first is used up.
    origin: int64 [N, 2] source rank, and cell = token * K + choice.
    """

    x: Tensor
    scales: Tensor | None
    counts: Counts
    origin: Tensor


@dataclass
class _Step:
    slots: Tensor  # [T, K]
    base: int  # number of the token whose cells are the first in use
    sent: Tensor  # [R] rows put to each rank
    rows: Tensor  # [R] rows that arrived from each rank


class CpuEngine:
    """The protocol on the blocks of one heap under one layout (combine = "push", cells = "choice").

    Calls come in order: put, receive, push, finish; every rank alive makes them as often. A wait that lasts longer
    than `timeout` seconds, or whose rank has ended, takes that rank out of `alive`: its rows are dropped, its results
    count nothing, and lost_weight says what each token lacks. Otherwise membership changes between steps only.

    keep_spare: keeps half of the result cells free. A late rank may still write into cells of the step in which it
    was masked; results go to the other half from then on. Without it, results after a fault are void.
    on_wait: called now and then in a long wait; what it raises ends the wait, and the engine's use.
    max_tokens: tokens that one step may bring. alive: uint8 [R]. generation: of the membership. epoch: of the step.
    lost_weight: float32 [T] of the last finished step, None if nothing was lost.
    foreign_versions: rows that came with another table version than ours, so far.
    """

    def __init__(
        self,
        heap: SymmHeap,
        layout: EpLayout,
        timeout: float,
        keep_spare: bool = True,
        loops: Loops | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        config = layout.config
        assert config.combine == "push" and config.cells == "choice" and not config.result.num_scales
        assert heap.world == config.world
        if keep_spare and config.max_tokens < 2:
            raise ValueError(
                f"max_tokens = {config.max_tokens}: must be at least 2, half of them are kept spare"
            )
        self.rank, self.world, self.timeout = heap.rank, heap.world, timeout
        self.max_tokens = config.max_tokens // 2 if keep_spare else config.max_tokens
        self.generation = self.epoch = self.foreign_versions = 0
        self.alive = torch.ones(self.world, dtype=torch.uint8)
        self.lost_weight: Tensor | None = None
        self._heap, self._layout, self._keep_spare = heap, layout, keep_spare
        self._loops = make_loops(heap, layout) if loops is None else loops
        self._on_wait = on_wait
        self._ctl = layout.ctl.view(heap.block(self.rank)).numpy()
        self._low = torch.empty(self.world, dtype=torch.int64)
        self._late_at: dict[int, int] = {}
        self._half = 0
        self._may_write: list[set[int]] = [
            set(),
            set(),
        ]  # late ranks that may still write into each half of z
        self._step: _Step | None = None

    def put(
        self, x: Tensor, slots: Tensor, scales: Tensor | None = None, version: int = 0, first_token: int = 0
    ) -> None:
        """x [T, H], slots int64 [T, K] (-1: none), scales [T, n]: begins a step by writing to all ranks alive.

        version: of the routing table that chose the slots. first_token: number of x's first token where these are
        a part of more tokens.
        """
        assert self._step is None, "a step begins once the last one was finished"
        assert slots.shape[0] == x.shape[0] <= self.max_tokens, f"{x.shape[0]} tokens of {self.max_tokens}"
        form = self._layout.config.x
        assert slots.dtype == torch.int64 and slots.shape[1] == self._layout.config.top_k
        assert x.dtype == form.dtype and x.shape[1] == form.width, f"{x.dtype} {tuple(x.shape)}"
        assert (scales is None) == (not form.num_scales)
        self.epoch += 1
        self._ctl[CTL_EPOCH] = self.epoch
        self._ctl[CTL_HEARTBEAT] = int(time.time())
        x, slots = x.contiguous(), slots.contiguous()
        scales = None if scales is None else scales.contiguous()
        base = self._half * self.max_tokens
        sent = self._loops.put(self.epoch, x, scales, slots, self.alive, base + first_token, version)
        self._step = _Step(slots, base, sent, torch.zeros(self.world, dtype=torch.int64))

    def receive(self, version: int = 0) -> Received:
        """Waits for all rows and copies them out. version: of our routing table; rows of another are counted."""
        counts = self.await_rows()
        x, scales, origin = self.empty_rows(counts.total)
        self.take(counts.first, x, scales, origin, version)
        return Received(x, scales, counts, origin)

    def await_rows(self) -> Counts:
        """Waits until every rank alive has put its rows."""
        step = self._step
        assert step is not None
        self._wait("mail", self.alive.clone(), step.rows)
        return self._loops.count(self.epoch, step.rows)

    def empty_rows(self, count: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """x, scales and origin of Received for `count` rows, for take to fill."""
        form = self._layout.config.x
        x = torch.empty(count, form.width, dtype=form.dtype)
        scales = torch.empty(count, form.num_scales, dtype=form.scale_dtype) if form.num_scales else None
        return x, scales, torch.empty(count, 2, dtype=torch.int64)

    def take(
        self, following: Tensor, x: Tensor, scales: Tensor | None, origin: Tensor, version: int = 0
    ) -> None:
        """Copies the rows that arrived to where following int64 [R, S] says, and moves it on."""
        assert self._step is not None
        self.foreign_versions += self._loops.take(self._step.rows, version, following, x, scales, origin)

    def push(
        self, y: Tensor, origin: Tensor, low: int = 0, high: int = ALL_CELLS, everyone: bool = False
    ) -> None:
        """Results y [N, ...] of received rows into the cells of their tokens; then the word that says so.

        low, high: of origin's cells only these, and `low` is the first there. everyone: tells ranks too that sent
        no rows, and wait for all in finish.
        """
        step = self._step
        assert step is not None
        result = self._layout.config.result
        assert y.dtype == result.dtype and y.shape[1] == result.width, f"{y.dtype} {tuple(y.shape)}"
        tell = self.alive if everyone else (step.rows > 0).to(torch.uint8)
        self._loops.push(self.epoch, y.contiguous(), origin, low, high, tell)

    def finish(
        self,
        weights: Tensor,
        slots: Tensor | None = None,
        out: Tensor | None = None,
        everyone: bool = False,
    ) -> Tensor:
        """Waits for the results and sums them with weights float32 [T, K] -> [T, H]. Ends the step.

        slots, out: of the tokens to sum, where they are not the step's. everyone: waits for all ranks, as they push
        to all.
        """
        step = self._step
        assert step is not None
        pending = self.alive.clone() if everyone else self.alive * (step.sent > 0)
        assert weights.dtype == torch.float32, f"weights of {weights.dtype}"
        self._wait("done", pending, self._low)
        result = self._layout.config.result
        slots, weights = (step.slots if slots is None else slots).contiguous(), weights.contiguous()
        if out is None:
            out = torch.empty(len(slots), result.width, dtype=result.dtype)
        self._loops.sum(step.base, slots, weights, self.alive, out)
        self.lost_weight = self._lost(slots, weights)
        self._step = None
        return out

    def _lost(self, slots: Tensor, weights: Tensor) -> Tensor | None:
        if bool(self.alive.all()):
            return None
        target = slots.div(self._layout.config.slots_per_rank, rounding_mode="floor")
        lost = (slots >= 0) & (self.alive == 0)[target]
        return weights.masked_fill(~lost, 0.0).sum(1)

    # --- faults -----------------------------------------------------------------------------------------------

    def query_fault(self) -> list[int]:
        """Members that were late, or ended, since the last set_membership; empty while all is well."""
        return sorted(self._late_at)

    def late_at(self) -> dict[int, int]:
        """The same with the epoch in which each was waited for in vain."""
        return dict(self._late_at)

    def ended(self, rank: int) -> bool:
        """Whether the process of `rank` has ended."""
        return not self._heap.is_alive(rank)

    def set_membership(self, members: Sequence[bool], generation: int, epoch: int) -> None:
        """Takes what the hosts agreed upon: who is in, between steps. All members call it before their next step.

        generation: higher than the last. epoch: the same on all, higher than that of any member's last step: a rank
        that comes back counts with the others again. Ranks that come back must have left the step in which they
        were late. Raises Evicted when this rank is not a member, ValueError for a generation or epoch of the past.
        """
        assert self._step is None, "membership changes between steps"
        if generation <= self.generation:
            raise ValueError(f"generation = {generation}: must be above {self.generation}")
        if epoch <= self.epoch:
            raise ValueError(f"epoch = {epoch}: must be above {self.epoch}")
        if not members[self.rank]:
            raise Evicted(f"rank {self.rank} is not a member of generation {generation}")
        self.generation, self.epoch = generation, epoch
        self._ctl[CTL_GENERATION] = generation
        self._late_at = {}
        self.alive = torch.tensor(members, dtype=torch.uint8)
        for ranks in self._may_write:
            ranks.difference_update(rank for rank in range(self.world) if members[rank])

    def _wait(self, words: str, pending: Tensor, low: Tensor) -> None:
        """Waits for the words of all pending ranks; masks those that are late or gone."""
        left = self._loops.wait(words, self.epoch, pending, low, IDLE_SECONDS, SLEEP_SECONDS, True)
        start = time.monotonic()
        while left:
            if left < 0:
                raise Evicted(f"rank {self.rank} is at step {self.epoch}, others went on without it")
            if self._on_wait is not None:
                self._on_wait()
            waiting = pending.nonzero()[:, 0].tolist()
            late = waiting if time.monotonic() - start > self.timeout else []
            gone = late or [rank for rank in waiting if not self._heap.is_alive(rank)]
            if gone:  # what it did before is there: look once more
                left = self._loops.wait(words, self.epoch, pending, low, 0.0, 0.0, False)
                self._mask([rank for rank in gone if pending[rank]])
                pending *= self.alive
                left = min(left, int(pending.sum()))
            if left > 0:
                seconds = min(CHECK_SECONDS, self.timeout)
                left = self._loops.wait(words, self.epoch, pending, low, seconds, IDLE_SLEEP_SECONDS, False)

    def _mask(self, late: Sequence[int]) -> None:
        for rank in late:
            self.alive[rank] = 0
            self._late_at[rank] = self.epoch
        living = {rank for rank in late if self._heap.is_alive(rank)}
        if not living or not self._keep_spare:
            return
        assert self._step is not None
        half = int(self._step.base > 0)
        self._may_write[half] |= living
        other = {rank for rank in self._may_write[1 - half] if self._heap.is_alive(rank)}
        if other:
            raise RuntimeError(
                f"ranks {sorted(other | living)} were late one after the other and still run: no result cells are "
                "left that none of them may write; end them, or agree on a new membership"
            )
        self._half = 1 - half
