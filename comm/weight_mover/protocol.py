"""What every weight mover offers: experts travel from slot to slot into staging, and are put into force at once.

Speaks of ranks, slots and tensors only; slot // slots_per_rank is a rank of the mover's group. Whoever drives it
agrees with the other ranks on when to commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TransferError(Exception):
    """What this rank was to receive cannot be completed. The slots are untouched; abandon comes next, on all ranks."""


class WrongChecksum(TransferError):
    """The bytes that arrived are not those that were sent. source_slot: where they came from."""

    def __init__(self, source_slot: int, target_slots: Sequence[int]) -> None:
        targets = ", ".join(map(str, target_slots))
        super().__init__(f"slot {source_slot} to {targets}: the bytes that arrived have another checksum")
        self.source_slot = source_slot
        self.target_slots = tuple(target_slots)


class WeightMover(Protocol):
    """One set of moves at a time: begin, advance once a step until all ranks are done, then commit or abandon.

    Every rank of the group calls the same methods in the same steps with the same arguments (tensors aside). From
    begin to commit the slots are only read, so the rank goes on serving from them.
    """

    def begin(self, tensors: Sequence[Tensor], moves: Sequence[tuple[int, int]]) -> None:
        """tensors: all that an expert consists of, each [slots of this rank, ...], contiguous, the same shapes and
        dtypes on every rank. moves: (source slot, target slot), numbered over all ranks; no target twice. All
        sources are read as they stand before commit, so slots may be swapped or follow one another in a circle.
        Raises TransferError when there is no memory for staging: then no rank may advance.
        """
        ...

    def advance(self, max_bytes: int) -> bool:
        """Carry on, sending and receiving at most max_bytes (8 or more) together -> True when everything that this
        rank receives is staged and its checksum is right. Afterwards it may be called again, since others may need
        it. Raises TransferError when that cannot be.
        """
        ...

    def commit(self) -> None:
        """Write what is staged into its slots, in the order of the device's stream; once all ranks are done."""
        ...

    def abandon(self) -> None:
        """Forget the moves; the slots are as they were. Also allowed when nothing is under way."""
        ...
