"""Memory of the same size on every rank of a group, which all of them can read and write."""

from __future__ import annotations

from moeserve.comm.symm.heap import Control, HeapUnavailable, SymmHeap, local_heaps

__all__ = ["Control", "HeapUnavailable", "SymmHeap", "local_heaps"]
