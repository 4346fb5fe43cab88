"""The balance of the experts over HTTP: what was counted, the placement in force, metrics. Read only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
from fastapi import FastAPI
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.responses import Response

from moeserve.eplb.formats.stats import format_stats
from moeserve.expert_balance import ExpertBalance
from moeserve.server import openai
from moeserve.server.errors import ApiError
from moeserve.stats.snapshot import PHASES

NO_EXPERTS: dict[int | str, dict[str, Any]] = {
    404: {"model": openai.ErrorAnswer, "description": "the model has no experts"}
}
NOT_YET: dict[int | str, dict[str, Any]] = {
    409: {"model": openai.ErrorAnswer, "description": "nothing was counted yet"}
}


def add_balance_routes(app: FastAPI, balance: ExpertBalance | None) -> None:
    """GET /eplb/*. balance: None for a model without experts, where each answers 404."""

    def known() -> ExpertBalance:
        if balance is None:
            raise ApiError(404, "this model has no experts, there is nothing to balance", code="no_experts")
        return balance

    @app.get("/eplb/stats.json", responses={**NO_EXPERTS, **NOT_YET})
    async def expert_load() -> Response:
        """The expert load of the last minutes, as eplb-offline reads it. 409 when nothing was counted yet."""
        counted, windows = known(), known().ring.windows
        if not windows:
            raise ApiError(
                409, "no expert load was counted yet: send a request and ask again", code="no_expert_load"
            )
        # megabytes for a large model: not on the thread that carries everyone's tokens
        return _json(await asyncio.to_thread(lambda: format_stats(counted.load_of(windows))))

    @app.get("/eplb/placement", responses=NO_EXPERTS)
    async def placement() -> Response:
        """The placement in force, as eplb-offline writes it and the engine reads it."""
        return _json(known().placement_text())

    @app.get("/eplb/status", responses=NO_EXPERTS)
    async def balance_status() -> Response:
        """Imbalance (max / mean rank load, over the MoE layers) and state of the balancer."""
        return _json(msgspec.json.encode(known().status()))


def _json(text: str | bytes) -> Response:
    return Response(text, media_type="application/json")


class BalanceCollector:
    """Shows an ExpertBalance to a registry."""

    def __init__(self, balance: ExpertBalance, model_name: str) -> None:
        self._balance = balance
        self._model = model_name

    def collect(self) -> Iterator[Metric]:
        ratio = GaugeMetricFamily(
            "moeserve_eplb_imbalance_ratio",
            "Max / mean rank load of the last 30 s of traffic, over the MoE layers; 1 is perfect.",
            labels=["model_name", "phase", "stat"],
        )
        for phase, found in self._balance.imbalance().items():
            for stat in ("worst", "median", "mean"):
                ratio.add_metric([self._model, phase, stat], getattr(found, stat))
        yield ratio
        generation = GaugeMetricFamily(
            "moeserve_eplb_placement_generation",
            "Generation of the placement that a rank follows.",
            labels=["model_name", "rank"],
        )
        for rank, number in sorted(self._balance.generations.items()):
            generation.add_metric([self._model, str(rank)], number)
        yield generation
        tokens = CounterMetricFamily(
            "moeserve_eplb_rank_tokens",
            "Tokens given to the experts of an expert-parallel rank, one for each expert chosen, over all layers.",
            labels=["model_name", "rank", "phase"],
        )
        for phase, loads in zip(PHASES, self._balance.rank_tokens(), strict=True):
            for rank, load in enumerate(loads.tolist()):
                tokens.add_metric([self._model, str(rank), phase], load)
        yield tokens
