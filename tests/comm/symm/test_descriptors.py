"""Descriptors handed between ranks: the right ones, and from nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from moeserve.comm.symm import descriptors
from moeserve.comm.symm.descriptors import exchange_descriptors

STRANGER = """
import os, socket, struct, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sender:
    sender.connect(chr(0) + sys.argv[1])
    socket.send_fds(sender, [struct.pack("=i", 1)], [os.open("/dev/null", os.O_RDONLY)])
"""


class Other:
    """Rank 1 of two, played by this very process before rank 0 goes on; and who else `before` lets in."""

    rank, size, ranks = 0, 2, (0, 1)

    def __init__(self, file: int, strange: bool, silent: bool = False) -> None:
        self._file, self._strange, self._silent = file, strange, silent

        self._address = ""

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        if not self._address:  # the secrets
            self._address = descriptors._address(os.getpid(), values[0])
        else:  # all listen
            if self._strange:
                subprocess.run([sys.executable, "-c", STRANGER, self._address[1:]], check=True)
            if not self._silent:
                descriptors._send(self._address, 1, self._file)
        return [list(values), list(values)]  # what rank 0 sends to rank 1 comes back to it, and is refused


def same_file(first: int, second: int) -> bool:
    return os.path.sameopenfile(first, second)


@pytest.mark.parametrize("strange", [False, True])
def test_only_the_ranks_are_listened_to(strange: bool) -> None:
    mine, theirs = os.memfd_create("mine"), os.memfd_create("theirs")
    pids = [os.getpid()] * 2
    received = exchange_descriptors(Other(theirs, strange), pids, mine)
    assert received[0] == -1 and same_file(received[1], theirs)
    for descriptor in (mine, theirs, received[1]):
        os.close(descriptor)


def test_a_silent_rank_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(descriptors, "_send", lambda *arguments: None)
    before = len(os.listdir("/proc/self/fd"))
    control: Any = Other(0, strange=False, silent=True)
    with pytest.raises(OSError, match="timed out"):
        exchange_descriptors(control, [os.getpid()] * 2, 0)
    assert len(os.listdir("/proc/self/fd")) == before
