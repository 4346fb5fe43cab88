"""What every expert all-to-all offers: rows go to the ranks that hold their slots, and come back summed.

Speaks of ranks, rows and slots only; slot // slots_per_rank is a rank of the expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """A result under way; `wait` is called once and gives it."""

    def wait(self) -> T_co: ...


@dataclass(frozen=True)
class Done:
    """A result that is already there."""

    value: Any

    def wait(self) -> Any:
        return self.value


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived at this rank, grouped by local slot.

    rows: [N, H], ordered by local slot and inside a slot by (source rank, token, choice).
    tokens_per_slot: int64 [S] rows of each local slot, on rows' device; sums to N.
    handle: what the dispatcher needs to send the results back; opaque to callers.
    """

    rows: Tensor
    tokens_per_slot: Tensor
    handle: Any


class TokenDispatcher(Protocol):
    """Moves tokens to the slots chosen for them and the experts' results back.

    Every rank of the group calls dispatch and combine in the same order, with zero tokens too.
    """

    def begin_step(self, rows_per_rank: Sequence[int]) -> None:
        """Rows that each rank of the group, in its order, gives to each dispatch until the next begin_step.

        Called on every rank before the first dispatch of a step. Only `gather` needs the numbers.
        """
        ...

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> Pending[Dispatched]:
        """x [T, H]; slots int64 [T, K], -1 sends nothing; weights float32 [T, K].

        The same H, K and dtype on every rank, with zero tokens too. x may be reused once wait returned.
        """
        ...

    def combine(self, y: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        """y [N, H] in the order of dispatched.rows -> [T, H] in x's dtype.

        A token's result is the sum over its choices, in top-k order, of weight * row, accumulated in float32:
        the same bits whatever arrives first and whichever transport carried it.
        """
        ...
