"""Tells the front-end which experts this rank's rows have chosen and which slots they were sent to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moeserve.messages import ExpertCounts
from moeserve.stats.expert_load import ExpertLoad

if TYPE_CHECKING:
    from moeserve.plan import EnginePlan

REPORT_SECONDS = 1.0


class ExpertReporter:
    """Reports about once a second; with window_steps when the step is a multiple of it, and of what is left once
    the ranks have stood still for a second.

    The clock starts with the first step after a report: ranks step together, so their reports match.
    """

    def __init__(self, load: ExpertLoad, rank: int, top_k: int, window_steps: int | None = None):
        self.load = load
        self.rank = rank
        self.top_k = top_k
        self.window_steps = window_steps
        self.reported_step = 0
        self.since: float | None = None
        self.last = (0, 0.0)  # newest step, and when it was seen first

    @classmethod
    def of(cls, plan: EnginePlan, load: ExpertLoad | None, rank: int) -> ExpertReporter | None:
        """None for a model without experts."""
        if load is None or plan.spec.moe is None:
            return None
        balancer = plan.config.moe_config.load_balancer
        window_steps = balancer.online.window_steps if balancer.layer_updates_per_iter else None
        return cls(load, rank, plan.spec.moe.routing.top_k, window_steps)

    def due(self, step: int, now: float) -> ExpertCounts | None:
        """The report that is due after so many steps at `now` (seconds), None when there is none.

        Call it when the last step's result was read: the counter's copy then waits for nothing else.
        """
        if step == self.reported_step:
            return None
        if self.since is None:
            self.since = now
        if step != self.last[0]:
            self.last = (step, now)
        seconds = now - self.since
        if self.window_steps is None:
            if seconds < REPORT_SECONDS:
                return None
        elif step % self.window_steps and now - self.last[1] < REPORT_SECONDS:
            return None
        return self.report(step, seconds)

    def report(self, step: int, seconds: float) -> ExpertCounts | None:
        """All that was counted, due or not; it took about so many seconds."""
        steps = step - self.reported_step
        self.reported_step, self.since = step, None
        return self._report(step, steps, seconds)

    def _report(self, step: int, steps: int, seconds: float) -> ExpertCounts | None:
        experts, slots = self.load.take()
        prefill, decode = (int(phase[0].sum()) // self.top_k for phase in experts)
        if self.window_steps is None and not prefill + decode:  # other replicas' steps
            return None
        return ExpertCounts(
            self.rank, step, steps, seconds, (prefill, decode), _bytes(experts), _bytes(slots)
        )


def _bytes(counts: torch.Tensor) -> bytes:
    return counts.numpy().astype("<u4").tobytes()
