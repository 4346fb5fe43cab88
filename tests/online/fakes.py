"""Ranks that are not there: they answer orders as real ones do, or as badly as a test wants."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from moeserve.eplb.rebalancer import Costs, Rebalancer, Settings
from moeserve.eplb.service import Answer
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import ExpertCounts, LayersSwitched, Migrate, Migrated, decode_to_rank, encode
from moeserve.moe.migration import ordered_placement
from moeserve.online.balancer import OnlineBalancer, OnlineSettings

RANKS, LAYERS, EXPERTS, SLOTS = 4, 3, 16, 20
TOPOLOGY = Topology.of(RANKS, SLOTS)
STEPS = 10
EXPERT_BYTES = 1000


class HereSolver:
    """The rebalancer without its process."""

    def __init__(self, placement: Placement, settings: Settings) -> None:
        self.rebalancer = Rebalancer(placement, TOPOLOGY, settings)
        self.answers: deque[Answer] = deque()
        self.costs: list[Costs | None] = []
        self.forgot = 0
        self.state = "idle"
        self.mute = False
        self.instead: list[Answer] = []  # answers to give in place of what would be decided

    def observe(self, load: npt.NDArray[np.int64], forget: bool = False) -> None:
        self.forgot += forget
        self.rebalancer.observe(load, forget)

    def request(self, costs: Costs | None = None, force: bool = False) -> None:
        self.costs.append(costs)
        if self.instead:
            self.answers.append(self.instead.pop(0))
            return
        self.answers.append(Answer(self.rebalancer.decide(costs, force), 0.01))

    def applied(self, placement: Placement) -> None:
        self.rebalancer.applied(placement)

    def poll(self) -> Answer | None:
        return self.answers.popleft() if self.answers and not self.mute else None

    def close(self) -> None:
        self.state = "closed"


class Ranks:
    """All ranks of an engine. fail_after: layers that they do before they fail; silent: they say nothing."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.orders: list[Migrate] = []
        self.fail_after: int | None = None
        self.silent = False
        self.astray: int | None = None  # a rank that ends at another placement

    def carry_out(self, order: Migrate) -> list[LayersSwitched | Migrated]:
        decoded = decode_to_rank(encode(order))
        assert isinstance(decoded, Migrate)
        self.orders.append(decoded)
        target = ordered_placement(decoded, self.placement, TOPOLOGY)  # refuses what does not fit
        first = [layer.layer for layer in decoded.layers if not layer.moves]
        rest = [[layer.layer] for layer in decoded.layers if layer.moves]
        groups = ([first] if first else []) + rest
        done = groups if self.fail_after is None else groups[: self.fail_after]
        said: list[LayersSwitched | Migrated] = []
        for group in done:
            self.placement = self.placement.with_layers(group, target)
            said.append(LayersSwitched(0, order.order, group))
        whole = len(done) == len(groups)
        result, reason = (
            ("applied", "") if whole else ("partial" if done else "failed", "a checksum is wrong")
        )
        layers = sum(map(len, done))
        moves = sum(len(layer.moves) for layer in decoded.layers if [layer.layer] in done and layer.moves)
        for rank in range(RANKS):
            digest = "0" * 64 if rank == self.astray else self.placement.digest
            said.append(
                Migrated(
                    *(rank, order.order, result, reason, layers, self.placement.generation, digest),
                    *(moves * (rank == 0), moves * EXPERT_BYTES * (rank == 0), 0.5, 0.01 * rank),
                )
            )
        return [] if self.silent else said


class Engine:
    """Balancer and ranks; time goes by only when a test says so."""

    def __init__(self, placement: Placement | None = None, **settings: object) -> None:
        self.now = 1000.0
        routing = str(settings.get("routing", "shares"))
        self.settings = Settings(**settings)  # type: ignore[arg-type]
        self.balance = ExpertBalance(
            placement or Placement.identity(LAYERS, EXPERTS, SLOTS),
            TOPOLOGY,
            layers=range(1, LAYERS + 1),
            model="toy/model",
            top_k=1,
            expert_groups=1,
            expert_bytes=EXPERT_BYTES,
            routing=routing,
        )
        self.solvers: list[HereSolver] = []
        bounds = OnlineSettings(STEPS, self.settings.windows, 2, RANKS)
        self.online = OnlineBalancer(self.balance, bounds, self._solver, clock=lambda: self.now)
        self.balance.online = self.online
        self.ranks = Ranks(self.balance.placement)
        self.step = 0

    def _solver(self, placement: Placement) -> HereSolver:
        self.solvers.append(HereSolver(placement, self.settings))
        return self.solvers[-1]

    @property
    def solver(self) -> HereSolver:
        return self.solvers[-1]

    def count(self, decode: npt.NDArray[np.int64], prefill: npt.NDArray[np.int64] | None = None) -> None:
        """A window [L, E] that all ranks have counted an equal part of."""
        self.step += STEPS
        nothing = np.zeros_like(decode)
        parts = np.stack([nothing if prefill is None else prefill, decode]) // RANKS
        tokens = (int(parts[0, 0].sum()), int(parts[1, 0].sum()))
        for rank in range(RANKS):
            self.balance.add(ExpertCounts(rank, self.step, STEPS, 0.5, tokens, parts.astype("<u4").tobytes()))

    def run(self) -> None:
        """Until nobody has anything to say."""
        self.online.tick()
        while orders := self.online.take_orders():
            for order in orders:
                for answer in self.ranks.carry_out(order):
                    self.online.handle(answer)
            self.online.tick()

    def window(self, decode: npt.NDArray[np.int64], prefill: npt.NDArray[np.int64] | None = None) -> None:
        self.count(decode, prefill)
        self.run()

    def moves(self) -> int:
        return sum(len(layer.moves) for order in self.ranks.orders for layer in order.layers)


def skewed(hot: int, tokens: int = 4000, seed: int = 0) -> npt.NDArray[np.int64]:
    """[L, E]: half of the load falls on four experts that stand together, from `hot` on."""
    rng = np.random.default_rng(seed)
    weight = np.ones(EXPERTS)
    weight[[(hot + i) % EXPERTS for i in range(4)]] = 4.0
    load: npt.NDArray[np.int64] = rng.multinomial(tokens, weight / weight.sum(), size=LAYERS) // RANKS * RANKS
    return load
