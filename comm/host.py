"""The meeting of the ranks of one host in a shared-memory segment. Knows no axis and no message."""

from __future__ import annotations

import logging
import os

from moeserve.comm import shared
from moeserve.comm.group import Group
from moeserve.comm.shared import SharedPairs

logger = logging.getLogger(__name__)


def share_host(world: Group, timeout: float) -> SharedPairs | None:
    """Rings between this rank and the others of its host; None where there are none to share with or no way to.

    Every rank of world calls it; the ranks of a host all get rings or none does. Nothing is left behind when the
    ranks end, whichever way: the segment has no name, and the others open it through its first owner's /proc.
    """
    host = shared.host_identity() if shared.supported else -1 - world.rank
    table = world.all_gather_ints([host, os.getpid()])
    members = [i for i, (other, _) in enumerate(table) if other == host]
    pids = [table[i][1] for i in members]
    leads = members[0] == world.rank and len(members) > 1
    own = shared.create_segment(len(members)) if leads else -1
    lead_descriptor = world.all_gather_ints([own])[members[0]][0]
    rings = None
    if lead_descriptor >= 0:
        try:
            descriptor = os.open(f"/proc/{pids[0]}/fd/{lead_descriptor}", os.O_RDWR)
            try:
                rings = SharedPairs(
                    descriptor, [world.ranks[i] for i in members], world.ranks[world.rank], pids, timeout
                )
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.info("no shared memory with rank %d: %s", world.ranks[members[0]], error)
    joined = world.all_gather_ints([rings is not None])
    if own >= 0:
        os.close(own)
    return rings if all(joined[i][0] for i in members) else None
