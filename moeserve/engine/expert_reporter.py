"""Tells the front-end, about once a second, which experts this rank's rows have chosen."""

from __future__ import annotations

from moeserve.messages import ExpertCounts
from moeserve.models.spec import ModelSpec
from moeserve.stats.expert_load import ExpertLoad

REPORT_SECONDS = 1.0


class ExpertReporter:
    """The clock starts with the first step after a report: ranks step together, so their reports match."""

    def __init__(self, load: ExpertLoad, rank: int, top_k: int):
        self.load = load
        self.rank = rank
        self.top_k = top_k
        self.reported_step = 0
        self.since: float | None = None

    @classmethod
    def of(cls, spec: ModelSpec, load: ExpertLoad | None, rank: int) -> ExpertReporter | None:
        """None for a model without experts."""
        if load is None or spec.moe is None:
            return None
        return cls(load, rank, spec.moe.routing.top_k)

    def due(self, step: int, now: float) -> ExpertCounts | None:
        """The report that is due after so many steps at `now` (seconds), None when there is none.

        Call it when the last step's result was read: the counter's copy then waits for nothing else.
        """
        if step == self.reported_step:
            return None
        if self.since is None:
            self.since = now
        seconds = now - self.since
        if seconds < REPORT_SECONDS:
            return None
        steps = step - self.reported_step
        self.reported_step, self.since = step, None
        counts = self.load.take().numpy()
        prefill, decode = (int(phase[0].sum()) // self.top_k for phase in counts)
        if not prefill + decode:  # other replicas' steps
            return None
        data = counts.astype("<u4").tobytes()
        return ExpertCounts(self.rank, step, steps, seconds, (prefill, decode), data)
