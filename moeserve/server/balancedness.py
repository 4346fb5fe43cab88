"""SGLang's metric of expert balance, for boards that were made for it. Asked for with --metrics-compat sglang."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric, SummaryMetricFamily

from moeserve.eplb.metrics import imbalance, rank_load
from moeserve.expert_balance import ExpertBalance
from moeserve.stats.snapshot import PHASES, LoadWindow

FORWARD_MODES = ("extend", "decode")
"""What SGLang calls our phases, in their order."""


class BalancednessCollector:
    """sglang:eplb_balancedness: mean / max rank load, mean over layers, as a summary by phase.

    SGLang observes each forward pass; here the passes that the ranks report together have one value, counted as
    many times.
    """

    def __init__(self, balance: ExpertBalance, model_name: str) -> None:
        self._balance = balance
        self._model = model_name
        self._open: LoadWindow | None = None
        self._seen: set[int] = set()
        self._sums = [0.0] * len(PHASES)
        self._counts = [0] * len(PHASES)
        balance.listeners.append(self._listen)

    def _listen(self, rank: int, report: LoadWindow) -> None:
        if rank in self._seen and self._open is not None:
            self._observe(self._open)
            self._open = None
            self._seen.clear()
        self._open = report if self._open is None else self._open + report
        self._seen.add(rank)

    def _observe(self, window: LoadWindow) -> None:
        for i, (load, tokens) in enumerate(zip(window.load, window.tokens, strict=True)):
            if tokens:
                ranks = rank_load(load, self._balance.placement, self._balance.topology)
                self._sums[i] += window.steps * float((1 / imbalance(ranks)).mean())
                self._counts[i] += window.steps

    def collect(self) -> Iterator[Metric]:
        family = SummaryMetricFamily(
            "sglang:eplb_balancedness",
            "Mean / max rank load of the experts, mean over layers; 1 is perfect.",
            labels=["model_name", "engine", "forward_mode"],
        )
        for mode, total, count in zip(FORWARD_MODES, self._sums, self._counts, strict=True):
            family.add_metric([self._model, "0", mode], count_value=count, sum_value=total)
        yield family
