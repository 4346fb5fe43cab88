"""How a rank goes on after another was lost: it leaves the broken group, meets those that are left, and drops the
lost rank's slots from its placement. Its sequences, its cache and its experts stay where they are.

Knows nothing of who decides on the members: that comes as a message.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from moeserve.comm import mesh as comm_mesh
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.wire import RankLost
from moeserve.engine.lockstep import Agreed, ReplicaState
from moeserve.eplb.loss import without_rank
from moeserve.eplb.types import Placement, Topology
from moeserve.messages import Migrate, RankLeft, Rejoin, Rejoined, decode_to_rank
from moeserve.moe.migration import fingerprint

if TYPE_CHECKING:
    from moeserve.engine.rank import Rank
    from moeserve.plan import EnginePlan

log = logging.getLogger(__name__)

ANSWER_SECONDS = 60.0
"""For the front-end to see the loss and to hear of every other rank; then the rank fails."""
MEETING_SECONDS = 5.0
"""For all to come once they are asked to, which they wait for: longer only if one more was lost just then."""
POLL_SECONDS = 0.05


class Survival:
    """A rank's part in what its group has been through."""

    def __init__(self, plan: EnginePlan, num_ranks: int, timeout: float):
        """timeout: seconds of the new group's operations."""
        self.wanted = plan.config.moe_config.load_balancer.on_rank_loss == "shrink"
        self.membership = 0
        self._backend, self._timeout = plan.backend, timeout
        # whose slots the placement has, by the numbers they started with
        self._ranks = list(range(num_ranks))
        self._num_lost = 0  # losses that the placement has seen

    def go_on(self, rank: Rank, loss: RankLost) -> None:
        """Come back once this rank is a member of the group without those that were lost.

        Raises the loss itself where nobody asks for the rank to go on, ValueError where an expert is lost.
        """
        if not self.wanted:
            raise loss
        log.warning("%s: leaving the group of %d ranks", loss, rank.runner.mesh.world.size)
        began = time.monotonic()
        rank.report_counts()
        while True:
            rank.runner.mesh.leave()
            comm_mesh.stop()
            rank.mail.send(RankLeft(rank.rank))
            order = self._await_order(rank, loss)
            self.membership = order.membership
            try:
                self._meet(rank, order)
                break
            except RuntimeError as error:  # one more was lost on the way
                log.warning("membership %d did not come about: %s", order.membership, error)
        placement = rank.runner.placement
        assert placement is not None
        rank.mail.send(
            Rejoined(
                rank.rank,
                self.membership,
                placement.generation,
                placement.digest,
                placement.slot_to_expert.tolist(),
                placement.share.tolist(),
            )
        )
        log.warning(
            "going on as rank %d of %d after %.2f s, placement generation %d",
            *(rank.runner.mesh.world.rank, len(order.ranks), time.monotonic() - began, placement.generation),
        )

    def _await_order(self, rank: Rank, loss: RankLost) -> Rejoin:
        """The front-end's word. What else it says waits for the end of the step: an abort would take away the pages of
        what is run again. Orders to move experts were meant for the old group."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            newest: Rejoin | None = None
            for data in rank.mail.take(POLL_SECONDS):
                message = decode_to_rank(data)
                if isinstance(message, Rejoin):
                    newest = message
                elif not isinstance(message, Migrate):
                    rank.held.append(message)
            if newest is not None and newest.membership > self.membership:
                return newest
        raise loss

    def _meet(self, rank: Rank, order: Rejoin) -> None:
        """Raises RuntimeError, RankLost among them, when not all come."""
        me, size = order.ranks.index(rank.rank), len(order.ranks)
        comm_mesh.start(
            me,
            size,
            order.address,
            order.port,
            self._backend,
            self._timeout,
            meeting=comm_mesh.Meeting(order.membership, MEETING_SECONDS),
        )
        runner = rank.runner
        runner.mesh.join(ParallelLayout(dp=size), me)
        rank.steps = self._reconcile(rank)
        placement, topology = self._without(runner.placement, runner.topology, order.lost)
        marks = {mark for (mark,) in runner.mesh.world.all_gather_ints([fingerprint(placement)])}
        if len(marks) > 1:
            raise ValueError("the ranks that are left do not agree on the placement of the experts")
        runner.regroup(placement, topology)
        self._ranks, self._num_lost = list(order.ranks), len(order.lost)
        rank.agreed = Agreed((ReplicaState(),) * size, (0,) * size)
        if rank.experts is not None:
            rank.experts.reported_step = rank.steps

    def _reconcile(self, rank: Rank) -> int:
        """Bring all to what one of them has already done; the step to count on from.

        The last thing that the old group agreed on may have reached some of its ranks only: those switch layers now
        that the others have switched, or have finished a step that these run again.
        """
        migrator, now = rank.migrator, rank.runner.placement
        assert now is not None
        mine = (
            rank.steps,
            self._num_lost,
            fingerprint(now),
            0 if migrator is None else migrator.ready_for(),
        )
        rows = rank.runner.mesh.world.all_gather_ints(mine)
        marks = {row[2] for row in rows if row[1] == self._num_lost}
        if migrator is not None:
            others = marks - {fingerprint(now)}
            if migrator.ready_for() in others:
                migrator.switch_now()
            migrator.abandon()
        return max(row[0] for row in rows)

    def _without(
        self, placement: Placement | None, topology: Topology | None, lost: list[int]
    ) -> tuple[Placement, Topology]:
        """Each loss by itself and in their order, so that all come to the same bits whenever they heard of it."""
        assert placement is not None and topology is not None
        ranks = list(self._ranks)
        for name in lost[self._num_lost :]:
            placement, topology = without_rank(placement, topology, ranks.index(name))
            ranks.remove(name)
        return placement, topology
