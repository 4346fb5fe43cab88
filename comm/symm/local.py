"""The blocks of virtual ranks: one allocation of this process, cut into R parts."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.comm.symm.heap import ALIGNMENT


def allocate(world: int, nbytes: int, device: torch.device) -> list[Tensor]:
    """`world` zeroed blocks of at least nbytes. The pages of a CPU's come into being as they are written."""
    stride = -(-nbytes // ALIGNMENT) * ALIGNMENT
    whole = torch.zeros(world * stride + ALIGNMENT, dtype=torch.uint8, device=device)
    first = -whole.data_ptr() % ALIGNMENT
    return list(whole[first : first + world * stride].view(world, stride).unbind())
