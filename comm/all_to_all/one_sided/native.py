"""The CPU engine's loops in C: engine.c, compiled on first use; without a compiler the plain forms do the work.

Both give the same bits. MOESERVE_ONE_SIDED_NATIVE=0 asks for the plain ones. The library is kept in the user's cache
folder under a name made from the source, the flags and the machine, so that a compiler runs once.
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
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.layout import ROW_BITS, EpLayout
from moeserve.comm.all_to_all.one_sided.loops import Counts, Loops, PlainLoops
from moeserve.comm.all_to_all.rows import weighted_sum
from moeserve.comm.symm import SymmHeap

SPIN_SECONDS = 20e-6
"""How long a rank polls before it sleeps. With more ranks than cores, whoever spins keeps the others from working."""

# No contraction of multiply and add: the sums have the bits of the plain forms.
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES = {
    "ep_put": (_POINTER, _LONG, _LONG, *[_POINTER] * 4, _LONG, _LONG, _POINTER, _POINTER),
    "ep_wait": (_POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _LONG),
    "ep_count": (_POINTER, _LONG, *[_POINTER] * 4),
    "ep_take": (_POINTER, _POINTER, _LONG, *[_POINTER] * 4),
    "ep_push": (_POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER),
    "ep_sum_float32": (_POINTER, _LONG, _LONG, *[_POINTER] * 3, _LONG, _POINTER),
    "ep_sum_bfloat16": (_POINTER, _LONG, _LONG, *[_POINTER] * 3, _LONG, _POINTER),
}
_RESULTS = {"ep_put": ctypes.c_int, "ep_wait": ctypes.c_int, "ep_count": _LONG, "ep_take": _LONG}

logger = logging.getLogger(__name__)


def available() -> bool:
    """Whether make_loops gives the compiled loops."""
    return os.environ.get("MOESERVE_ONE_SIDED_NATIVE") != "0" and _library() is not None


def make_loops(heap: SymmHeap, layout: EpLayout) -> Loops:
    """The compiled loops, or the plain ones when they are asked for or nothing can compile."""
    path = _library() if available() else None
    return PlainLoops(heap, layout) if path is None else NativeLoops(heap, layout, path)


class NativeLoops:
    """The loops of one compiled library; meanings are those of loops.Loops."""

    def __init__(self, heap: SymmHeap, layout: EpLayout, library: Path) -> None:
        # PyDLL keeps the interpreter's lock: giving it away at each of these short calls would let any other
        # Python thread stall a step by its whole switch interval. Only a long wait gives it away.
        short, long = ctypes.PyDLL(str(library)), ctypes.CDLL(str(library))
        self._call = {name: _bind(short, name) for name in _SIGNATURES}
        self._long_wait = _bind(long, "ep_wait")
        self._heap = heap  # whose memory the addresses are
        config = layout.config
        self._world, self._each = config.world, config.slots_per_rank
        self._description = torch.tensor(_describe(layout, heap), dtype=torch.int64)
        self._ep = self._description.data_ptr()
        base = int(heap.addresses[heap.rank])
        self._mail, self._done = base + layout.mail.offset, base + layout.done.offset
        assert layout.z is not None
        self._z = layout.z.view(heap.block(heap.rank)).flatten(0, 1)
        self._counts = torch.empty(self._world * self._each, dtype=torch.int32)
        self._sums = {
            torch.float32: self._call["ep_sum_float32"],
            torch.bfloat16: self._call["ep_sum_bfloat16"],
        }

    def put(
        self,
        epoch: int,
        x: Tensor,
        scales: Tensor | None,
        slots: Tensor,
        alive: Tensor,
        first: int,
        version: int,
    ) -> Tensor:
        sent = torch.empty(self._world, dtype=torch.int64)
        wrong = self._call["ep_put"](
            self._ep, epoch, slots.shape[0], x.data_ptr(), 0 if scales is None else scales.data_ptr(),
            slots.data_ptr(), alive.data_ptr(), first, version, self._counts.data_ptr(), sent.data_ptr(),
        )  # fmt: skip
        assert not wrong, f"slots up to {int(slots.max())} of {self._world * self._each}"
        return sent

    def wait(
        self, words: str, epoch: int, pending: Tensor, low: Tensor, seconds: float, pause: float, spin: bool
    ) -> int:
        address, bits = (
            (self._mail + (epoch & 1) * self._world * 8, ROW_BITS) if words == "mail" else (self._done, 0)
        )
        spin_ns = int(SPIN_SECONDS * 1e9) if spin else 0
        fixed = (address, self._world, epoch, bits, pending.data_ptr(), low.data_ptr())
        left: int = self._call["ep_wait"](*fixed, spin_ns, 0, min(spin_ns, int(seconds * 1e9)))
        if left > 0 and seconds > 0:
            left = self._long_wait(*fixed, 0, int(pause * 1e9), int(seconds * 1e9))
        return left

    def count(self, epoch: int, rows: Tensor) -> Counts:
        each, first = torch.empty(2, self._world, self._each, dtype=torch.int64).unbind()
        per_slot = torch.empty(self._each, dtype=torch.int64)
        total = self._call["ep_count"](
            self._ep, epoch, rows.data_ptr(), each.data_ptr(), per_slot.data_ptr(), first.data_ptr()
        )
        return Counts(each, per_slot, first, total)

    def take(
        self, rows: Tensor, version: int, following: Tensor, x: Tensor, scales: Tensor | None, origin: Tensor
    ) -> int:
        others: int = self._call["ep_take"](
            self._ep, rows.data_ptr(), version, following.data_ptr(), x.data_ptr(),
            0 if scales is None else scales.data_ptr(), origin.data_ptr(),
        )  # fmt: skip
        return others

    def push(self, epoch: int, y: Tensor, origin: Tensor, low: int, high: int, tell: Tensor) -> None:
        self._call["ep_push"](
            self._ep, epoch, y.shape[0], y.data_ptr(), origin.data_ptr(), low, high, tell.data_ptr()
        )

    def sum(self, first: int, slots: Tensor, weights: Tensor, alive: Tensor, out: Tensor) -> None:
        tokens, top_k = slots.shape
        if out.dtype == self._z.dtype and out.dtype in self._sums:
            self._sums[out.dtype](
                self._ep, tokens, first, slots.data_ptr(), weights.data_ptr(), alive.data_ptr(), out.shape[1],
                out.data_ptr(),
            )  # fmt: skip
            return
        cells = self._z[first * top_k : (first + tokens) * top_k].to(torch.float32)
        skipped = (slots < 0) | ~alive.bool()[slots.div(self._each, rounding_mode="floor")]
        cells = cells.masked_fill(
            skipped.view(-1, 1), 0.0
        )  # what lies in a cell that nobody wrote may be NaN
        out.copy_(weighted_sum(cells, weights, skipped))


def _describe(layout: EpLayout, heap: SymmHeap) -> list[int]:
    """The array that engine.c calls ep, in the order of its enum."""
    config, z = layout.config, layout.result
    counts, meta, x = layout.slot_cnt, layout.meta, layout.x
    return [
        config.world, heap.rank, config.slots_per_rank, config.top_k, ROW_BITS, config.x.values_bytes,
        config.x.scales_offset, config.x.num_scales * config.x.scale_dtype.itemsize, config.result.values_bytes,
        layout.mail.offset, layout.done.offset, counts.offset, *counts.strides[:2], meta.offset, *meta.strides[:2],
        layout.meta_token.offset - meta.offset, layout.meta_version.offset - meta.offset,
        layout.meta_slots.offset - meta.offset, x.offset, *x.strides[:2], z.offset, z.strides[1],
        *heap.addresses.tolist(),
    ]  # fmt: skip


def _bind(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, name)
    function.argtypes = _SIGNATURES[name]
    function.restype = _RESULTS.get(name)
    return function


@lru_cache(maxsize=1)
def _library() -> Path | None:
    source = Path(__file__).with_name("engine.c")
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    for flags in ((*_FLAGS, "-march=native"), _FLAGS):
        key = hashlib.sha256(repr((source.read_bytes(), flags, _machine())).encode()).hexdigest()[:16]
        for folder in _folders():
            target = folder / f"one-sided-{key}.so"
            try:
                if not target.exists():
                    if compiler is None:
                        continue
                    _compile(compiler, flags, source, target)
                ctypes.CDLL(str(target))
                return target
            except (OSError, subprocess.SubprocessError) as error:
                logger.debug("engine.c with %s in %s: %s", flags[-1], folder, error)
    logger.info("no C compiler that works: the one-sided all-to-all runs in plain torch, slower")
    return None


def _compile(compiler: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    """Into a temporary name, then renamed: ranks that start at once do not see half a library."""
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *flags, "-o", name, str(source)], check=True, capture_output=True, timeout=120
        )
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
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))
    except OSError:
        return platform.machine() + platform.processor()
