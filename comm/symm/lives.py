"""Which processes of this host still run, by file descriptors that cannot come to mean another process."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Sequence

from moeserve.comm import shared


def host_number() -> int | None:
    """The same in processes that see one another by pid, another elsewhere; None where a sandbox hides it."""
    try:
        return shared.host_identity()
    except OSError:
        return None


class Lives:
    """Watches processes that run at this moment."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._descriptors: list[int] = []
        self._polls: list[select.poll | None] = []
        for pid in pids:
            poll = None  # of a process that is gone already
            with contextlib.suppress(ProcessLookupError):
                self._descriptors.append(os.pidfd_open(pid))
                poll = select.poll()
                poll.register(self._descriptors[-1], select.POLLIN)
            self._polls.append(poll)

    def is_alive(self, number: int) -> bool:
        """Whether the process of that place in `pids` runs; a stopped one does."""
        poll = self._polls[number]
        return poll is not None and not poll.poll(0)

    def close(self) -> None:
        descriptors, self._descriptors = self._descriptors, []
        self._polls = [None] * len(self._polls)
        for descriptor in descriptors:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()
