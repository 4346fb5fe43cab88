"""Runs a scheduled step on this rank: batch, model, sampler. Owns the mesh, the model and its caches."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from moeserve import device as devices
from moeserve.comm.all_to_all import make_dispatcher
from moeserve.comm.all_to_all.protocol import TokenDispatcher
from moeserve.comm.mesh import Mesh
from moeserve.comm.weight_mover.exchange import ExchangeMover
from moeserve.comm.wire import RankLost
from moeserve.engine.batch import make_batch
from moeserve.engine.lockstep import Agreed
from moeserve.engine.page_pool import PagePool
from moeserve.engine.sampler import sample
from moeserve.engine.scheduler import ScheduledBatch, Scheduler
from moeserve.engine.sequence import StepResult
from moeserve.eplb.types import Placement, Topology
from moeserve.models.checkpoint import load
from moeserve.models.decoder import Decoder
from moeserve.moe.expert_map import ExpertMap
from moeserve.moe.migrator import Migrator
from moeserve.ops import native
from moeserve.stats.expert_load import ExpertLoad

if TYPE_CHECKING:
    from moeserve.launch import RankPlace
    from moeserve.plan import EnginePlan

log = logging.getLogger(__name__)


class Runner:
    """This rank's model, loaded and ready. Made by all ranks at the same time: they size their caches together."""

    def __init__(self, plan: EnginePlan, place: RankPlace):
        self.plan = plan
        self.device = devices.resolve_device(plan.device, place.local_rank)
        self.threads = devices.set_threads(plan.config.num_threads, place.local_size)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            native.enable()
        self.mesh = Mesh(plan.layout, place.rank)
        self.expert_load: ExpertLoad | None = None
        self.model = self._load_model()
        self.page_size = plan.config.kv_cache_config.tokens_per_block
        self.kv_tokens = self._agree_kv_tokens(place.local_size)
        self.max_seq_len = self._agree_max_seq_len()
        self.kv_cache = self.model.new_kv_cache(self.kv_tokens // self.page_size, self.page_size)

    def _load_model(self) -> Decoder:
        plan = self.plan
        expert_map = dispatcher = None
        if plan.placement is not None and plan.spec.moe is not None:
            topology = Topology.of(plan.layout.ep, plan.placement.num_slots)
            routing = plan.config.moe_config.load_balancer.online.routing
            expert_map = ExpertMap(plan.placement, topology, self.mesh.ep.rank, self.device, routing)
            dispatcher = self._make_dispatcher(topology)
            self.expert_load = ExpertLoad(
                len(plan.spec.moe_layers), plan.spec.moe.num_experts, plan.placement.num_slots, self.device
            )
        model = Decoder(
            plan.spec,
            self.mesh,
            dtype=plan.torch_dtype,
            device=self.device,
            expert_map=expert_map,
            dispatcher=dispatcher,
            load=self.expert_load,
            max_positions=plan.max_seq_len,
        )
        with progress_bar("weights", shown=self.mesh.rank == 0) as bar:
            load(model, Path(plan.config.model), progress=lambda done, total: _show(bar, done, total))
        return model

    def _make_dispatcher(self, topology: Topology) -> TokenDispatcher | None:
        """None for a group of one."""
        plan = self.plan
        if self.mesh.ep.size == 1:
            return None
        return make_dispatcher(
            plan.all_to_all,
            self.mesh.ep,
            topology.slots_per_rank,
            plan.dispatch_sizes(),
            fall_back=plan.config.moe_config.all_to_all == "auto",
            device=self.device,
        )

    @property
    def placement(self) -> Placement | None:
        """In force; None for a model without experts."""
        return None if self.model.expert_map is None else self.model.expert_map.placement

    @property
    def topology(self) -> Topology | None:
        return None if self.model.expert_map is None else self.model.expert_map.topology

    def regroup(self, placement: Placement, topology: Topology) -> None:
        """Go on with what has become of the mesh and of its experts' places; this rank's own slots are the same."""
        expert_map = self.model.expert_map
        assert expert_map is not None and self.expert_load is not None
        dispatcher = self._make_dispatcher(topology)
        expert_map.regroup(placement, topology, self.mesh.ep.rank)
        self.expert_load.regroup(placement.num_slots)
        self.model.regroup(dispatcher)

    def _agree_kv_tokens(self, local_ranks: int) -> int:
        """Tokens of the KV cache: the least that any rank can hold, so that all schedule alike."""
        mine = self.plan.kv_tokens(devices.free_memory(self.device, local_ranks))
        return min(tokens for (tokens,) in self.mesh.world.all_gather_ints([mine]))

    def _agree_max_seq_len(self) -> int:
        """The longest sequence: the plan's, or all that the cache holds where the settings leave it open."""
        wanted = self.plan.config.max_seq_len
        if wanted is not None and wanted > self.kv_tokens:
            raise ValueError(
                f"max_seq_len = {wanted}: the KV cache of a rank holds {self.kv_tokens} tokens; lower max_seq_len "
                "or give the cache more (kv_cache_config)"
            )
        return min(self.plan.max_seq_len, self.kv_tokens)

    def new_scheduler(self) -> Scheduler:
        config = self.plan.config
        pool = PagePool(
            self.kv_tokens // self.page_size, self.page_size, config.kv_cache_config.enable_block_reuse
        )
        return Scheduler(
            pool,
            max_batch_size=config.max_batch_size,
            max_num_tokens=config.max_num_tokens,
            max_seq_len=self.max_seq_len,
            enable_chunked_prefill=config.enable_chunked_prefill,
            eos_token_ids=self.plan.eos_token_ids,
            vocab_size=self.plan.spec.vocab_size,
        )

    def new_migrator(self) -> Migrator | None:
        """None for a model without experts."""
        model = self.model
        if model.expert_map is None:
            return None
        slots_per_rank = model.expert_map.topology.slots_per_rank
        return Migrator(
            self.mesh,
            model.expert_map,
            [experts.slot_tensors() for experts in model.expert_weights],
            lambda: ExchangeMover(self.mesh.ep, slots_per_rank),
        )

    def run(
        self, scheduled: ScheduledBatch, agreed: Agreed
    ) -> tuple[list[StepResult], np.ndarray[tuple[int, ...], np.dtype[np.int16]] | None]:
        """The results of one step, one a chunk, and the routed experts [T, L, K] when wanted."""
        rows = agreed.rows_per_rank[self.mesh.stage.rank] * self.mesh.tp.size
        batch = make_batch(scheduled, self.page_size, rows, agreed.rows_per_rank, self.device)
        try:
            result = self.model.forward(batch, self.kv_cache)
        except RankLost:
            if self.expert_load is not None and self.device.type == "cpu":
                self.expert_load.drop_step()  # counted when it is run again
            raise
        experts = None if result.experts is None else result.experts.cpu().numpy()
        return sample(result.logits, scheduled), experts


def progress_bar(name: str, shown: bool) -> tqdm[NoReturn]:
    """A bar of bytes, on a terminal only."""
    tqdm.set_lock(
        threading.RLock()
    )  # its own lock is a semaphore of the system that a killed rank would leave
    return tqdm(unit="B", unit_scale=True, desc=name, disable=None if shown else True)


def _show(bar: tqdm[NoReturn], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
