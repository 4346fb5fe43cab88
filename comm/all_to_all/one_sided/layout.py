"""Where everything lies in the memory of the one-sided all-to-all: a pure function of the sizes to byte offsets.

The only place that knows byte positions. Knows no heap, no protocol and no engine.

The block of one rank ("me"), in this order; every remote byte a rank writes lies in a slice of its own:

    region        shape                     written by            read by
    mail          int64 [2][R src]          src                   me         epoch << ROW_BITS | rows, by epoch parity
    done          int64 [R dst]             dst                   me         last epoch whose results are there
    ctl           int64 [CTL_WORDS]         me                    all        see CTL_*
    slot_cnt      int32 [2][R src][S]       src                   me         choices for each of my slots, by parity
    stats         int32 [R src][E]          src                   me         only with num_experts
    meta_*        [R src][T] records        src                   me         whose row it is, and for which slots
    x             bytes [R src][T]          src                   me         the rows; experts may read them in place
    z (push)      bytes [T][C]              the cell's expert     me         results of my tokens
    y (pull)      bytes [R src][T][C]       me                    src        results of src's rows

C is the number of cells a token (z) or a row (y) has. With cells = "choice" it is K: one result a choice, summed
by the token's own rank in top-k order, so that the bits depend on nothing else; choice k has cell k. With
cells = "rank" the expert rank sums its choices of a row first (fewer bytes where ranks are few, other bits): a
row has 1 cell in y, a token min(K, R) cells in z, and meta carries the weights and the number of the z cell.

Two traps of this memory:

- z cells have a different writer each step. A rank that was masked as late and wakes up may write a cell that
  is another's by then: under push, results are void from a fault until the late rank is known to be gone or z has
  moved (an engine's keep_spare: to the other half of the cells, which a rank late in a later step uses up too).
  x, y, mail and all else have one writer for ever: under pull a late rank harms nobody.
- Cells exist once. That is enough for dispatch, combine, dispatch, combine; who has several dispatches in flight
  gives each a block of its own (`base`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

REGION_ALIGNMENT = 128
"""Of regions and of each source's slice of rows: slices of two writers share no cache line."""
ROW_ALIGNMENT = 16
"""Of rows, records and cells: the widest single access of a GPU thread."""

ROW_BITS = 20
"""Low bits of a mail word, its rows; the epoch above them outlasts any run (2**43 steps)."""
MAX_TOKENS = (1 << ROW_BITS) - 1
MAX_SLOTS_PER_RANK = (1 << 15) - 1

CTL_GENERATION, CTL_TABLE_VERSION, CTL_HEARTBEAT, CTL_EPOCH = 0, 1, 2, 3
"""Words of ctl: membership generation, newest routing table ready, seconds of the last step, last epoch begun."""
CTL_WORDS = 16

COMBINES = ("push", "pull")
CELLS = ("choice", "rank")


def mail_word(epoch: int, rows: int) -> int:
    """The word that releases `rows` rows of `epoch`."""
    return epoch << ROW_BITS | rows


def read_mail(word: int) -> tuple[int, int]:
    """A mail word -> (epoch, rows)."""
    return word >> ROW_BITS, word & MAX_TOKENS


@dataclass(frozen=True)
class RowFormat:
    """What one row is made of: `width` values of `dtype`, then `num_scales` of `scale_dtype` (16 B aligned).

    Opaque bytes are RowFormat(nbytes, torch.uint8); two 4-bit values count as one byte.
    """

    width: int
    dtype: torch.dtype
    num_scales: int = 0
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width = {self.width}: must be at least 1")
        if self.num_scales < 0:
            raise ValueError(f"num_scales = {self.num_scales}: must not be negative")

    @property
    def values_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def scales_offset(self) -> int:
        """Of the first scale in the row; the row's length where it has none."""
        return _align(self.values_bytes, ROW_ALIGNMENT)

    @property
    def nbytes(self) -> int:
        """Of a row in memory, a multiple of 16."""
        return self.scales_offset + _align(self.num_scales * self.scale_dtype.itemsize, ROW_ALIGNMENT)


@dataclass(frozen=True)
class EpConfig:
    """Sizes of one all-to-all, the same on every rank.

    world: R ranks; max_tokens: T rows a rank gives to one dispatch at most; top_k: K; slots_per_rank: S.
    x: a dispatched row; result: a row of experts' results.
    combine: "push" (experts write into the token's rank) or "pull" (the token's rank reads from the experts).
    cells: "choice" (a result a choice) or "rank" (a sum a rank); see the module's head.
    num_experts: E, where the counts of all experts are to be gathered; 0 leaves that region out.

    Raises ValueError for a size out of range.
    """

    world: int
    max_tokens: int
    top_k: int
    slots_per_rank: int
    x: RowFormat
    result: RowFormat
    combine: str = "push"
    cells: str = "choice"
    num_experts: int = 0

    def __post_init__(self) -> None:
        limits = {
            "world": (1, 1 << 15),
            "max_tokens": (1, MAX_TOKENS),
            "top_k": (1, 1 << 10),
            "slots_per_rank": (1, MAX_SLOTS_PER_RANK),
            "num_experts": (0, 1 << 20),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} = {value}: must be from {low} to {high}")
        for name, known in (("combine", COMBINES), ("cells", CELLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(known)}")


@dataclass(frozen=True)
class Region:
    """An array in a block. offset and strides in bytes, of elements of dtype."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def at(self, *index: int) -> int:
        """Byte offset, in the block, of the element or sub-array at index."""
        assert len(index) <= len(self.shape), f"index {index} of {self.shape}"
        for i, size in zip(index, self.shape, strict=False):
            assert 0 <= i < size, f"index {index} of {self.shape}"
        return self.offset + sum(i * stride for i, stride in zip(index, self.strides, strict=False))

    @property
    def end(self) -> int:
        """One past the last byte that belongs to an element."""
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + reach + self.dtype.itemsize

    def view(self, block: Tensor) -> Tensor:
        """block: uint8 [nbytes], one rank's memory -> the array, sharing that memory."""
        size = self.dtype.itemsize
        typed = block[self.offset : self.end].view(self.dtype)
        return typed.as_strided(self.shape, [stride // size for stride in self.strides])


class EpLayout:
    """Offsets and sizes of everything in one rank's block; the same on every rank.

    base: where the block begins in the heap, a multiple of 128 (several blocks: base = i * nbytes).
    nbytes: bytes of the block, base not included; a multiple of 128.
    regions: every array by name. Arrays of one record or row (meta_*, x_values, x_scales, ...) interleave.

    Attributes that a configuration does not have are None: stats without num_experts; x_scales and result_scales
    without scales; z and y with the other combine; meta_weights unless cells = "rank".
    """

    def __init__(self, config: EpConfig, base: int = 0) -> None:
        assert base >= 0 and base % REGION_ALIGNMENT == 0, f"base = {base}"
        self.config = config
        self.base = base
        self._end = base
        r, t, k, s = config.world, config.max_tokens, config.top_k, config.slots_per_rank
        self.mail = self._array((2, r), torch.int64)
        self.done = self._array((r,), torch.int64)
        self.ctl = self._array((CTL_WORDS,), torch.int64)
        self.slot_cnt = self._padded((2, r, s), torch.int32)
        self.stats = self._padded((r, config.num_experts), torch.int32) if config.num_experts else None

        self.meta = self._rows((r, t), self.meta_bytes)
        first = 8
        self.meta_token = self._field(self.meta, 0, torch.int32)
        self.meta_cell = self._field(self.meta, 4, torch.int16)
        self.meta_version = self._field(self.meta, 6, torch.int16)
        self.meta_weights: Region | None = None
        if self.weights_travel:
            self.meta_weights = self._field(self.meta, first, torch.float32, k)
            first += 4 * k
        self.meta_slots = self._field(self.meta, first, torch.int16, k)

        self.x = self._rows((r, t), config.x.nbytes)
        self.x_values, self.x_scales = self._row_fields(self.x, config.x)

        if config.combine == "push":
            self.result = self._rows((t, self.cells_per_token), config.result.nbytes, sliced=False)
        else:
            self.result = self._rows((r, t, self.cells_per_row), config.result.nbytes)
        self.result_values, self.result_scales = self._row_fields(self.result, config.result)
        self.z = self.result_values if config.combine == "push" else None
        self.y = self.result_values if config.combine == "pull" else None
        self.nbytes = _align(self._end, REGION_ALIGNMENT) - base

    @property
    def weights_travel(self) -> bool:
        """Whether the expert rank needs the weights: only to sum its choices itself."""
        return self.config.cells == "rank"

    @property
    def meta_bytes(self) -> int:
        """Of one record: token i32, cell i16, version i16, weights f32 [K] if they travel, slots i16 [K]."""
        per_choice = 2 + (4 if self.weights_travel else 0)
        return _align(8 + per_choice * self.config.top_k, ROW_ALIGNMENT)

    @property
    def cells_per_token(self) -> int:
        """Of z: results that a token waits for at most."""
        config = self.config
        return config.top_k if config.cells == "choice" else min(config.top_k, config.world)

    @property
    def cells_per_row(self) -> int:
        """Of y: results of one dispatched row. K with cells = "choice": all its choices may be on one rank."""
        return self.config.top_k if self.config.cells == "choice" else 1

    @cached_property
    def regions(self) -> dict[str, Region]:
        """All arrays that this configuration has, by attribute name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Region)}

    def _array(self, shape: tuple[int, ...], dtype: torch.dtype) -> Region:
        """A dense array."""
        strides = [dtype.itemsize]
        for size in reversed(shape[1:]):
            strides.append(strides[-1] * size)
        return self._place(shape, tuple(reversed(strides)), dtype)

    def _padded(self, shape: tuple[int, ...], dtype: torch.dtype) -> Region:
        """An array whose last dim is padded to 16 bytes: each row of it has one writer."""
        strides = [dtype.itemsize, _align(shape[-1] * dtype.itemsize, ROW_ALIGNMENT)]
        for size in reversed(shape[1:-1]):
            strides.append(strides[-1] * size)
        return self._place(shape, tuple(reversed(strides)), dtype)

    def _rows(self, shape: tuple[int, ...], nbytes: int, sliced: bool = True) -> Region:
        """uint8 [*shape, nbytes]. sliced: shape's first dim is the ranks, whose slices are 128 B aligned."""
        strides = [1, nbytes]
        for size in reversed(shape[1:]):
            strides.append(strides[-1] * size)
        if sliced:
            strides[-1] = _align(strides[-1], REGION_ALIGNMENT)
        return self._place((*shape, nbytes), tuple(reversed(strides)), torch.uint8)

    def _place(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Region:
        offset = _align(self._end, REGION_ALIGNMENT)
        self._end = offset + shape[0] * strides[0]
        return Region(offset, shape, strides, dtype)

    def _field(self, rows: Region, offset: int, dtype: torch.dtype, count: int | None = None) -> Region:
        """One field of each record of `rows`: a scalar, or `count` in a row."""
        shape, strides = rows.shape[:-1], rows.strides[:-1]
        if count is not None:
            shape, strides = (*shape, count), (*strides, dtype.itemsize)
        return Region(rows.offset + offset, shape, strides, dtype)

    def _row_fields(self, rows: Region, form: RowFormat) -> tuple[Region, Region | None]:
        values = self._field(rows, 0, form.dtype, form.width)
        if not form.num_scales:
            return values, None
        return values, self._field(rows, form.scales_offset, form.scale_dtype, form.num_scales)


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
