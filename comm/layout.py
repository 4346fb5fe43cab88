"""How the ranks of a job are cut into parallel groups. Pure arithmetic: knows no tensor and no process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel axes; world = pp * dp * cp * tp, ranks numbered with tp innermost.

    pp: pipeline stages; dp: attention replicas; cp: context; tp: ranks that share one attention replica;
    etp: ranks that share the weights of one expert (innermost, so it stays inside a node).
    The experts of a stage are spread over ep = dp * cp * tp / etp groups of etp ranks each.

    Raises ValueError when a size is below 1 or etp does not divide the ranks of a stage.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "cp", "tp", "etp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.stage_size % self.etp:
            raise ValueError(f"etp = {self.etp}: must divide the {self.stage_size} ranks of a stage")

    @property
    def stage_size(self) -> int:
        return self.dp * self.cp * self.tp

    @property
    def world_size(self) -> int:
        return self.pp * self.stage_size

    @property
    def ep(self) -> int:
        return self.stage_size // self.etp

    def group_ranks(self, axis: str, rank: int) -> tuple[int, ...]:
        """Global ranks, ascending, of the group of `axis` that `rank` belongs to.

        axis: one of pp, dp, cp, tp (the ranks that differ only in that coordinate), ep and etp (the two
        coordinates of a rank within its stage when experts are concerned), stage and world.
        """
        stage, inside = divmod(rank, self.stage_size)
        first = stage * self.stage_size
        if axis == "world":
            return tuple(range(self.world_size))
        if axis == "stage":
            return tuple(range(first, first + self.stage_size))
        if axis == "etp":
            start = first + inside - inside % self.etp
            return tuple(range(start, start + self.etp))
        if axis == "ep":
            return tuple(range(first + inside % self.etp, first + self.stage_size, self.etp))
        if axis == "pp":
            return tuple(range(inside, self.world_size, self.stage_size))
        strides = {"dp": (self.cp * self.tp, self.dp), "cp": (self.tp, self.cp), "tp": (1, self.tp)}
        stride, size = strides[axis]
        coordinate = inside // stride % size
        return tuple(rank + (i - coordinate) * stride for i in range(size))
