"""Which ranks serve after losses, and when those that are left may meet again. Pure: knows no socket and no request."""

from __future__ import annotations

from dataclasses import dataclass, field

MEETINGS_AGAIN = 3
"""Times in a row that ranks who could not meet are asked to meet again without another loss."""


@dataclass
class Membership:
    """Ranks by the numbers that they started with.

    ranks: that serve. lost: the others, in the order of their loss. number: of the group they are in, or are about
    to be; each meeting makes another.
    """

    ranks: list[int]
    lost: list[int] = field(default_factory=list)
    number: int = 0
    _waiting: set[int] = field(default_factory=set)
    _met: int = 0  # losses that the last meeting knew of
    _again: int = 0

    def lose(self, rank: int) -> None:
        self.ranks.remove(rank)
        self.lost.append(rank)
        self._waiting.discard(rank)

    def leave(self, rank: int) -> None:
        """A rank has left its group and waits to hear where to meet the others."""
        if rank in self.ranks:
            self._waiting.add(rank)

    def may_meet(self) -> bool:
        """Whether all that are left wait and the reason is known; they then count as on their way.

        Those who wait once more without another loss have not met: one of them was late for it.
        """
        if len(self._waiting) < len(self.ranks) or not self.lost:
            return False
        self._again = self._again + 1 if len(self.lost) == self._met else 0
        if self._again > MEETINGS_AGAIN:
            return False
        self._waiting.clear()
        self._met = len(self.lost)
        self.number += 1
        return True
