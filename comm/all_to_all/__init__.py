"""Expert all-to-all: ways to carry rows to the ranks of their slots, all with the same bits as result."""

from __future__ import annotations

from collections.abc import Callable

from moeserve.comm.all_to_all.exchange import ExchangeDispatcher
from moeserve.comm.all_to_all.gather import GatherDispatcher
from moeserve.comm.all_to_all.local import LocalDispatcher
from moeserve.comm.all_to_all.one_sided.dispatcher import OneSidedDispatcher
from moeserve.comm.all_to_all.protocol import TokenDispatcher
from moeserve.comm.group import Group

DISPATCHERS: dict[str, Callable[[Group, int], TokenDispatcher]] = {
    "exchange": ExchangeDispatcher,
    "gather": GatherDispatcher,
    "one_sided": OneSidedDispatcher,
}


def make_dispatcher(name: str, group: Group, slots_per_rank: int) -> TokenDispatcher:
    """The dispatcher called `name` over `group`; on a group of one any name gives the local one.

    Raises ValueError for a name that is not in DISPATCHERS.
    """
    if name not in DISPATCHERS:
        raise ValueError(f"all_to_all = {name!r}: must be one of {', '.join(DISPATCHERS)}")
    return LocalDispatcher(slots_per_rank) if group.size == 1 else DISPATCHERS[name](group, slots_per_rank)
