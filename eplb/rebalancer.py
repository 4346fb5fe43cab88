"""Decides, window by window, whether a better placement is worth its moves. Pure: no clock, no process, no torch.

Windows hold logical load, so they stay valid over a migration.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from moeserve.eplb.incremental import improve_even, improve_steps
from moeserve.eplb.load import check_counts
from moeserve.eplb.metrics import imbalance, rank_load
from moeserve.eplb.migration import Traffic, plan_migration, traffic
from moeserve.eplb.policies import POLICIES
from moeserve.eplb.policies.problem import ROUTINGS, Problem, Routing
from moeserve.eplb.policies.robust import QUICK, place
from moeserve.eplb.routing import static_shares, step_shares
from moeserve.eplb.shift import Shifts
from moeserve.eplb.solver import explain
from moeserve.eplb.types import Floats, Ints, MigrationPlan, Placement, Topology

_SWAPS = partial(improve_even, reassign=False)
_SEARCHES: dict[str, tuple[Callable[[Problem, Placement, int], Ints], ...]] = {
    "even": (improve_even, _SWAPS),
    "shares": (lambda p, at, most: improve_steps(p, at, most, merge=True)[0], improve_even, _SWAPS),
    "step": (lambda p, at, most: improve_steps(p, at, most)[0], improve_even, _SWAPS),
}
_FAR = 0.03  # relative gain of a fresh placement from which small steps are worth taking
_DECISIONS = 8  # over which min_gain may then be spread


@dataclass(frozen=True)
class Costs:
    """What a move costs and what balance is worth, to weigh one against the other.

    expert_bytes: weights of one expert. bytes_per_second: what a rank receives with. step_seconds: length of a
    step; moe_part: the part of it that the busiest rank's expert load stretches. horizon_steps: steps for which
    the gain is expected to last. stall_part: part of the transfer that holds up steps (the rest overlaps).
    """

    expert_bytes: int
    bytes_per_second: float
    step_seconds: float
    moe_part: float = 0.5
    horizon_steps: int = 1000
    stall_part: float = 0.2

    def __post_init__(self) -> None:
        for name in ("expert_bytes", "bytes_per_second", "step_seconds", "horizon_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: give a number above 0")
        for name in ("moe_part", "stall_part"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give a fraction from 0 to 1")


@dataclass(frozen=True)
class Settings:
    """windows: how many the rebalancer remembers; min_windows: from how many it acts. policy: auto improves the
    current placement by at most max_moves_per_layer slot changes a decision; the name of a policy solves from
    scratch, without that limit. min_gain: least relative gain in imbalance, over all layers, that is acted on; far
    from what a fresh placement would bring, an eighth of it is enough.
    routing: how the engine splits tokens over replicas. costs: None leaves out what moves cost."""

    windows: int = 16
    min_windows: int = 2
    policy: str = "auto"
    max_moves_per_layer: int = 4
    min_gain: float = 0.02
    routing: Routing = "shares"
    expert_groups: int = 1
    survive_rank_loss: bool = False
    costs: Costs | None = None

    def __post_init__(self) -> None:
        if self.windows < 1 or not 1 <= self.min_windows <= self.windows:
            raise ValueError(
                f"windows = {self.windows}, min_windows = {self.min_windows}: give 1 <= min <= windows"
            )
        if self.policy != "auto" and self.policy not in POLICIES:
            raise ValueError(f"policy = {self.policy!r}: give auto, {', '.join(POLICIES)}")
        if self.max_moves_per_layer < 0:
            raise ValueError(f"max_moves_per_layer = {self.max_moves_per_layer}: give 0 or more")
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"min_gain = {self.min_gain}: give a fraction from 0 to below 1")
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing = {self.routing!r}: give {', '.join(ROUTINGS)}")


@dataclass(frozen=True)
class Decision:
    """plan: None to leave things as they are. before and predicted: imbalance (max/mean rank load, mean over
    layers and remembered windows) of the current and the proposed placement under the engine's routing. gain_seconds
    and cost_seconds: of the moves alone. routes: for a plan with moves, one without any to begin with: the shares
    that are best while the weights travel; None where that brings nothing."""

    plan: MigrationPlan | None
    reason: str
    before: float
    predicted: float
    moves: int = 0
    traffic: Traffic | None = None
    gain_seconds: float | None = None
    cost_seconds: float | None = None
    routes: MigrationPlan | None = None


class Rebalancer:
    """Give it each window with observe, ask with decide, tell it with applied when a plan is in force."""

    def __init__(self, placement: Placement, topology: Topology, settings: Settings | None = None) -> None:
        placement.check(topology)
        self.placement, self.topology, self.settings = placement, topology, settings or Settings()
        self.windows: deque[npt.NDArray[np.int64]] = deque(maxlen=self.settings.windows)
        self._shifts = Shifts()
        self._wanted = self.settings.min_windows  # windows before a decision; after a shift the first must do

    def observe(self, load: npt.ArrayLike, forget: bool = False) -> None:
        """A window's routed counts [L, E]; one without any load is passed over. forget: the windows before it no
        longer count, as they are of other work; so it is where the traffic is seen to have shifted and routing can
        follow it. An even split does better with a placement for all that was lately seen."""
        counts = check_counts(load, "load")
        shape = (self.placement.num_layers, self.placement.num_experts)
        if counts.shape != shape:
            raise ValueError(f"the window has shape {counts.shape}, expected [layers, experts] = {shape}")
        if not counts.any():
            return
        shifted = self._shifts.see(counts, self.windows) and self.settings.routing != "even"
        if forget or shifted:
            self.windows.clear()
            self._wanted = 1 if shifted else self.settings.min_windows
        self.windows.append(counts)

    def applied(self, placement: Placement) -> None:
        """The placement that is in force from now on."""
        placement.check(self.topology)
        self.placement = placement

    def decide(self, costs: Costs | None = None, force: bool = False) -> Decision:
        """Whether to move now, and what; does not change the state.

        costs: as they were measured, in place of the settings'. force: act on any gain, whatever it costs.
        """
        wanted = 1 if force else self._wanted
        if len(self.windows) < wanted:
            return Decision(None, f"{len(self.windows)} of {wanted} windows observed", 1.0, 1.0)
        windows = np.stack(self.windows)
        before = self._imbalance(windows, self.placement)
        least = 0.0 if force else max(self.settings.min_gain, _chance(windows, self.topology.num_ranks))
        if (was := float(before.mean())) * (1 - least) < 1.0:
            return Decision(None, f"an imbalance of {was:.4f} leaves less than {least:.2%} to gain", was, was)
        if self.settings.policy == "auto":
            proposed, after, least = self._improve(windows, before, least)
        else:
            proposed = self._solve(windows)
            after = self._imbalance(windows, proposed)
        routes, free = self._routes(windows, before, least / 2)
        now, there = float(after.mean()), float(free.mean())
        gain, reason = (was - now) / was, "no layer gains enough"
        moving = self._plan(proposed)
        if moving is not None and moving.num_moves:
            moved = traffic(moving, self.topology)
            own = min(gain, (there - now) / was)  # what the moves bring beyond new shares, which cost nothing
            worth, cost = self._weigh(costs or self.settings.costs, own, moved)
            found = Decision(
                moving, f"gain {gain:.2%}", was, now, moving.num_moves, moved, worth, cost, self._plan(routes)
            )
            dear = worth is not None and cost is not None and cost >= worth
            if own >= least and own > 0 and (force or not dear):
                return found
            reason = f"the moves' gain of {own:.2%} is below min_gain {least:.2%}"
            if own >= least and dear:
                reason = f"moves cost {cost:.3g} s, their gain of {own:.2%} is worth {worth:.3g} s"
                if routes.digest == self.placement.digest:
                    return replace(found, plan=None, reason=reason, routes=None)
        if (gain := (was - there) / was) >= least and gain > 0:
            return Decision(self._plan(routes), f"gain {gain:.2%} by shares alone", was, there)
        return Decision(None, reason, was, min(was, now))

    def _plan(self, proposed: Placement) -> MigrationPlan | None:
        """None where it is what is in force."""
        if proposed.digest == self.placement.digest:
            return None
        return plan_migration(self.placement, proposed, self.topology)

    def _routes(
        self, windows: npt.NDArray[np.int64], before: Floats, least: float
    ) -> tuple[Placement, Floats]:
        """The slots in force under the best shares, and its imbalance [L]; what costs no move."""
        current = self.placement
        if self.settings.routing != "shares" or current.num_slots == current.num_experts:
            return current, before
        found = self._placement(current.slot_to_expert, windows)
        return self._worthwhile_layers(before, found, self._imbalance(windows, found), least)

    def _improve(
        self, windows: npt.NDArray[np.int64], before: Floats, min_gain: float
    ) -> tuple[Placement, Floats, float]:
        """(a placement within max_moves_per_layer, its imbalance [L], the least gain to act on)."""
        s, current = self.settings, self.placement
        problem = Problem.of(
            windows,
            self.topology,
            expert_groups=s.expert_groups,
            survive_rank_loss=s.survive_rank_loss,
            routing=s.routing,
        )
        was, tries = float(before.mean()), []
        for search in _SEARCHES[s.routing]:
            tries.append(search(problem, current, s.max_moves_per_layer))
            found, after = self._best_of(windows, tries)
            if float(after.mean()) <= was * (1 - max(_FAR, min_gain)):
                break  # enough to act on; the next decision goes on from there
        kept, then = self._worthwhile_layers(before, found, after, min_gain / 2)
        if float(then.mean()) <= was * (1 - min_gain) or not self._far_off(problem, windows, was):
            return kept, then, min_gain
        least = min_gain / _DECISIONS
        return *self._worthwhile_layers(before, found, after, least / 2), least

    def _best_of(self, windows: npt.NDArray[np.int64], tries: list[Ints]) -> tuple[Placement, Floats]:
        """Each layer as the best of several slots [L, P] has it, and its imbalance [L]. A search that goes downhill
        within few moves ends in a different valley for each kind of step that it may take."""
        found = [self._placement(slots, windows) for slots in tries]
        after = np.stack([self._imbalance(windows, placement) for placement in found])
        best, layers = after.argmin(axis=0), np.arange(self.placement.num_layers)
        slots = np.stack([placement.slot_to_expert for placement in found])[best, layers]
        share = np.stack([placement.share for placement in found])[best, layers]
        kept = Placement(slots, self.placement.num_experts, self.placement.generation + 1, share)
        return kept, after[best, layers]

    def _far_off(self, problem: Problem, windows: npt.NDArray[np.int64], now: float) -> bool:
        """Whether even a quick fresh placement is so much better that small steps towards the like are worth it."""
        worth = now * (1 - max(_FAR, self.settings.min_gain))
        if worth <= 1.0:
            return False
        fresh = place(problem, connect=problem.weighted, effort=QUICK)
        return float(self._imbalance(windows, self._placement(fresh, windows)).mean()) < worth

    def _solve(self, windows: npt.NDArray[np.int64]) -> Placement:
        s = self.settings
        return explain(
            windows, self.topology, policy=s.policy, current=self.placement, expert_groups=s.expert_groups,
            survive_rank_loss=s.survive_rank_loss, routing=s.routing,
        ).placement  # fmt: skip

    def _placement(self, slots: Ints, windows: npt.NDArray[np.int64]) -> Placement:
        placement = Placement(slots, self.placement.num_experts, self.placement.generation + 1)
        if self.settings.routing == "even":
            return placement
        return replace(placement, share=static_shares(placement, windows, self.topology))

    def _worthwhile_layers(
        self, before: Floats, proposed: Placement, after: Floats, least: float
    ) -> tuple[Placement, Floats]:
        """The proposal and its imbalance [L] for layers that gain `least` by it; the others keep what they have."""
        gains = before - after > before * least
        slots = np.where(gains[:, None], proposed.slot_to_expert, self.placement.slot_to_expert)
        share = np.where(gains[:, None], proposed.share, self.placement.share)
        kept = Placement(slots, proposed.num_experts, proposed.generation, share)
        return kept, np.where(gains, after, before)

    def _imbalance(self, windows: npt.NDArray[np.int64], placement: Placement) -> Floats:
        """[L] mean over the windows under the engine's routing."""
        if self.settings.routing == "step":
            _, ranks = step_shares(placement, windows, self.topology)
        else:
            ranks = rank_load(windows, placement, self.topology, even=self.settings.routing == "even")
        by_layer: Floats = imbalance(ranks).mean(axis=0)
        return by_layer

    def _weigh(self, costs: Costs | None, gain: float, moved: Traffic) -> tuple[float | None, float | None]:
        """(what a relative gain is worth, what the moves cost), in seconds. It lasts no longer than traffic has
        lately stayed the same."""
        if costs is None:
            return None, None
        lasts = min(1.0, (self._shifts.typical or self.settings.windows) / self.settings.windows)
        worth = gain * costs.moe_part * costs.step_seconds * costs.horizon_steps * lasts
        transfer = max(moved.most_received, moved.most_sent) * costs.expert_bytes / costs.bytes_per_second
        return worth, transfer * costs.stall_part


def _chance(windows: npt.NDArray[np.int64], ranks: int) -> float:
    """What max / mean would exceed 1 by if every token fell on any rank alike: as much of a gain over these windows
    may be of their noise. The highest of G normals lies at about sqrt(ln G) deviations."""
    tokens = windows.sum(axis=(0, 2)).mean()
    return float(np.sqrt(np.log(ranks) * (ranks - 1) / max(tokens, 1.0)))
