"""The balance of the experts over HTTP: what was counted, the placement in force, orders to the balancer, metrics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

import msgspec
from fastapi import FastAPI, Request
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from starlette.responses import Response

from moeserve.eplb.formats.files import parse_json
from moeserve.eplb.formats.placement import PlacementFile, check_made_for, parse_placement
from moeserve.eplb.formats.stats import format_stats
from moeserve.expert_balance import ExpertBalance
from moeserve.online.balancer import Busy, OnlineBalancer
from moeserve.online.records import Ledger, Result, Trigger
from moeserve.server import openai
from moeserve.server.errors import ApiError
from moeserve.stats.snapshot import PHASES

Answers = dict[int | str, dict[str, Any]]


def _errors(**texts: str) -> Answers:
    return {
        int(status[1:]): {"model": openai.ErrorAnswer, "description": text} for status, text in texts.items()
    }


NO_EXPERTS = _errors(_404="the model has no experts")
NOT_YET = _errors(_409="nothing was counted yet")
ADMIN = _errors(
    _401="no or a wrong API key",
    _404="the model has no experts",
    _409="online balancing is off, or it cannot be done just now",
    _413="the body is too large",
    _503="loading, draining or dead; see retry-after",
)
BAD_PLACEMENT = _errors(_400="the placement is wrong or made for another engine; param names the field")
PLACEMENT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "placement.json, as eplb-offline writes it",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}
PLACEMENT_FIELDS = re.compile(
    r"\b(format|version|generation|model|num_experts|num_slots|ep_size|ranks_per_node|layers|slot_to_expert|share"
    r"|digest|predicted|solver)\b"
)


def add_balance_routes(
    app: FastAPI, balance: ExpertBalance | None, check_serving: Callable[[], None]
) -> None:
    """/eplb/*. balance: None for a model without experts, where each answers 404. check_serving raises ApiError
    while nothing can be ordered from the ranks."""

    def known() -> ExpertBalance:
        if balance is None:
            raise ApiError(404, "this model has no experts, there is nothing to balance", code="no_experts")
        return balance

    _add_reading(app, known)
    _add_orders(app, known, check_serving)


def _add_reading(app: FastAPI, known: Callable[[], ExpertBalance]) -> None:
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
        """Imbalance (max / mean rank load, over the MoE layers), state of the balancer and what it has done."""
        found = known()
        await asyncio.to_thread(found.kept)  # tens of milliseconds for a large model after a new placement
        return _json(msgspec.json.encode(found.status()))


def _add_orders(app: FastAPI, known: Callable[[], ExpertBalance], check_serving: Callable[[], None]) -> None:
    def online() -> OnlineBalancer:
        found = known().online
        if found is None:
            raise ApiError(
                409,
                "online balancing is off; start with moe_config.load_balancer.layer_updates_per_iter above 0",
                code="balancing_off",
            )
        check_serving()
        return found

    @app.post("/eplb/rebalance", status_code=202, responses=ADMIN)
    async def rebalance() -> Response:
        """Decide now, however little it brings; /eplb/status tells what came of it."""
        found = online()
        try:
            found.rebalance()
        except Busy as busy:
            raise _conflict(busy) from None
        return _state(found, 202)

    @app.post(
        "/eplb/placement",
        status_code=202,
        responses={**ADMIN, **BAD_PLACEMENT, 200: {"description": "it is in force already"}},
        openapi_extra=PLACEMENT_BODY,
    )
    async def apply_placement(raw: Request) -> Response:
        """Bring a placement into force, layer by layer, while serving; /eplb/status tells how far it is."""
        found = online()
        body = await raw.body()
        try:
            file = await asyncio.to_thread(_read_placement, body, known())
            plan = await asyncio.to_thread(found.plan, file.placement)
            order = found.apply(plan, _promised(file))
        except ValueError as error:
            field = PLACEMENT_FIELDS.search(str(error))
            param = None if field is None else field[0]
            raise ApiError(400, str(error), param=param, code="invalid_placement") from None
        except Busy as busy:
            raise _conflict(busy) from None
        return _state(found, 200 if order is None else 202, order=order)

    @app.post("/eplb/pause", responses=ADMIN)
    async def pause() -> Response:
        """Keep the placement as it is until resume; a migration under way is finished."""
        found = online()
        found.pause()
        return _state(found)

    @app.post("/eplb/resume", responses=ADMIN)
    async def resume() -> Response:
        """Decide again, also after the balancer's death; 409 while ranks owe an answer to an order."""
        found = online()
        try:
            found.resume()
        except Busy as busy:
            raise _conflict(busy) from None
        return _state(found)


def _read_placement(body: bytes, balance: ExpertBalance) -> PlacementFile:
    """The placement of the body, if this engine can serve it. Raises ValueError naming the field."""
    file = parse_placement(parse_json(body))
    check_made_for(
        file,
        ep_size=balance.topology.num_ranks,
        num_experts=balance.placement.num_experts,
        layers=balance.layers,
        num_slots=balance.placement.num_slots,
        model=balance.model,
    )
    return file


def _promised(file: PlacementFile) -> float | None:
    """The imbalance that the solver expected of it."""
    value = file.predicted.get("imbalance_mean")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _conflict(busy: Busy) -> ApiError:
    return ApiError(409, str(busy), code="balancer_busy")


def _state(online: OnlineBalancer, status: int = 200, **more: Any) -> Response:
    return Response(
        msgspec.json.encode({"state": online.state, **more}), status, media_type="application/json"
    )


def _json(text: str | bytes) -> Response:
    return Response(text, media_type="application/json")


class BalanceCollector:
    """Shows an ExpertBalance, and what balances it, to a registry."""

    def __init__(self, balance: ExpertBalance, model_name: str) -> None:
        self._balance = balance
        self._model = model_name

    def collect(self) -> Iterator[Metric]:
        yield from self._imbalance()
        yield self._gauge(
            "placement_generation",
            "Generation of the placement that a rank follows.",
            {(str(rank),): number for rank, number in sorted(self._balance.generations.items())},
            "rank",
        )
        yield self._counter(
            "rank_tokens",
            "Tokens given to the experts of an expert-parallel rank, one for each expert chosen, over all layers.",
            {
                (str(rank), phase): load
                for phase, loads in zip(PHASES, self._balance.rank_tokens(), strict=True)
                for rank, load in zip(self._balance.rank_names, loads.tolist(), strict=True)
            },
            *("rank", "phase"),
        )
        yield self._gauge(
            "lost_ranks", "Ranks that died and were gone on without.", {(): len(self._balance.lost)}
        )
        yield self._gauge(
            "survives_rank_loss",
            "1 while every expert stands on two ranks at least.",
            {(): int(self._balance.placement.survives_rank_loss(self._balance.topology))},
        )
        yield from self._online(self._balance.online)

    def _imbalance(self) -> Iterator[Metric]:
        found = self._balance.imbalance()
        yield self._gauge(
            "imbalance_ratio",
            "Max / mean rank load over the MoE layers, of the last window or 30 s of traffic; 1 is perfect.",
            {
                (phase, stat): getattr(figures, stat)
                for phase, figures in found.items()
                for stat in ("worst", "median", "mean")
            },
            *("phase", "stat"),
        )
        yield self._gauge(
            "measured_imbalance_ratio",
            "The same of the tokens that ranks were really given.",
            {
                (phase, stat): value
                for phase, figures in found.items()
                for stat, value in (("worst", figures.measured_worst), ("mean", figures.measured_mean))
                if value is not None
            },
            *("phase", "stat"),
        )
        yield self._gauge(
            "predicted_imbalance_ratio",
            "Max / mean rank load, mean over the MoE layers, that was expected of the placement in force.",
            {(phase,): value for phase, value in self._balance.predicted.items()},
            "phase",
        )

    def _online(self, online: OnlineBalancer | None) -> Iterator[Metric]:
        """Without a balancer the same names, all 0: boards and alerts need not know."""
        ledger = Ledger() if online is None else online.ledger
        moving = online is not None and online.state == "migrating"
        yield self._gauge("rebalancing", "1 while experts are being moved.", {(): int(moving)})
        yield self._gauge(
            "balancer_up",
            "1 while the online balancer works, 0 when it is dead.",
            {} if online is None else {(): int(not online.trouble)},
        )
        yield self._counter(
            "rebalances",
            "Decisions by what asked for them and what came of them.",
            {
                (trigger, result): ledger.results[trigger, result]
                for trigger in get_args(Trigger)
                for result in get_args(Result)
            },
            *("trigger", "result"),
        )
        yield self._counter("migrated_slots", "Slots that were given another expert.", {(): ledger.slots})
        yield self._counter(
            "migrated_bytes",
            "Bytes of weights that went between ranks, within nodes and between them.",
            {(link,): count for link, count in sorted(ledger.bytes.items())},
            "link",
        )
        yield self._counter(
            "stall_seconds", "Time that migrations have held up steps.", {(): ledger.stall_seconds}
        )
        for name, text, histogram in (
            ("solve", "Time to find a decision.", ledger.solve),
            ("migration", "From an order to move experts to its end on all ranks.", ledger.migration),
        ):
            family = HistogramMetricFamily(
                f"moeserve_eplb_{name}_duration_seconds", text, labels=["model_name"]
            )
            family.add_metric([self._model], buckets=histogram.cumulative(), sum_value=histogram.total)
            yield family

    def _gauge(self, name: str, text: str, values: dict[Any, float], *labels: str) -> Metric:
        gauge = GaugeMetricFamily(f"moeserve_eplb_{name}", text, labels=["model_name", *labels])
        for key, value in values.items():
            gauge.add_metric([self._model, *key], value)
        return gauge

    def _counter(self, name: str, text: str, values: dict[Any, float], *labels: str) -> Metric:
        counter = CounterMetricFamily(f"moeserve_eplb_{name}", text, labels=["model_name", *labels])
        for key, value in values.items():
            counter.add_metric([self._model, *key], value)
        return counter
