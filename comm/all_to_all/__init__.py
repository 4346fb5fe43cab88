"""Expert all-to-all: ways to carry rows to the ranks of their slots, all with the same bits as result."""

from __future__ import annotations

import logging

import torch

from moeserve.comm.all_to_all.exchange import ExchangeDispatcher
from moeserve.comm.all_to_all.gather import GatherDispatcher
from moeserve.comm.all_to_all.local import LocalDispatcher
from moeserve.comm.all_to_all.one_sided import native
from moeserve.comm.all_to_all.one_sided.dispatcher import OneSidedDispatcher, RowSizes
from moeserve.comm.all_to_all.one_sided.gpu_dispatcher import GpuDispatcher
from moeserve.comm.all_to_all.protocol import TokenDispatcher
from moeserve.comm.group import Group
from moeserve.comm.symm import HeapUnavailable

NAMES = ("exchange", "gather", "one_sided")
FALLBACK = "exchange"
"""What works on every device and between any hosts."""

logger = logging.getLogger(__name__)


def make_dispatcher(
    name: str,
    group: Group,
    slots_per_rank: int,
    sizes: RowSizes | None = None,
    *,
    fall_back: bool = False,
    device: torch.device | None = None,
) -> TokenDispatcher:
    """The dispatcher called `name` over `group`; on a group of one any name gives the local one.

    sizes: of what it will carry; left out, one-sided memory is made in the first dispatch. fall_back: takes FALLBACK,
    with a log line, where `name` is not to be had, or would be slower for want of a compiler. device: of the rows; the
    CPU if left out. One-sided memory of GPUs needs sizes.

    Raises ValueError for a name that is not in NAMES, and where the ranks share no memory for one_sided.
    """
    if name not in NAMES:
        raise ValueError(f"all_to_all = {name!r}: must be one of {', '.join(NAMES)}")
    if group.size == 1:
        return LocalDispatcher(slots_per_rank)
    if name == "one_sided":
        try:
            if device is not None and device.type == "cuda":
                assert sizes is not None, "one-sided memory of GPUs is made before the first dispatch"
                return GpuDispatcher(group, slots_per_rank, sizes, device)
            if fall_back and not all(ready for (ready,) in group.all_gather_ints([native.available()])):
                raise HeapUnavailable("no C compiler that works on every rank")
            return OneSidedDispatcher(group, slots_per_rank, sizes)
        except HeapUnavailable as error:
            if not fall_back:
                raise ValueError(f"all_to_all = one_sided: {error}; use {FALLBACK} or gather") from error
            if group.rank == 0:
                logger.info("all_to_all = %s instead of one_sided: %s", FALLBACK, error)
            name = FALLBACK
    if name == "gather":
        return GatherDispatcher(group, slots_per_rank)
    return ExchangeDispatcher(group, slots_per_rank)
