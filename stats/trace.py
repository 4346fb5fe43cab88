"""Keeps a growing record of expert load on disk: files in stats.json's own format that survive a killed process.

Knows nothing of placements: the head of a file is what the caller gives, a window is a line that is written whole.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moeserve.stats.snapshot import PAUSE_SECONDS, PHASES, LoadWindow

PREFIX = "expert-load-"
GROWING = ".json.part"
WINDOW_SECONDS = 10.0
"""Of traffic in a window: what a killed process loses at most."""
WINDOWS_PER_FILE = 360
"""Then a file is packed and the next one begun: an hour of steady traffic."""
MAX_BYTES = 4 << 30
"""All files of a folder together; the oldest go first. A week of 58 layers of 256 experts."""


class TraceWriter:
    """One writer of a folder. Not for several threads at once. OSError where the folder cannot be written.

    The file that grows is NAME.json.part: a line with the head, then a line for each window. Full, it becomes
    NAME.json.gz by a rename, and so does what a killed process left behind.
    """

    def __init__(
        self,
        folder: Path,
        *,
        window_seconds: float = WINDOW_SECONDS,
        windows_per_file: int = WINDOWS_PER_FILE,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._folder = folder
        self._window_seconds = window_seconds
        self._windows_per_file = windows_per_file
        self._max_bytes = max_bytes
        self._head: dict[str, Any] | None = None
        self._file: int | None = None
        self._path = folder
        self._written = 0
        self._open: LoadWindow | None = None
        self._seen: set[int] = set()  # ranks that have reported since the last one that had done so before
        folder.mkdir(parents=True, exist_ok=True)
        for left in sorted(folder.glob(f"{PREFIX}*{GROWING}")):
            _finish(left)

    def begin(self, head: Mapping[str, Any]) -> None:
        """What holds for the windows to come: stats.json's keys but for the windows. Ends the file before."""
        self.flush()
        self._end_file()
        self._head = dict(head)

    def add(self, rank: int, report: LoadWindow) -> None:
        """What one rank has counted; begin must have been called. A window ends where a rank reports again, so that
        all ranks have as many reports in it."""
        whole = rank in self._seen
        if whole:
            self._seen.clear()
        if self._open is not None and (
            (whole and self._open.end - self._open.start >= self._window_seconds)
            or report.end - self._open.end > PAUSE_SECONDS
        ):
            self.flush()
        self._seen.add(rank)
        self._open = report if self._open is None else self._open + report

    def flush(self) -> None:
        """Ends the open window and puts it on the disk."""
        window, self._open = self._open, None
        self._seen.clear()
        if window is None:
            return
        if self._file is None:
            self._begin_file(window.start)
        assert self._file is not None
        lines = ["," * bool(self._written or i) + line for i, line in enumerate(window_lines(window))]
        self._written += len(lines)
        _write(self._file, "".join(line + "\n" for line in lines).encode())
        os.fdatasync(self._file)
        if self._written >= self._windows_per_file:
            self._end_file()

    def close(self) -> None:
        self.flush()
        self._end_file()

    def _begin_file(self, start: float) -> None:
        assert self._head is not None
        stamp = datetime.fromtimestamp(start, timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        for number in range(10_000):
            self._path = self._folder / f"{PREFIX}{stamp}-{number:04d}{GROWING}"
            if list(self._folder.glob(f"{PREFIX}{stamp}-{number:04d}.json*")):
                continue
            try:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
                break
            except FileExistsError:
                continue
        assert self._file is not None
        fcntl.flock(self._file, fcntl.LOCK_EX)  # it lives: another writer of the folder leaves it alone
        head = json.dumps(self._head)
        _write(self._file, f'{head[:-1]}, "windows": [\n'.encode())
        self._written = 0

    def _end_file(self) -> None:
        if self._file is None:
            return
        _pack(self._path)
        os.close(self._file)
        self._file = None
        _drop_oldest(self._folder, self._max_bytes)


def window_lines(window: LoadWindow) -> list[str]:
    """Each phase that had tokens as an entry of stats.json's windows."""
    begun = datetime.fromtimestamp(window.start, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = []
    for phase, load, tokens in zip(PHASES, window.load, window.tokens, strict=True):
        if tokens:
            about = {
                "phase": phase,
                "start_step": window.start_step,
                "steps": window.steps,
                "tokens": tokens,
                "start_time": begun,
                "load": load.tolist(),
            }
            lines.append(json.dumps(about, separators=(",", ":")))
    return lines


def whole_lines(data: bytes) -> bytes:
    """The stats.json that a growing file is so far: what was written whole, with its end."""
    return data[: data.rfind(b"\n") + 1] + b"]}\n"


def _finish(path: Path) -> None:
    """Packs what a killed writer left; a file that has a living writer stays."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _pack(path)


def _pack(path: Path) -> None:
    data = path.read_bytes()
    if data.count(b"\n") > 1:  # else there is no window
        target = path.with_name(path.name.removesuffix(GROWING) + ".json.gz")
        packed = path.with_name(f".{target.name}")
        with open(packed, "wb") as file:
            file.write(gzip.compress(whole_lines(data), 6, mtime=0))
            file.flush()
            os.fsync(file.fileno())
        os.replace(packed, target)
    path.unlink()


def _drop_oldest(folder: Path, max_bytes: int) -> None:
    files = sorted(folder.glob(f"{PREFIX}*.json.gz"))
    total = sum(file.stat().st_size for file in files)
    for file in files[:-1]:
        if total <= max_bytes:
            return
        total -= file.stat().st_size
        file.unlink()


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
