"""The plain numpy form of kernels.c: the reference of its tests, and what runs where nothing can compile.

The same operations in the same order in the same precision, so the same bits. Letters as there: N layers, E
experts, T windows, G ranks, K slots a rank; slots slot-major.
"""

from __future__ import annotations

from moeserve.eplb.plain.anneal import anneal
from moeserve.eplb.plain.common import Options
from moeserve.eplb.plain.explore import explore
from moeserve.eplb.plain.fill import fill
from moeserve.eplb.plain.flow import LANES
from moeserve.eplb.plain.follow import follow
from moeserve.eplb.plain.improve import improve
from moeserve.eplb.plain.place import components, place, prepare, replicate

__all__ = [
    "LANES",
    "Options",
    "anneal",
    "components",
    "explore",
    "fill",
    "follow",
    "improve",
    "place",
    "prepare",
    "replicate",
]
