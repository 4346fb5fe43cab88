"""A 64-bit checksum of bytes in their order, added up part by part on their device. Knows no slot and no wire."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Word i counts times ODD + i * STEP. ODD multipliers show every change of one word; two words that changed places
# show unless 2^64 divides (difference of the words) * (difference of their numbers) * STEP, whose factors hold at
# most 31 + 31 + 1 twos.
_ODD = 0x1E3779B97F4A7C15
_STEP = 0x3F58476D1CE4E5BA  # 2 mod 4
_BLOCK_WORDS = {"cpu": 1 << 16, "cuda": 1 << 20}  # what fits a cache; what is worth a launch


class Checksum:
    """Of a stream of 32-bit words, fed in order. Nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._count = 0
        self._plain = torch.zeros((), dtype=torch.int64, device=device)  # sum of the words
        self._numbered = torch.zeros((), dtype=torch.int64, device=device)  # each times its number

    def add(self, part: Tensor) -> None:
        """part: uint8 [n], contiguous; n and its place in its storage are multiples of 4."""
        positions = _positions(self._device)
        words, most = part.view(torch.int32), len(positions)
        for start in range(0, len(words), most):
            wide = words[start : start + most].to(torch.int64)
            total = wide.sum()
            wide *= positions[: len(wide)]
            self._plain += total
            self._numbered.add_(wide.sum()).add_(total, alpha=self._count)
            self._count += len(wide)

    @property
    def value(self) -> Tensor:
        """int64 [] on the device."""
        return self._plain * _signed(_ODD) + self._numbered * _signed(_STEP)


def _signed(number: int) -> int:
    """Modulo 2^64, as an int64 holds it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


@cache
def _positions(device: torch.device) -> Tensor:
    return torch.arange(_BLOCK_WORDS[device.type], device=device)
