"""An engine put together: ranks, front-end and tokenizer for one plan. What `serve` and the offline LLM share."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from moeserve.eplb.rebalancer import Settings
from moeserve.eplb.service import RebalanceService
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.expert_recorder import ExpertRecorder
from moeserve.launch import RankPlace, RankSet
from moeserve.online.balancer import OnlineBalancer, OnlineSettings
from moeserve.plan import EnginePlan
from moeserve.server.frontend import Frontend
from moeserve.server.run import STOP_SIGNALS, HttpServer
from moeserve.server.settings import ServerSettings
from moeserve.text import Tokenizer

log = logging.getLogger(__name__)
READY_POLL_SECONDS = 0.01


def with_tokenizer(plan: EnginePlan) -> tuple[EnginePlan, Tokenizer]:
    """The model's tokenizer, and the plan that knows its end tokens. Raises ValueError naming a broken file."""
    tokenizer = Tokenizer(Path(plan.config.model), vocab_size=plan.spec.vocab_size)
    return replace(plan, eos_token_ids=tuple(sorted(tokenizer.eos_token_ids))), tokenizer


def api_keys(setting: str | None) -> tuple[str, ...]:
    """The keys of a comma-separated list; none for None. Raises ValueError for a list without a key."""
    if setting is None:
        return ()
    keys = tuple(key.strip() for key in setting.split(",") if key.strip())
    if not keys:
        raise ValueError(f"api_key = {setting!r}: holds no key; leave it out or give one")
    return keys


def server_settings(plan: EnginePlan) -> ServerSettings:
    config, moe = plan.config, plan.spec.moe
    room = config.max_queued_requests + config.max_batch_size * plan.layout.dp
    return ServerSettings(
        model_name=plan.model_name,
        max_seq_len=plan.max_seq_len,
        max_batch_size=config.max_batch_size,
        num_ranks=plan.layout.world_size,
        num_moe_layers=len(plan.spec.moe_layers),
        top_k=moe.routing.top_k if moe is not None else 0,
        # public, so not of the key: who knows the rest could try keys against it
        config_hash=hashlib.sha256(repr(replace(config, api_key=None)).encode()).hexdigest()[:10],
        api_keys=api_keys(config.api_key),
        max_queued_requests=config.max_queued_requests,
        max_choices=min(ServerSettings.max_choices, room),
        max_sequences=min(ServerSettings.max_sequences, room),
        max_queued_tokens=config.max_queued_tokens,
        request_timeout=config.request_timeout,
        drain_timeout=config.drain_timeout,
        balance_replicas=config.attention_dp_config.enable_balance,
        survive_rank_loss=config.moe_config.load_balancer.on_rank_loss == "shrink",
        metrics_compat=config.metrics_compat,
    )


def expert_balance(plan: EnginePlan, place: RankPlace | None = None) -> ExpertBalance | None:
    """What keeps the ranks' counts of experts; None for a model without experts. place: of a launcher's rank,
    which tells how many share a host."""
    if plan.placement is None or plan.spec.moe is None:
        return None
    routing = plan.spec.moe.routing
    per_host = 0 if place is None else max(1, place.local_size // plan.layout.etp)
    held = plan.placement.num_slots // plan.layout.ep * plan.placement.num_layers
    return ExpertBalance(
        plan.placement,
        Topology.of(plan.layout.ep, plan.placement.num_slots, min(per_host, plan.layout.ep)),
        layers=plan.spec.moe_layers,
        model=plan.model_name,
        top_k=routing.top_k,
        expert_groups=routing.num_groups,
        expert_bytes=plan.weight_bytes().experts // held,
        routing=plan.config.moe_config.load_balancer.online.routing,
    )


def online_balancer(plan: EnginePlan, balance: ExpertBalance) -> OnlineBalancer | None:
    """What lets the experts follow the traffic; None where their placement stays. Starts a process: close it."""
    config = plan.config.moe_config.load_balancer
    if not config.layer_updates_per_iter:
        return None
    online = config.online
    settings = Settings(
        windows=online.windows,
        policy=online.policy,
        max_moves_per_layer=online.max_moves_per_layer,
        min_gain=online.min_gain,
        routing=online.routing,
        expert_groups=balance.expert_groups,
        survive_rank_loss=online.survive_rank_loss,
    )
    bounds = OnlineSettings(
        window_steps=online.window_steps,
        windows=online.windows,
        layers_per_step=config.layer_updates_per_iter,
        num_ranks=plan.layout.world_size,
        bytes_per_second=online.max_bytes_per_second,
        ranks_an_expert=plan.layout.etp,
        survive_rank_loss=online.survive_rank_loss,
    )

    def start_solver(placement: Placement) -> RebalanceService:
        """After a loss there may be too few slots to survive another."""
        survives = online.survive_rank_loss and placement.survives_rank_loss(balance.topology)
        return RebalanceService(placement, balance.topology, replace(settings, survive_rank_loss=survives))

    return OnlineBalancer(balance, bounds, start_solver)


def expert_recorder(plan: EnginePlan, balance: ExpertBalance | None) -> ExpertRecorder | None:
    """What keeps the counts on disk, None unless asked for. Raises ValueError naming record_stats."""
    folder = plan.config.record_stats
    if folder is None:
        return None
    if balance is None:
        raise ValueError(
            f"record_stats = {folder!r}: {plan.model_name} has no experts to count; leave it out"
        )
    return ExpertRecorder(balance, Path(folder))


@contextlib.asynccontextmanager
async def running_engine(
    plan: EnginePlan, tokenizer: Tokenizer, settings: ServerSettings, place: RankPlace | None = None
) -> AsyncIterator[Frontend]:
    """Ranks that start, and the front-end that carries messages to them; on the way out no rank is left.

    Raises as RankSet.raise_failure, after the body is done, when the engine died.
    """
    balance = expert_balance(plan, place)
    recorder = expert_recorder(plan, balance)
    if balance is not None:
        balance.online = online_balancer(plan, balance)
    ranks = RankSet(plan, place)
    frontend = Frontend(ranks, tokenizer, settings, balance)
    ranks.start()
    carrying = asyncio.create_task(frontend.run(), name="frontend")
    try:
        yield frontend
    finally:
        frontend.end_all()
        carrying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await carrying
        await ranks.stop()
        if balance is not None and balance.online is not None:
            await asyncio.to_thread(balance.online.close)
        if recorder is not None:
            await asyncio.to_thread(recorder.close)
    ranks.raise_failure()


async def until_ready(frontend: Frontend) -> None:
    """Return when every rank has its weights, or the engine is dead."""
    while not frontend.all_ready and not frontend.dead.is_set():
        await asyncio.sleep(READY_POLL_SECONDS)


async def serve_http(
    plan: EnginePlan, tokenizer: Tokenizer, listener: socket.socket, place: RankPlace | None = None
) -> int:
    """Serve until a signal or a failure; the exit code. Raises as running_engine does."""
    settings = server_settings(plan)
    early: list[int] = []  # signals that come while the ranks' processes are made
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, early.append, number)
    async with running_engine(plan, tokenizer, settings, place) as frontend:
        server = HttpServer(frontend, settings, listener)
        server.handle_signals()
        if early:
            server.stop()
        announcing = asyncio.create_task(_announce(frontend, plan, listener))
        code = await server.serve()
        announcing.cancel()
    return code


async def _announce(frontend: Frontend, plan: EnginePlan, listener: socket.socket) -> None:
    await until_ready(frontend)
    if not frontend.dead.is_set():
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"moeserve is ready: {plan.model_name} on {plan.layout.world_size} ranks", flush=True)
        print(f"  API        http://{host}:{port}/v1", flush=True)
        print(f"  metrics    http://{host}:{port}/metrics", flush=True)
        if frontend.balance is not None:
            print(f"  stats      http://{host}:{port}/eplb/stats.json", flush=True)
            print(f"  dashboard  http://{host}:{port}/dashboard", flush=True)
