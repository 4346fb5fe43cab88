"""The best placement of a small layer, by mixed-integer programming: the yardstick of the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from moeserve.eplb.policies.problem import Problem
from moeserve.eplb.types import Floats, Ints

MOST_VARIABLES = 6000
_SECONDS = 60.0


def exact(problem: Problem) -> Ints:
    """slots [L, P] of least max rank load for the summed load, replicas sharing evenly, none twice on a rank.

    ValueError where the program would be too large (experts * replicas * ranks) or finds nothing in a minute.
    """
    load = problem.windows.sum(axis=0)
    return np.stack([_solve_layer(problem, row) for row in load])


def _solve_layer(problem: Problem, load: Floats) -> Ints:
    # imported here: scipy takes longer than all else that the command line imports
    from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
    from scipy.sparse import coo_array  # type: ignore[import-untyped]

    experts, ranks = problem.num_experts, problem.topology.num_ranks
    slots, per_rank = problem.topology.num_slots, problem.topology.slots_per_rank
    most = min(ranks, slots - (experts - 1) * problem.least)
    copies = np.arange(problem.least, most + 1)
    # z[e, c, g] = 1: expert e has copies[c] replicas and one of them on rank g; y[e, c]: it has so many; theta
    num_z, num_y = experts * len(copies) * ranks, experts * len(copies)
    if num_z > MOST_VARIABLES or not len(copies) or problem.least > ranks:
        raise ValueError(
            f"policy exact is for small layers: {experts} experts with up to {most} replicas on {ranks} ranks make "
            f"{num_z} variables, {MOST_VARIABLES} at most; use robust"
        )
    if slots > experts * ranks:
        raise ValueError(f"num_slots = {slots} is more than every expert once on every rank; give fewer")
    z = np.arange(num_z).reshape(experts, len(copies), ranks)
    y = num_z + np.arange(num_y).reshape(experts, len(copies))
    theta = num_z + num_y
    mean = load.sum() / ranks
    scaled = load / mean if mean > 0 else np.full(experts, ranks / experts)

    rows: list[tuple[list[int], list[float], float, float]] = []
    for e in range(experts):
        rows.append((y[e].tolist(), [1.0] * len(copies), 1, 1))
        for c, number in enumerate(copies):
            rows.append(([*z[e, c].tolist(), int(y[e, c])], [1.0] * ranks + [-float(number)], 0, 0))
    for g in range(ranks):
        here = z[:, :, g].ravel()
        rows.append((here.tolist(), [1.0] * len(here), per_rank, per_rank))
        weight = (scaled[:, None] / copies[None, :]).ravel()
        rows.append(([*here.tolist(), theta], [*weight.tolist(), -1.0], -np.inf, 0))
    index = [
        (r, col, value)
        for r, (cols, values, _, _) in enumerate(rows)
        for col, value in zip(cols, values, strict=True)
    ]
    at, columns, values = (np.array(part) for part in zip(*index, strict=True))
    matrix = coo_array(
        (values, (at.astype(np.int32), columns.astype(np.int32))), shape=(len(rows), theta + 1)
    )
    limits = LinearConstraint(matrix.tocsr(), [row[2] for row in rows], [row[3] for row in rows])
    upper = np.ones(theta + 1)
    upper[theta] = np.inf
    lower = np.zeros(theta + 1)
    lower[theta] = 1.0
    cost = np.zeros(theta + 1)
    cost[theta] = 1.0
    whole = np.ones(theta + 1)
    whole[theta] = 0
    with _stdout_to_stderr():
        found = milp(
            cost,
            integrality=whole,
            bounds=Bounds(lower, upper),
            constraints=limits,
            options={"time_limit": _SECONDS},
        )
    if found.x is None or found.status != 0:
        raise ValueError(f"policy exact could not prove a best placement within {_SECONDS:.0f} s; use robust")
    chosen = found.x[:num_z].reshape(experts, len(copies), ranks).sum(axis=1) > 0.5
    return np.concatenate([np.flatnonzero(chosen[:, g]) for g in range(ranks)]).astype(np.int32)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """The MILP library now and then prints to file descriptor 1, where the placement may be going."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
