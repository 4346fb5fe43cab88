"""Muon on matrices, Adam on embeddings, router and norms; float32 masters of a bfloat16 model.

Muon: momentum orthogonalised by five Newton-Schulz steps (Keller Jordan, https://kellerjordan.github.io/posts/muon).
torch.optim.Muon takes matrices only; the experts are stacks of matrices, each orthogonalised for itself.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

MUON_RATE, MUON_MOMENTUM = 0.02, 0.95
ADAM_RATE, ADAM_BETAS = 6e-3, (0.9, 0.97)
WEIGHT_DECAY = 0.05


class MuonAdam:
    """Steps `model`'s parameters; `state_dict` holds masters and moments by parameter name."""

    def __init__(self, model: nn.Module) -> None:
        self.params = dict(model.named_parameters())
        self.steps = 0
        self.master = {name: p.detach().float().clone() for name, p in self.params.items()}
        self.first = {name: torch.zeros_like(w) for name, w in self.master.items()}
        self.second = {n: torch.zeros_like(w) for n, w in self.master.items() if not _is_muon(n)}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "master": self.master, "first": self.first, "second": self.second}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.master, self.first, self.second = state["master"], state["first"], state["second"]
        self._publish()

    @torch.no_grad()
    def step(self, schedule: float) -> None:
        """One step at `schedule` times the base rates; gradients clipped to norm 1 and cleared."""
        self.steps += 1
        grads = {name: p.grad.float() for name, p in self.params.items() if p.grad is not None}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        clip = min(1.0, 1.0 / (norm + 1e-6))
        for name, grad in grads.items():
            grad.mul_(clip)
            if _is_muon(name):
                self._muon(name, grad, MUON_RATE * schedule)
            else:
                self._adam(name, grad, ADAM_RATE * schedule * (0.5 if ".gate." in name else 1.0))
        self._publish()

    def _muon(self, name: str, grad: Tensor, rate: float) -> None:
        weight, momentum = self.master[name], self.first[name]
        momentum.mul_(MUON_MOMENTUM).add_(grad)
        update = grad + MUON_MOMENTUM * momentum
        rows, columns = weight.shape[-2:]
        if name.endswith("gate_up"):  # two matrices, gate and up, under one roof
            update, rows = update.unflatten(1, (2, rows // 2)), rows // 2
        direction = orthogonalise(update).reshape(weight.shape)
        weight.mul_(1 - rate * WEIGHT_DECAY).add_(direction, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _adam(self, name: str, grad: Tensor, rate: float) -> None:
        weight, first, second = self.master[name], self.first[name], self.second[name]
        beta1, beta2 = ADAM_BETAS
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad.square(), 1 - beta2)
        if ".gate." in name:
            weight.mul_(1 - rate * WEIGHT_DECAY)
        scale = (second / (1 - beta2**self.steps)).sqrt_().add_(1e-8)
        weight.addcdiv_(first, scale, value=-rate / (1 - beta1**self.steps))

    @torch.no_grad()
    def _publish(self) -> None:
        for name, p in self.params.items():
            p.copy_(self.master[name])
            p.grad = None


def _is_muon(name: str) -> bool:
    return not ("embed_tokens" in name or ".gate." in name or "norm" in name)


def orthogonalise(update: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly, of each matrix in `update` [..., M, N], in float32."""
    x = update.flatten(0, -3) if update.ndim > 2 else update.unsqueeze(0)
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    for _ in range(5):
        a = torch.bmm(x, x.mT)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if tall else x).float().reshape(update.shape)
