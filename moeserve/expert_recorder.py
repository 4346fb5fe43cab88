"""Keeps what the ranks count on disk while the engine runs, in a thread: no request waits for the disk."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path

from moeserve.eplb.formats.stats import stats_document
from moeserve.eplb.types import Placement
from moeserve.expert_balance import ExpertBalance
from moeserve.stats.snapshot import PAUSE_SECONDS, LoadWindow
from moeserve.stats.trace import TraceWriter

log = logging.getLogger(__name__)
MAX_WAITING = 256
"""Reports that wait for a slow disk, 0.25 MB each at 58 layers of 256 experts; more are left out of the record."""


class ExpertRecorder:
    """Writes the reports of an ExpertBalance to a folder until close. A disk that fails ends the record, not the
    engine."""

    def __init__(self, balance: ExpertBalance, folder: Path, writer: TraceWriter | None = None) -> None:
        """Raises ValueError where the folder cannot be written."""
        try:
            self._writer = writer or TraceWriter(folder)
        except OSError as error:
            raise ValueError(
                f"record_stats = {str(folder)!r}: {error.strerror}; name a folder that can be written"
            ) from None
        self._balance = balance
        self._settled = balance.placement
        self._queue: queue.Queue[tuple[Placement, int, LoadWindow] | None] = queue.Queue(MAX_WAITING)
        self._left_out = 0
        self._thread = threading.Thread(target=self._write, name="expert-recorder", daemon=True)
        self._thread.start()
        balance.listeners.append(self._listen)

    def _listen(self, rank: int, report: LoadWindow) -> None:
        if not any(report.tokens) or not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait((self._placement(), rank, report))
        except queue.Full:
            self._left_out += 1
            if self._left_out.bit_count() == 1:  # the 1st, 2nd, 4th, ...
                log.warning(
                    "the disk is too slow for the record of the expert load: %d reports are not in it",
                    self._left_out,
                )

    def _placement(self) -> Placement:
        """In force; while layers change one by one, the one before."""
        if self._balance.state != "migrating":
            self._settled = self._balance.placement
        return self._settled

    def close(self) -> None:
        """What was counted is on the disk afterwards."""
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=PAUSE_SECONDS)
                break
            except queue.Full:
                continue
        self._thread.join()

    def _write(self) -> None:
        try:
            self._carry()
            self._writer.close()
        except OSError as error:
            log.error("the record of the expert load ends here: %s", error)

    def _carry(self) -> None:
        placement: Placement | None = None
        while True:
            try:
                item = self._queue.get(timeout=PAUSE_SECONDS)
            except queue.Empty:
                self._writer.flush()  # no traffic: nothing is kept from the disk
                continue
            if item is None:
                return
            under, rank, report = item
            if placement is None or placement.digest != under.digest:
                placement = under
                # a file has one placement
                self._writer.begin(stats_document(self._balance.load_of([report], placement)))
            self._writer.add(rank, report)
