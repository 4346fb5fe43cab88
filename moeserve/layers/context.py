"""What every layer is given when it is made, and how it says which parts of a checkpoint it wants."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeserve.comm.mesh import Mesh
from moeserve.ops.memory import WeightMemory
from moeserve.ops.table import Ops


@dataclass(frozen=True)
class LayerContext:
    """The groups, the ops and the kind of memory of one rank's layers."""

    mesh: Mesh
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    memory: WeightMemory = field(default_factory=WeightMemory)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a weight; its contents come from a checkpoint."""
        if self.device.type == "cpu":
            return self.memory.empty(shape, dtype or self.dtype)
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


@dataclass(frozen=True)
class Piece:
    """A part of a checkpoint's tensor and the weights that hold a copy of it.

    name: the tensor in the checkpoint; shape: its whole shape there; cut: the part that is read, one slice or
    index a dim; targets: views of the part's shape. Without targets the tensor belongs to other ranks only.
    """

    name: str
    shape: tuple[int, ...]
    cut: tuple[slice | int, ...] = ()
    targets: tuple[Tensor, ...] = ()


def share(total: int, rank: int, size: int) -> slice:
    """The rank's part when `total` rows or columns are cut evenly; size divides total."""
    assert total % size == 0, f"{total} not divisible by {size}"
    length = total // size
    return slice(rank * length, (rank + 1) * length)
