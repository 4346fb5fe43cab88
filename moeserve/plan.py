"""Settles everything that is open in the settings, against the model and the machine, before a rank starts.

"auto" is resolved here, once, into an EnginePlan; what cannot be honoured stops here with the setting's name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from moeserve.comm.all_to_all import FALLBACK
from moeserve.comm.all_to_all.one_sided.dispatcher import RowSizes, window_config
from moeserve.comm.all_to_all.one_sided.layout import EpLayout
from moeserve.comm.layout import ParallelLayout
from moeserve.config import AttentionDPConfig, EngineConfig, LoadBalancerConfig, OnlineConfig
from moeserve.device import free_memory
from moeserve.eplb.formats.placement import read_placement
from moeserve.eplb.types import Placement, Topology
from moeserve.models import memory
from moeserve.models.registry import read_spec
from moeserve.models.sharding import check_layout
from moeserve.models.spec import ModelSpec

GIB = 1024**3
PREFIX = "moe_config.load_balancer"
RANKS_PER_CORE = 16  # local CPU ranks beyond this only wait for one another


@dataclass(frozen=True)
class EnginePlan:
    """What the ranks are told: the settings with nothing left open.

    placement and num_slots are None for a model without experts. all_to_all: local, one_sided, exchange or gather;
    ranks of several hosts take exchange instead of a one_sided that nobody asked for.
    eos_token_ids are the tokenizer's: filled in by who starts ranks, as a plan alone needs no tokenizer.
    """

    config: EngineConfig
    spec: ModelSpec
    layout: ParallelLayout
    device: str
    dtype: str
    num_slots: int | None
    placement: Placement | None
    all_to_all: str
    max_seq_len: int
    eos_token_ids: tuple[int, ...] = ()

    @property
    def model_name(self) -> str:
        return model_name(self.config)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def backend(self) -> str:
        return "nccl" if self.device == "cuda" else "gloo"

    def dispatch_sizes(self) -> RowSizes:
        """What a rank brings to one dispatch at most: its rows and those of its expert tensor-parallel group."""
        moe = self.spec.moe
        assert moe is not None
        rows = -(-self.config.max_num_tokens // self.layout.tp) * self.layout.etp
        return RowSizes(rows, self.spec.hidden_size, moe.routing.top_k, self.torch_dtype)

    def weight_bytes(self) -> memory.WeightBytes:
        """What a rank's weights take, by part, and a token of its KV cache."""
        return memory.weight_bytes(self.spec, self.layout, self.num_slots, self.torch_dtype)

    def kv_tokens(self, free_bytes: int) -> int:
        """Tokens that the KV cache of a rank holds, given what is free there once the weights are loaded.

        On a CPU, where memory belongs to everyone, never more than max_batch_size sequences can use.
        Raises ValueError when the cache cannot hold a page, or not what kv_cache_config.max_tokens asks for.
        """
        cache = self.config.kv_cache_config
        page = cache.tokens_per_block
        fitting = int(free_bytes * cache.free_gpu_memory_fraction) // self.weight_bytes().kv_bytes_per_token
        if cache.max_tokens is not None:
            tokens = cache.max_tokens
            if tokens > fitting:
                raise ValueError(
                    f"kv_cache_config.max_tokens = {tokens}: free_gpu_memory_fraction = "
                    f"{cache.free_gpu_memory_fraction:g} of {max(0, free_bytes) / GIB:.2f} GiB free holds "
                    f"{max(0, fitting)}; lower it or leave it out"
                )
        else:
            tokens = fitting
            if self.device == "cpu":
                pages = -(-self.max_seq_len // page)  # a sequence shares its last page with nobody
                tokens = min(tokens, self.config.max_batch_size * pages * page)
        if tokens < page:
            raise ValueError(
                f"kv_cache_config: the cache holds {max(tokens, 0)} tokens, less than a page of {page} "
                f"({free_bytes / GIB:.2f} GiB free): free memory or lower kv_cache_config.tokens_per_block"
            )
        return tokens // page * page


def model_name(config: EngineConfig) -> str:
    """What the model is called in the API and in the balancer's files."""
    return config.served_model_name or Path(config.model).resolve().name


def make_plan(config: EngineConfig) -> EnginePlan:
    """Everything settled for `config`. Raises ValueError naming the setting, its value and what would do."""
    spec = read_spec(Path(config.model))
    layout = plan_layout(config, spec)
    device = plan_device(config, layout)
    balancer = config.moe_config.load_balancer
    num_slots, placement = plan_placement(balancer, spec, layout, model_name(config))
    if placement is not None:
        check_rank_loss(balancer, layout, placement, device)
    max_seq_len = config.max_seq_len or spec.max_positions
    if max_seq_len > spec.max_positions:
        raise ValueError(
            f"max_seq_len = {max_seq_len}: the model knows {spec.max_positions} positions at most"
        )
    kv_tokens = config.kv_cache_config.max_tokens
    if config.max_seq_len is not None and kv_tokens is not None and config.max_seq_len > kv_tokens:
        raise ValueError(
            f"max_seq_len = {max_seq_len}: kv_cache_config.max_tokens = {kv_tokens} holds no such sequence; "
            "raise it or leave one of them out"
        )
    return EnginePlan(
        config=config,
        spec=spec,
        layout=layout,
        device=device,
        dtype=plan_dtype(config, spec, device),
        num_slots=num_slots,
        placement=placement,
        all_to_all=plan_all_to_all(config, spec, layout, device),
        max_seq_len=max_seq_len,
    )


def plan_layout(config: EngineConfig, spec: ModelSpec) -> ParallelLayout:
    """The ranks' groups; product of moe_tp and moe_ep = tensor_parallel_size, as in TensorRT-LLM."""
    size = config.tensor_parallel_size
    for name in ("pipeline_parallel_size", "context_parallel_size"):
        if (value := getattr(config, name)) != 1:
            raise ValueError(f"{name} = {value}: this version runs one only; use tensor_parallel_size")
    attention_tp = config.attention_tensor_parallel_size
    if not config.enable_attention_dp:
        if attention_tp not in (None, size):
            raise ValueError(
                f"attention_tensor_parallel_size = {attention_tp}: without enable_attention_dp it can only be "
                f"tensor_parallel_size = {size}; set enable_attention_dp or leave it out"
            )
        if config.attention_dp_config != AttentionDPConfig():
            raise ValueError("attention_dp_config: has no effect without enable_attention_dp; leave it out")
        attention_tp = size
    attention_tp = attention_tp or 1
    if size % attention_tp:
        raise ValueError(
            f"attention_tensor_parallel_size = {attention_tp}: must divide tensor_parallel_size = {size}"
        )
    moe_tp = plan_moe_tp(config, spec)
    layout = ParallelLayout(dp=size // attention_tp, tp=attention_tp, etp=moe_tp)
    check_layout(spec, layout)
    return layout


def plan_moe_tp(config: EngineConfig, spec: ModelSpec) -> int:
    """Ranks that share one expert; whatever of moe_tp and moe_ep is left out follows from the other."""
    size, moe_tp, moe_ep = (
        config.tensor_parallel_size,
        config.moe_tensor_parallel_size,
        config.moe_expert_parallel_size,
    )
    if spec.moe is None:
        for name, value in (("moe_tensor_parallel_size", moe_tp), ("moe_expert_parallel_size", moe_ep)):
            if value not in (None, 1):
                raise ValueError(f"{name} = {value}: {spec.architecture} has no experts; leave it out")
        return 1
    if moe_tp is None and moe_ep is None:
        return 1
    for name, value in (("moe_tensor_parallel_size", moe_tp), ("moe_expert_parallel_size", moe_ep)):
        if value is not None and size % value:
            raise ValueError(f"{name} = {value}: must divide tensor_parallel_size = {size}")
    if moe_tp is not None and moe_ep is not None and moe_tp * moe_ep != size:
        raise ValueError(
            f"moe_tensor_parallel_size = {moe_tp} times moe_expert_parallel_size = {moe_ep} must equal "
            f"tensor_parallel_size = {size}; leave one of them out to have it derived"
        )
    return moe_tp if moe_tp is not None else size // (moe_ep or 1)


def plan_device(config: EngineConfig, layout: ParallelLayout) -> str:
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ValueError("device = cuda: this machine has no usable CUDA device; use auto or cpu")
    return "cuda" if has_cuda and config.device != "cpu" else "cpu"


def check_local_ranks(plan: EnginePlan, local_ranks: int) -> None:
    """Raise ValueError when this host is asked to hold more ranks than makes sense."""
    if plan.device == "cuda":
        most = torch.cuda.device_count()
        what = f"{most} GPUs"
    else:
        cores = len(os.sched_getaffinity(0))
        most = cores * RANKS_PER_CORE
        what = f"{cores} cores, enough for {most} ranks at most"
    if local_ranks > most:
        raise ValueError(
            f"tensor_parallel_size = {local_ranks}: this host has {what}; use fewer ranks or start them on "
            "several hosts with torchrun or Slurm"
        )


def plan_dtype(config: EngineConfig, spec: ModelSpec, device: str) -> str:
    if config.dtype != "auto":
        return config.dtype
    if device == "cpu":
        return "float32"
    return "float32" if spec.dtype == "float32" else "bfloat16"


def plan_all_to_all(config: EngineConfig, spec: ModelSpec, layout: ParallelLayout, device: str) -> str:
    wanted = config.moe_config.all_to_all
    if spec.moe is None or layout.ep == 1:
        if wanted != "auto":
            raise ValueError(
                f"moe_config.all_to_all = {wanted}: there are no experts on several expert-parallel ranks that "
                "would exchange tokens; leave it out"
            )
        return "local"
    if wanted == "auto":  # nobody has measured it between GPUs yet
        return "one_sided" if device == "cpu" else "exchange"
    return wanted


def plan_placement(
    balancer: LoadBalancerConfig, spec: ModelSpec, layout: ParallelLayout, model_name: str
) -> tuple[int | None, Placement | None]:
    """Slots over all ranks and the expert in each; slots default to the experts, rounded up to a multiple of ep."""
    if spec.moe is None:
        if balancer != LoadBalancerConfig():
            raise ValueError(f"{PREFIX}: {spec.architecture} has no experts to place; leave it out")
        return None, None
    if balancer.placement is not None and balancer.initial_global_assignments is not None:
        raise ValueError(f"{PREFIX}: give placement or initial_global_assignments, not both")
    experts, ep = spec.moe.num_experts, layout.ep
    placement = _given_placement(balancer, spec, ep, model_name)
    num_slots = balancer.num_slots
    if num_slots is None:
        num_slots = placement.num_slots if placement is not None else -(-experts // ep) * ep
    if num_slots < experts or num_slots % ep:
        least = -(-max(num_slots, experts) // ep) * ep
        raise ValueError(
            f"{PREFIX}.num_slots = {num_slots}: must be at least {experts} (the experts) and a multiple of "
            f"{ep} (the expert-parallel groups), such as {least}"
        )
    if placement is None:
        placement = Placement.identity(len(spec.moe_layers), experts, num_slots)
    elif placement.num_slots != num_slots:
        raise ValueError(f"{PREFIX}.num_slots = {num_slots}: the placement has {placement.num_slots} slots")
    topology = Topology.of(ep, num_slots)
    placement.check(topology)
    check_online(balancer, placement, topology)
    if balancer.online.routing == "even":
        placement = Placement(placement.slot_to_expert, experts, placement.generation)
    return num_slots, placement


def check_online(balancer: LoadBalancerConfig, placement: Placement, topology: Topology) -> None:
    """Raise ValueError for settings of online balancing that these slots and ranks cannot honour."""
    online, given = balancer.online, f"{PREFIX}.layer_updates_per_iter = {balancer.layer_updates_per_iter}"
    if not balancer.layer_updates_per_iter:
        defaults = OnlineConfig(routing=online.routing)
        for name in (spec.name for spec in fields(online)):
            if (value := getattr(online, name)) != getattr(defaults, name):
                raise ValueError(
                    f"{PREFIX}.online.{name} = {value}: has no effect while layer_updates_per_iter = 0; set that to "
                    "1 or more, or leave this out"
                )
        return
    if topology.num_ranks == 1:
        raise ValueError(
            f"{given}: one expert-parallel rank holds all experts, there is nothing to balance; raise "
            "moe_expert_parallel_size or set 0"
        )
    moves, redundant = online.max_moves_per_layer, topology.num_slots - placement.num_experts
    if online.policy != "auto" and moves != OnlineConfig().max_moves_per_layer:
        raise ValueError(
            f"{PREFIX}.online.max_moves_per_layer = {moves}: policy = {online.policy} solves from scratch and may "
            "change every slot; use policy auto or leave this out"
        )
    if moves == 0 and (redundant == 0 or online.routing != "shares"):
        lost = f"num_slots = {topology.num_slots}" if redundant == 0 else f"routing = {online.routing}"
        raise ValueError(
            f"{PREFIX}.online.max_moves_per_layer = 0: with {lost} there are no shares to change either; "
            "allow a move or set layer_updates_per_iter = 0"
        )
    if online.survive_rank_loss and not placement.survives_rank_loss(topology):
        wanted = -(-2 * placement.num_experts // topology.num_ranks) * topology.num_ranks
        what = f"num_slots = {wanted}" if topology.num_slots < wanted else "a placement without that"
        raise ValueError(
            f"{PREFIX}.online.survive_rank_loss = True: the placement at start keeps some experts on one rank only; "
            f"give {what}"
        )


def check_rank_loss(
    balancer: LoadBalancerConfig, layout: ParallelLayout, placement: Placement, device: str
) -> None:
    """Raise ValueError where on_rank_loss = shrink is asked for and a lost rank would take something with it."""
    if balancer.on_rank_loss != "shrink":
        return
    given = f"{PREFIX}.on_rank_loss = shrink"
    if device != "cpu":
        raise ValueError(f"{given}: ranks with GPUs cannot go on without one in this version; use fail")
    if layout.tp > 1 or layout.etp > 1 or layout.dp == 1:
        raise ValueError(
            f"{given}: a rank can only be spared where each has an attention replica and whole experts of its own; "
            "set enable_attention_dp with attention_tensor_parallel_size = 1 and moe_tensor_parallel_size = 1, "
            "on 2 ranks or more, or use fail"
        )
    topology = Topology.of(layout.ep, placement.num_slots)
    if not placement.survives_rank_loss(topology):
        wanted = -(-2 * placement.num_experts // topology.num_ranks) * topology.num_ranks
        what = (
            f"num_slots = {wanted}" if topology.num_slots < wanted else "one solved with --survive-rank-loss"
        )
        raise ValueError(
            f"{given}: the placement at start keeps some experts on one rank only; give {what}, or use fail"
        )
    if balancer.layer_updates_per_iter and not balancer.online.survive_rank_loss:
        raise ValueError(
            f"{given}: online balancing would move experts to one rank only; set {PREFIX}.online.survive_rank_loss, "
            "or use fail"
        )


def _given_placement(
    balancer: LoadBalancerConfig, spec: ModelSpec, ep: int, model_name: str
) -> Placement | None:
    assert spec.moe is not None
    if balancer.placement is not None:
        return read_placement(
            balancer.placement,
            ep_size=ep,
            num_experts=spec.moe.num_experts,
            layers=spec.moe_layers,
            model=model_name,
        ).placement
    assignments = balancer.initial_global_assignments
    if assignments is None:
        return None
    name = "moe_config.load_balancer.initial_global_assignments"
    if sorted(assignments) != list(spec.moe_layers):
        raise ValueError(
            f"{name} has layers {_short(sorted(assignments))}, the model's MoE layers are "
            f"{_short(spec.moe_layers)}"
        )
    rows = [assignments[layer] for layer in spec.moe_layers]
    for layer, row in zip(spec.moe_layers, rows, strict=True):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{name}[{layer}] has {len(row)} slots, layer {spec.moe_layers[0]} {len(rows[0])}"
            )
    try:
        return Placement(np.array(rows, dtype=np.int64), spec.moe.num_experts)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _short(numbers: Sequence[int]) -> str:
    numbers = list(numbers)
    return str(numbers) if len(numbers) <= 8 else f"[{numbers[0]}, ..., {numbers[-1]}] ({len(numbers)})"


def describe(plan: EnginePlan, memory_bytes: int | None = None) -> str:
    """The plan as aligned lines: layout, placement, memory a rank. memory_bytes: of a rank, before weights."""
    layout, config = plan.layout, plan.config
    sizes = plan.weight_bytes()
    if memory_bytes is None:
        memory_bytes = free_memory(torch.device(plan.device), layout.world_size)
    lines = {
        "model": f"{plan.model_name} ({plan.spec.architecture}, {len(plan.spec.layers)} layers)",
        "device, dtype": f"{plan.device}, {plan.dtype}",
        "ranks": f"{layout.world_size}",
        "attention": f"{layout.dp} replicas of {layout.tp} ranks (dp {layout.dp}, tp {layout.tp})",
    }
    if plan.placement is not None and plan.num_slots is not None and plan.spec.moe is not None:
        redundant = plan.num_slots - plan.spec.moe.num_experts
        lines |= {
            "experts": f"ep {layout.ep}, moe tp {layout.etp}, all-to-all {_all_to_all(plan)}",
            "slots": f"{plan.num_slots} for {plan.spec.moe.num_experts} experts ({redundant} redundant), "
            f"{plan.num_slots // layout.ep} a rank, in {len(plan.spec.moe_layers)} MoE layers",
            "placement": f"generation {plan.placement.generation}, digest {plan.placement.digest[:16]}",
            "balancing": describe_balancing(plan.config.moe_config.load_balancer, redundant),
        }
    if config.moe_config.load_balancer.on_rank_loss == "shrink":
        lines["rank loss"] = "the others go on while every expert lives"
    for part in ("embedding", "attention", "dense", "router", "experts", "shared", "norms", "weights"):
        lines[f"memory: {part}"] = f"{getattr(sizes, part) / GIB:10.4f} GiB a rank"
    lines["KV cache"] = f"{sizes.kv_bytes_per_token} bytes a token; " + _capacity(
        plan, memory_bytes, sizes.weights
    )
    lines["limits"] = (
        f"{plan.max_seq_len} tokens a sequence, {config.max_batch_size} sequences and "
        f"{config.max_num_tokens} tokens a step on a replica"
    )
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def describe_balancing(balancer: LoadBalancerConfig, redundant: int) -> str:
    """What happens to the placement while the engine serves, in words."""
    online, steps = balancer.online, balancer.layer_updates_per_iter
    if not steps:
        return f"the placement stays; routing {online.routing}"
    moves = f"up to {online.max_moves_per_layer} moves a layer" if online.policy == "auto" else "any moves"
    text = (
        f"online: windows of {online.window_steps} steps, policy {online.policy}, {moves}, {steps} layers a step, "
        f"routing {online.routing}"
    )
    if not redundant:
        text += "; no redundant slot: experts can only change places, and no expert's tokens can be split"
    return text


def _all_to_all(plan: EnginePlan) -> str:
    """The transport's name, and the shared memory that it takes of a rank."""
    if plan.all_to_all != "one_sided" or plan.num_slots is None or plan.device != "cpu":
        return plan.all_to_all
    ranks = plan.layout.ep
    nbytes = EpLayout(window_config(ranks, plan.num_slots // ranks, plan.dispatch_sizes())).nbytes
    several_hosts = f" ({FALLBACK} between hosts)" if plan.config.moe_config.all_to_all == "auto" else ""
    return f"one_sided{several_hosts}, {nbytes / 1024**2:.1f} MiB of shared memory a rank at most"


def _capacity(plan: EnginePlan, memory_bytes: int, weights: int) -> str:
    try:
        tokens = plan.kv_tokens(memory_bytes - weights)
    except ValueError as error:
        return f"does not fit: {error}"
    return f"{tokens} tokens a rank in {memory_bytes / GIB:.1f} GiB with the weights"
