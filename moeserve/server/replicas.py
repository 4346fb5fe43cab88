"""Which data-parallel replica takes the next sequence. Pure: knows neither sockets nor text."""

from __future__ import annotations

# Few sequences run to their max_tokens, which is often "all that is left": count no more than this ahead.
HORIZON = 512


class ReplicaLoads:
    """Tokens and sequences in flight on each replica, by the front-end's own book-keeping.

    A sequence weighs its prompt plus what it may still generate (at most HORIZON). A step is as long as the
    busiest replica's, so the next sequence goes where the tokens are fewest; equal tokens, where the
    sequences are fewest; equal again, to the one that was longest without. balance=False deals them in turn.
    """

    def __init__(self, num_replicas: int, *, balance: bool = True) -> None:
        self.tokens = [0] * num_replicas
        self.sequences = [0] * num_replicas
        self._last = [-1] * num_replicas
        self._turn = 0
        self._balance = balance
        self.serving = list(range(num_replicas))

    def add(self, prompt_tokens: int, max_tokens: int) -> tuple[int, int]:
        """(replica chosen, weight to give back to remove)."""
        weight = prompt_tokens + min(max_tokens, HORIZON)
        if self._balance:
            replica = min(self.serving, key=lambda r: (self.tokens[r], self.sequences[r], self._last[r]))
        else:
            replica = self.serving[self._turn % len(self.serving)]
        self._last[replica] = self._turn
        self._turn += 1
        self.tokens[replica] += weight
        self.sequences[replica] += 1
        return replica, weight

    def lose(self, replica: int) -> None:
        """Give it nothing any more."""
        self.serving.remove(replica)

    def remove(self, replica: int, weight: int) -> None:
        self.tokens[replica] -= weight
        self.sequences[replica] -= 1
        assert self.tokens[replica] >= 0 and self.sequences[replica] >= 0

    @property
    def balance(self) -> float:
        """Mean over maximum of the tokens in flight: 1.0 is even (and idle)."""
        tokens = [self.tokens[replica] for replica in self.serving]
        busiest = max(tokens)
        return sum(tokens) / (len(tokens) * busiest) if busiest else 1.0
