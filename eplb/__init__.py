"""The expert load balancer: numpy in, placements out. Never imports torch."""

from __future__ import annotations

from moeserve.eplb.solver import explain, solve
from moeserve.eplb.types import MigrationPlan, Move, Placement, RoutingTable, Topology

__all__ = ["MigrationPlan", "Move", "Placement", "RoutingTable", "Topology", "explain", "solve"]
