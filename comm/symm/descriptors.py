"""Open files handed from each process of a host to all others. Knows not what they are.

For files that another process cannot open through /proc: memory of a GPU is no file that could be opened again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Sequence

from moeserve.comm.symm.heap import Control, agree

TIMEOUT_SECONDS = 30.0


def exchange_descriptors(control: Control, pids: Sequence[int], own: int) -> list[int]:
    """Our descriptor `own` goes to every rank -> theirs, by rank, new ones that the caller closes; -1 in our place.

    pids: of the ranks, all on this host. Every rank calls it. What comes from another process than these is not
    taken. Raises HeapUnavailable, on all ranks, where one cannot listen; OSError when a rank cannot be reached or is
    silent for TIMEOUT_SECONDS.
    """
    received = [-1] * control.size
    secrets_of = [row[0] for row in control.all_gather_ints([secrets.randbits(62)])]
    addresses = [_address(pid, secret) for pid, secret in zip(pids, secrets_of, strict=True)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        agree(control, _listen(listener, addresses[control.rank], control.size))
        try:
            for step in range(1, control.size):
                _send(addresses[(control.rank + step) % control.size], control.rank, own)
            end = time.monotonic() + TIMEOUT_SECONDS
            while received.count(-1) > 1:
                listener.settimeout(max(1e-3, end - time.monotonic()))
                connection, _ = listener.accept()
                with connection:
                    _take(connection, pids, received)
        except BaseException:
            for descriptor in received:
                if descriptor >= 0:
                    os.close(descriptor)
            raise
    return received


def _listen(listener: socket.socket, address: str, ranks: int) -> str:
    """-> what stood in the way."""
    try:
        listener.bind(address)
        listener.listen(ranks)
    except OSError as error:
        return f"cannot listen for files of other ranks: {error}"
    return ""


def _address(pid: int, secret: int) -> str:
    """A name that is no file: it goes with its socket."""
    return f"\0moeserve-heap-{pid}-{secret:x}"


def _send(address: str, rank: int, descriptor: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sender:
        sender.settimeout(TIMEOUT_SECONDS)
        sender.connect(address)
        socket.send_fds(sender, [struct.pack("=i", rank)], [descriptor])


def _take(connection: socket.socket, pids: Sequence[int], received: list[int]) -> None:
    connection.settimeout(TIMEOUT_SECONDS)
    pid = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    message, descriptors, _, _ = socket.recv_fds(connection, 4, 1)
    rank = struct.unpack("=i", message)[0] if len(message) == 4 else -1
    if len(descriptors) == 1 and 0 <= rank < len(pids) and pids[rank] == pid and received[rank] < 0:
        os.set_inheritable(descriptors[0], False)
        received[rank] = descriptors[0]
        return
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
