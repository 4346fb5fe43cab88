"""The kernels of kernels.c, compiled on first use, or their plain forms where there is no compiler.

Both give the same bits; EPLB_NATIVE=0 asks for the plain ones. The library is kept in the user's cache folder
under a name made from the source, the flags and the machine, so that a compiler runs once. A file there is never
written again: other processes may run from it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moeserve.eplb import plain
from moeserve.eplb.plain import LANES, Options
from moeserve.eplb.types import Floats, Ints, count_replicas

Singles = npt.NDArray[np.float32]

# No contraction of multiply and add, no reordering: the bits are those of the plain forms.
_FLAGS = ["-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

# Read with this module, not when first needed: kernels.c may have been replaced by then, and these calls not.
_SOURCE = Path(__file__).with_name("kernels.c").read_bytes()

_loading = threading.Lock()

logger = logging.getLogger(__name__)


class Kernels(Protocol):
    """Letters as in kernels.c. Slots are slot-major, [N, K, G]."""

    name: str

    def prepare(self, windows: Floats, ranks: int) -> tuple[Singles, Floats, Floats]:
        """(load [N, E, T], mean [N, E], std [N, E]) of windows [T, N, E], with a mean rank load of 1."""

    def replicate(self, weight: Singles, ranks: int, slots: int, least: int) -> Ints:
        """Replica counts [N, E] for weight [N, E], `least` each and `slots` in all."""

    def place(self, load: Singles, count: Ints, order: Ints, ranks: int, z: float, connect: bool) -> Ints:
        """slots [N, K, G] for load [N, E, T], the experts taken in order [N, E]."""

    def components(self, slots: Ints, count: Ints) -> int:
        """Components of the graph of ranks joined by a shared expert, for one layer's slots [K, G], count [E]."""

    def improve(self, load: Singles, count: Ints, slots: Ints, node: Ints, options: Options) -> Ints:
        """Changes count and slots in place; slots written [N]."""

    def anneal(
        self,
        load: Singles,
        count: Ints,
        slots: Ints,
        node: Ints,
        beta: float,
        steps: int,
        connect: bool,
        least: int,
        seed: int,
    ) -> None:
        """Changes count [N, E] and slots in place."""

    def explore(
        self,
        load: Singles,
        count: Ints,
        slots: Ints,
        node: Ints,
        least: int,
        tries: int,
        open_from: float,
        seed: int,
    ) -> None:
        """Changes count [N, E] and slots [N, K, G] in place; load [N, E, T], node [G]."""

    def follow(
        self,
        load: Singles,
        count: Ints,
        slots: Ints,
        least: int,
        budget: int,
        target: float,
        least_gain: float,
    ) -> Singles:
        """Changes count [N, E] and slots [N, K, G] in place; imbalance [N]. load [N, E, T], T 64 at most."""

    def fill(
        self,
        load: Floats,
        slots: Ints,
        rank_of: Ints,
        share: Floats,
        sweeps: int,
        omega: float,
    ) -> Floats:
        """Changes share [N, B, P] in place for B sets of loads [N, B, E] over slots [N, P] of rank rank_of [P];
        returns the load of each rank [N, B, G]."""


def kernels() -> Kernels:
    """The compiled kernels, or the plain ones when they are asked for or nothing can compile."""
    if os.environ.get("EPLB_NATIVE") == "0":
        return Plain()
    library = _library()
    return Plain() if library is None else Native(library)


class Plain:
    name = "plain"
    prepare = staticmethod(plain.prepare)
    replicate = staticmethod(plain.replicate)
    place = staticmethod(plain.place)
    components = staticmethod(plain.components)
    improve = staticmethod(plain.improve)
    anneal = staticmethod(plain.anneal)
    explore = staticmethod(plain.explore)
    follow = staticmethod(plain.follow)
    fill = staticmethod(plain.fill)


class _Options(ctypes.Structure):
    _fields_ = [
        ("beta", ctypes.c_float),
        ("least_gain", ctypes.c_float),
        ("rounds", ctypes.c_int32),
        ("patience", ctypes.c_int32),
        ("budget", ctypes.c_int32),
        ("connect", ctypes.c_int32),
        ("reassign", ctypes.c_int32),
        ("least", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Native:
    """Calls from several threads are safe: the kernels have no state, and run without the interpreter's lock."""

    library: ctypes.CDLL
    name = "native"

    def prepare(self, windows: Floats, ranks: int) -> tuple[Singles, Floats, Floats]:
        windows = np.ascontiguousarray(windows, np.float64)
        steps, layers, experts = windows.shape
        load = np.empty((layers, experts, steps), np.float32)
        mean, std = np.empty((layers, experts)), np.empty((layers, experts))
        self.library.eplb_prepare(steps, layers, experts, ranks, _at(windows), _at(load), _at(mean), _at(std))
        return load, mean, std

    def replicate(self, weight: Singles, ranks: int, slots: int, least: int) -> Ints:
        weight = np.ascontiguousarray(weight, np.float32)
        layers, experts = weight.shape
        count = np.empty((layers, experts), np.int32)
        self.library.eplb_replicate(layers, experts, ranks, slots, least, _at(weight), _at(count))
        return count

    def place(self, load: Singles, count: Ints, order: Ints, ranks: int, z: float, connect: bool) -> Ints:
        load, order = np.ascontiguousarray(load, np.float32), np.ascontiguousarray(order, np.int32)
        layers, experts, windows = load.shape
        per_rank = int(count[0].sum()) // ranks
        slots = np.empty((layers, per_rank, ranks), np.int32)
        self.library.eplb_place(
            layers, experts, windows, ranks, per_rank, _at(load), _at(count), _at(order),
            ctypes.c_float(z), int(connect), _at(slots),
        )  # fmt: skip
        return slots

    def components(self, slots: Ints, count: Ints) -> int:
        slots, count = np.ascontiguousarray(slots, np.int32), np.ascontiguousarray(count, np.int32)
        found = self.library.eplb_components(
            len(count), slots.shape[1], slots.shape[0], _at(slots), _at(count)
        )
        return int(found)

    def improve(self, load: Singles, count: Ints, slots: Ints, node: Ints, options: Options) -> Ints:
        load = np.ascontiguousarray(load, np.float32)
        layers, experts, windows = load.shape
        _check(slots, layers, experts, count)
        changed = np.zeros(layers, np.int32)
        self.library.eplb_improve(
            layers, experts, windows, slots.shape[2], slots.shape[1], _at(load), _at(count), _at(slots),
            _at(np.ascontiguousarray(node, np.int32)), ctypes.byref(_Options(*options)), _at(changed),
        )  # fmt: skip
        return changed

    def anneal(
        self,
        load: Singles,
        count: Ints,
        slots: Ints,
        node: Ints,
        beta: float,
        steps: int,
        connect: bool,
        least: int,
        seed: int,
    ) -> None:
        load, node = np.ascontiguousarray(load, np.float32), np.ascontiguousarray(node, np.int32)
        layers, experts, windows = load.shape
        _check(slots, layers, experts, count)
        self.library.eplb_anneal(
            layers, experts, windows, slots.shape[2], slots.shape[1], _at(load), _at(count), _at(slots),
            _at(node), ctypes.c_float(beta), steps, int(connect), least, seed,
        )  # fmt: skip

    def explore(
        self,
        load: Singles,
        count: Ints,
        slots: Ints,
        node: Ints,
        least: int,
        tries: int,
        open_from: float,
        seed: int,
    ) -> None:
        load, node = np.ascontiguousarray(load, np.float32), np.ascontiguousarray(node, np.int32)
        layers, experts, windows = load.shape
        _check(slots, layers, experts, count)
        self.library.eplb_explore(
            layers, experts, windows, slots.shape[2], slots.shape[1], _at(load), _at(count), _at(slots),
            _at(node), least, tries, ctypes.c_float(open_from), seed,
        )  # fmt: skip

    def follow(
        self,
        load: Singles,
        count: Ints,
        slots: Ints,
        least: int,
        budget: int,
        target: float,
        least_gain: float,
    ) -> Singles:
        load = np.ascontiguousarray(load, np.float32)
        layers, experts, windows = load.shape
        _check(slots, layers, experts, count)
        assert windows <= LANES
        score = np.empty(layers, np.float32)
        self.library.eplb_follow(
            layers, experts, windows, slots.shape[2], slots.shape[1], _at(load), _at(count), _at(slots), least,
            budget, ctypes.c_float(target), ctypes.c_float(least_gain), _at(score),
        )  # fmt: skip
        return score

    def fill(
        self,
        load: Floats,
        slots: Ints,
        rank_of: Ints,
        share: Floats,
        sweeps: int,
        omega: float,
    ) -> Floats:
        load = np.ascontiguousarray(load, np.float64)
        layers, sets, experts = load.shape
        num_ranks = int(rank_of.max()) + 1
        ranks = np.empty((layers, sets, num_ranks))
        slots, rank_of = np.ascontiguousarray(slots, np.int32), np.ascontiguousarray(rank_of, np.int32)
        _check(slots, layers, experts)
        assert share.flags.writeable and share.dtype == np.float64
        assert share.shape == (layers, sets, slots.shape[1])
        assert rank_of.shape == slots.shape[1:] and rank_of.min() >= 0
        self.library.eplb_fill(
            layers, sets, experts, num_ranks, slots.shape[1], _at(load), _at(slots), _at(rank_of),
            sweeps, ctypes.c_double(omega), _at(share), _at(ranks),
        )  # fmt: skip
        return ranks


def _at(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    pointer = ctypes.c_void_p(array.ctypes.data)
    pointer.array = array  # type: ignore[attr-defined]  # lives as long as the call
    return pointer


def _check(slots: Ints, layers: int, experts: int, *counts: Ints) -> None:
    """What the kernels take on trust: they index by these. counts: of the replicas in slots."""
    assert slots.dtype == np.int32 and len(slots) == layers
    assert slots.min(initial=0) >= 0 and slots.max(initial=0) < experts
    for count in counts:
        assert count.dtype == np.int32 and slots.flags.writeable and count.flags.writeable
        assert (count == count_replicas(slots.reshape(layers, -1), experts)).all()


def _library() -> ctypes.CDLL | None:
    with _loading:
        return _load()


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    for flags in ([*_FLAGS, "-march=native"], _FLAGS):
        key = hashlib.sha256(repr((_SOURCE, flags, _machine())).encode()).hexdigest()[:16]
        for folder in _folders():
            target = folder / f"eplb-{key}.so"
            try:
                if not target.exists():
                    if compiler is None:
                        continue
                    _compile(compiler, flags, target)
                return ctypes.CDLL(str(target))
            except (OSError, subprocess.SubprocessError) as error:
                logger.debug("kernels.c with %s in %s: %s", flags[-1], folder, error)
    logger.info("no C compiler that works: the solvers run in numpy, much slower")
    return None


def _compile(compiler: str, flags: list[str], target: Path) -> None:
    """Into a temporary name, then renamed: processes that start at once do not see half a library."""
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *flags, "-o", name, "-x", "c", "-", "-lm"]
        subprocess.run(command, input=_SOURCE, check=True, capture_output=True, timeout=120)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _folders() -> Iterator[Path]:
    """Where the library may stand: folders of this user that nobody else writes to, made if need be."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (Path(cache) / "moeserve", Path(tempfile.gettempdir()) / f"moeserve-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = folder.lstat()
        except OSError as error:
            logger.debug("%s: %s", folder, error)
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            yield folder


def _machine() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        lines = {
            line
            for line in text.splitlines()
            if line.startswith(("model name", "flags", "Features", "CPU part"))
        }
        return platform.machine() + "".join(sorted(lines))
    except OSError:
        return platform.machine() + platform.processor()
