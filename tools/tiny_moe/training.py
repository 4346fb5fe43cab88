"""The training loop: batches of mixed domains, learning-rate schedule, fading balance, limits and resume."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tiny_moe.model import TinyMoE
from tiny_moe.optimizer import MuonAdam

MIXTURE = {"prose": 0.30, "python": 0.20, "docs": 0.15, "scripture": 0.12, "spanish": 0.12, "c": 0.11}
CHAT_SHARE = 0.15
LENGTHS, LENGTH_SHARES = (256, 512, 1024), (0.65, 0.30, 0.05)
WARM_UP_STEPS, HOLD_UNTIL, LAST_RATE = 40, 0.45, 0.03
BIAS_RATE, BIAS_UNTIL = 0.01, 0.6
SECONDS_BETWEEN_SAVES = 120


@dataclass(frozen=True)
class Limits:
    """Training ends at whichever comes first; the schedules follow the nearer one."""

    tokens: float
    minutes: float
    batch_tokens: int = 4096


class Training:
    """A model under training with all that a resumed run needs; `train` runs it to its limits."""

    def __init__(
        self, model: TinyMoE, streams: dict[str, NDArray[np.uint16]], limits: Limits, seed: int
    ) -> None:
        self.model, self.streams, self.limits = model, streams, limits
        self.optimizer = MuonAdam(model)
        for p in model.parameters():  # buffers stay float32: rotary tables and correction bias
            p.data = p.data.bfloat16()
        self.rng = np.random.default_rng(seed)
        self.tokens, self.seconds = 0, 0.0
        shares = {name: MIXTURE[name] for name in streams if name != "chat"}
        total = sum(shares.values()) / (1 - CHAT_SHARE)
        self.shares = {name: share / total for name, share in shares.items()} | {"chat": CHAT_SHARE}

    def weights(self) -> dict[str, Tensor]:
        """Float32 masters and correction biases, by the model's names."""
        return self.optimizer.master | {
            name: b for name, b in self.model.named_buffers() if name.endswith("e_score_correction_bias")
        }

    def save(self, path: Path) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "biases": [block.gate.e_score_correction_bias for block in self.model.moe_blocks],
            "rng": self.rng.bit_generator.state,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        for block, bias in zip(self.model.moe_blocks, state["biases"], strict=True):
            block.gate.e_score_correction_bias.copy_(bias)
        self.rng.bit_generator.state = state["rng"]
        self.tokens, self.seconds = state["tokens"], state["seconds"]

    def train(self, state_file: Path) -> None:
        """Runs to the limits and shows progress; saves every two minutes and at the end, however it ends."""
        bar = tqdm(total=int(self.limits.tokens), initial=self.tokens, unit="tok", unit_scale=True)
        saved_at = time.monotonic()
        average = 0.0
        try:
            for loss, size in self._steps():
                average = loss if average == 0 else 0.97 * average + 0.03 * loss
                bar.update(size)
                bar.set_postfix(step=self.optimizer.steps, loss=f"{average:.3f}", skew=self._batch_skew())
                if time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES:
                    self.save(state_file)
                    saved_at = time.monotonic()
        finally:
            bar.close()
            self.save(state_file)

    def _steps(self) -> Iterator[tuple[float, int]]:
        while (done := self._done()) < 1:
            started = time.monotonic()
            x, y = self._batch()
            loss = F.cross_entropy(self.model(x).float().flatten(0, 1), y.flatten())
            loss.backward()
            self.optimizer.step(_rate(self.optimizer.steps + 1, done))
            self._balance(done)
            self.tokens += x.numel()
            self.seconds += time.monotonic() - started
            yield loss.item(), x.numel()

    def _done(self) -> float:
        return max(self.tokens / self.limits.tokens, self.seconds / 60 / self.limits.minutes)

    def _batch(self) -> tuple[Tensor, Tensor]:  # ids and targets, each [B, T]
        length = min(int(self.rng.choice(LENGTHS, p=LENGTH_SHARES)), self.limits.batch_tokens)
        names = self.rng.choice(
            list(self.shares), self.limits.batch_tokens // length, p=list(self.shares.values())
        )
        rows: list[NDArray[np.uint16]] = []
        for name in names:
            stream = self.streams[str(name)]
            start = int(self.rng.integers(0, len(stream) - length))
            rows.append(stream[start : start + length + 1])
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    @torch.no_grad()
    def _balance(self, done: float) -> None:
        """Moves each correction bias towards even load on the mixed batch; the rate fades out, so that no
        expert dies and yet each domain keeps its own. An auxiliary loss would remove that skew."""
        if done >= BIAS_UNTIL:
            return
        rate = BIAS_RATE * min(1.0, 2 * (1 - done / BIAS_UNTIL))
        for block in self.model.moe_blocks:
            load = block.tokens_per_expert.float()
            bias = block.gate.e_score_correction_bias
            bias.add_(rate * torch.sign(load.mean() - load))
            bias.sub_(bias.mean())

    def _batch_skew(self) -> str:
        """Hottest expert over mean in the last batch, mean over layers."""
        load = torch.stack([block.tokens_per_expert for block in self.model.moe_blocks]).float()
        return f"{float((load.amax(1) / load.mean(1)).mean()):.1f}"


def _rate(step: int, done: float) -> float:
    """Warm-up, hold, then linear down to the last rate."""
    decay = 1.0 if done < HOLD_UNTIL else max(LAST_RATE, 1 - (done - HOLD_UNTIL) / (1 - HOLD_UNTIL))
    return min(1.0, step / WARM_UP_STEPS) * decay
