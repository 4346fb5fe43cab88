"""Held-out loss and expert load of each domain: how well it reads, how skewed its experts are."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tiny_moe.model import TinyMoE


@dataclass(frozen=True)
class DomainResult:
    loss: float  # nats a token
    load: NDArray[np.float64]  # [L, E], each layer's mean is 1
    tokens: int


@torch.no_grad()
def evaluate(
    model: TinyMoE, streams: dict[str, NDArray[np.uint16]], sequences: int, length: int = 256
) -> dict[str, DomainResult]:
    """At most `sequences` consecutive stretches of `length` tokens of each held-out stream."""
    results: dict[str, DomainResult] = {}
    for domain, stream in streams.items():
        count = min(sequences, (len(stream) - 1) // length)
        if count < 1:
            raise ValueError(f"held-out text of {domain} has {len(stream)} tokens; {length + 1} would do")
        inputs = torch.from_numpy(stream[: count * length].astype(np.int64)).view(count, length)
        targets = torch.from_numpy(stream[1 : count * length + 1].astype(np.int64)).view(count, length)
        loss, load = 0.0, torch.zeros(len(model.moe_blocks), model.config.n_routed_experts)
        for x, y in zip(inputs.split(8), targets.split(8), strict=True):
            logits = model(x).float()
            loss += float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
            load += torch.stack([block.tokens_per_expert for block in model.moe_blocks])
        share = (load / load.mean(1, keepdim=True)).double().numpy()
        results[domain] = DomainResult(loss / targets.numel(), share, targets.numel())
    return results


def rank_imbalance(load: NDArray[np.float64], num_ranks: int) -> float:
    """Max rank load over mean rank load, experts placed in order, mean over layers; `load` is [L, E]."""
    by_rank = load.reshape(len(load), num_ranks, -1).sum(-1)
    return float((by_rank.max(1) / by_rank.mean(1)).mean())


def table(results: dict[str, DomainResult]) -> str:
    """Markdown: a row a domain, and one for an even mixture of them all."""
    rows = ["| domain | tokens | loss, nats/token | hottest expert / mean | EP 4 max/mean | EP 8 max/mean |"]
    rows.append("|---|---|---|---|---|---|")
    for domain, r in results.items():
        rows.append(f"| {domain} | {r.tokens:,} | {r.loss:.2f} | {_skew(r.load)} |")
    mixed = np.mean([r.load for r in results.values()], axis=0)
    loss = float(np.mean([r.loss for r in results.values()]))
    rows.append(
        f"| even mixture | {sum(r.tokens for r in results.values()):,} | {loss:.2f} | {_skew(mixed)} |"
    )
    return "\n".join(rows)


def _skew(load: NDArray[np.float64]) -> str:
    hottest = float(load.max(1).mean())
    return f"{hottest:.2f} | {rank_imbalance(load, 4):.2f} | {rank_imbalance(load, 8):.2f}"
