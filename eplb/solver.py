"""From loads to a placement: the call of the command line, the engine and Python users."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, ParamSpec

import numpy as np
import numpy.typing as npt

from moeserve.eplb.incremental import improve_even
from moeserve.eplb.policies import POLICIES, choose
from moeserve.eplb.policies.problem import ROUTINGS, Problem, Routing
from moeserve.eplb.relabel import keep_in_place
from moeserve.eplb.routing import static_shares
from moeserve.eplb.types import Placement, Topology

P = ParamSpec("P")


@dataclass(frozen=True)
class Solution:
    """policy: the one that was taken; reason: why, if the choice was free."""

    placement: Placement
    policy: str
    reason: str


def explain(
    load: npt.ArrayLike,
    topology: Topology,
    *,
    policy: str = "auto",
    objective: Literal["windows", "mean"] = "windows",
    current: Placement | None = None,
    max_moves: int | None = None,
    expert_groups: int = 1,
    survive_rank_loss: bool = False,
    routing: Routing = "shares",
) -> Solution:
    """The placement of experts for a load [L, E] or windows [W, L, E] (any scale) on a topology, and why.

    policy: auto, greedy, fast, robust, connected, hierarchical or exact. objective: windows weighs the scatter
    over the windows, mean only their sum. current: a placement to start from; with max_moves at most so many
    slots of a layer change, without it the new placement is solved from scratch and then numbered so that as much
    as possible stays in place. expert_groups: groups of consecutive experts that routing picks together.
    survive_rank_loss: each expert on two ranks at least. routing: whether replicas will share equally (even), by
    the placement's `share` (shares), or by the counts of each step (step: searched longer; windows that are single
    steps, or single ranks' parts of them, show it most). The generation is one above the current one's.

    Raises ValueError where the load, the topology or the constraints do not fit together.
    """
    if policy != "auto" and policy not in POLICIES:
        raise ValueError(f"policy = {policy!r}: give auto, {', '.join(POLICIES)}")
    if routing not in ROUTINGS:
        raise ValueError(f"routing = {routing!r}: give {', '.join(ROUTINGS)}")
    problem = Problem.of(
        load,
        topology,
        objective=objective,
        expert_groups=expert_groups,
        survive_rank_loss=survive_rank_loss,
        routing=routing,
    )
    if current is not None:
        _check_current(current, problem)
    if max_moves is not None:
        if current is None:
            raise ValueError("max_moves needs the current placement to count from")
        if max_moves < 0:
            raise ValueError(f"max_moves = {max_moves}: give 0 or more slot changes a layer")
        slots = improve_even(problem, current, max_moves)
        name, reason = "incremental", f"at most {max_moves} slot changes a layer from the current placement"
    else:
        name, reason = choose(problem) if policy == "auto" else (policy, "asked for")
        slots = POLICIES[name](problem)
        if current is not None:
            slots = keep_in_place(current.slot_to_expert, slots, topology)
    generation = 0 if current is None else current.generation + 1
    placement = Placement(slots, problem.num_experts, generation)
    if survive_rank_loss and not placement.survives_rank_loss(topology):
        raise ValueError(f"policy {name} cannot keep every expert on two ranks here; use robust")
    if problem.weighted and problem.redundant:
        shares = static_shares(placement, problem.windows, topology)
        placement = Placement(slots, problem.num_experts, generation, shares)
    return Solution(placement, name, reason)


def _placement_of(find: Callable[P, Solution]) -> Callable[P, Placement]:
    def solve(*args: P.args, **kwargs: P.kwargs) -> Placement:
        """explain's placement; the same arguments and errors."""
        return find(*args, **kwargs).placement

    solve.__signature__ = inspect.signature(find)  # type: ignore[attr-defined]  # for help()
    return solve


solve = _placement_of(explain)


def _check_current(current: Placement, problem: Problem) -> None:
    current.check(problem.topology)
    if (current.num_layers, current.num_experts) != (problem.num_layers, problem.num_experts):
        raise ValueError(
            f"the current placement has {current.num_layers} layers of {current.num_experts} experts, the load "
            f"{problem.num_layers} of {problem.num_experts}"
        )
    if problem.survive_rank_loss and not current.survives_rank_loss(problem.topology):
        raise ValueError("the current placement does not survive a rank loss: solve without it first")
    assert np.isfinite(current.share).all()
