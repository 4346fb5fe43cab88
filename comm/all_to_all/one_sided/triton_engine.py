"""The one-sided all-to-all of GPUs: launches the Triton kernels over a heap's blocks. Knows no model.

A step is send, receive, the experts, send_back, receive_back, all on one stream. None of them reads the device on
the host and no address changes, so that a step may be captured in a CUDA graph. Also runs on CPU memory under
Triton's interpreter (TRITON_INTERPRET=1 before triton is imported): for tests, some 10 ms a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided import combine_kernels, device_words, dispatch_kernels
from moeserve.comm.all_to_all.one_sided.layout import CTL_EPOCH, CTL_GENERATION, EpLayout
from moeserve.comm.symm import SymmHeap

SCALE_BLOCK = 128
"""Values that share a scale where results travel as float8."""
NO_LIMIT = 1 << 40
MOST_CHOICES = (1 << 31) - 1
"""That can reach a rank in one step: the kernels number them in 32 bits."""
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""Of each kernel. One stage: else rows take a way through shared memory. Without fusion a product is rounded before
it is added: the bits of rows.weighted_sum."""


class ExpertTable:
    """Which slot a layer's tokens go to, on the device: expert e of token t to slots[active, e, (t + rotation) % C].

    There are two copies, so that a new placement can be written while the old one is in force. Fixed addresses.

    slots: int32 [2, E, C]. state: int32 [3]: the copy in force, its version, the rotation.
    """

    def __init__(self, slots: Tensor, device: torch.device | str, version: int = 0) -> None:
        """slots: [E, C] global slots; an expert with fewer than C replicas has some of them repeatedly."""
        self.slots = slots.to(device=device, dtype=torch.int32).repeat(2, 1, 1)
        self.state = torch.tensor([0, version, 0], dtype=torch.int32, device=device)
        self._active = 0

    def prepare(self, slots: Tensor) -> None:
        """Writes slots [E, C] into the copy that is not in force."""
        self.slots[1 - self._active].copy_(slots)

    def flip(self, version: int) -> None:
        """Puts the prepared copy in force: between two steps, the same two on every rank."""
        self._active = 1 - self._active
        self.state[:2].copy_(torch.tensor([self._active, version], dtype=torch.int32))

    def rotate(self, rotation: int) -> None:
        """rotation: 0 to C - 1."""
        self.state[2].fill_(rotation)


@dataclass(frozen=True)
class Received:
    """What was sent to a rank: views and buffers of its engine, good until it sends again.

    x: [R, T, width] rows by source, in this rank's block; scales [R, T, num_scales], or None.
    slot_start: int32 [S + 1]. rows: int32 [R * T * K], of which the first slot_start[S] count: (source * T + row) * K
    + choice of each result to be given, by local slot, source, token, choice; those of slot s begin at slot_start[s].
    """

    x: Tensor
    scales: Tensor | None
    slot_start: Tensor
    rows: Tensor

    def in_order(self, top_k: int) -> Tensor:
        """The rows [N, width] in the order in which results are given. Waits for the device, to know N."""
        tokens = self.x.shape[1]
        cells = self.rows[: int(self.slot_start[-1])].to(torch.int64) // top_k
        return self.x[cells // tokens, cells % tokens]


Launch = Callable[[Any, tuple[int, ...], dict[str, Any]], None]
"""(kernel, grid, its arguments by name)."""


@dataclass(frozen=True)
class Tiles:
    """How the work is cut; no result depends on it.

    programs: of a launch that moves rows, at most. rows: that a program moves at a time. nbytes: of a row at a time.
    choices: that place and index look at at a time.
    """

    programs: int
    rows: int
    nbytes: int
    choices: int


class TritonEngine:
    """One rank's end. For one thread and one stream.

    max_tokens: that a step may bring. generation: of the membership. mask: int32 [R], 0 for ranks that are out.
    counts: int64 [E], choices of each id so far. waited: int64 [R], nanoseconds waited for each rank so far. lost:
    float32 [T]: after receive_back, the weight of each token's choices that nobody answered for. words: see
    device_words.py; target, row [T, K], sent, got, answered [R]: see the kernels.
    """

    def __init__(
        self,
        heap: SymmHeap,
        layout: EpLayout,
        *,
        num_ids: int | None = None,
        deadline: float = 1.0,
        keep_spare: bool = False,
        tiles: Tiles | None = None,
        launch: Launch | None = None,
    ) -> None:
        """num_ids: experts that a table translates; without one, ids are slots. deadline: see set_deadline.

        tiles: for the device, if left out. launch: starts a kernel, if not as a kernel is started.

        keep_spare: under push, keeps half of the result cells free and so brings layout's max_tokens / 2 tokens at
        most. A late rank may still write into cells of the step in which it was masked; results go to the other half
        from then on. Without it, results of the steps after a fault are void until set_membership.
        """
        config = layout.config
        assert heap.world == config.world, f"a heap of {heap.world} ranks for {config.world}"
        assert layout.base + layout.nbytes <= heap.nbytes, "the block lies outside the heap"
        self.layout, self.rank, self.device = layout, heap.rank, heap.device
        self.tiles = default_tiles(layout, self.device) if tiles is None else tiles
        self._launch = launch_kernel if launch is None else launch
        self.block = heap.block(heap.rank)
        self._heap = heap  # the kernels know the other ranks' blocks by their addresses alone
        if keep_spare and (config.max_tokens < 2 or config.combine == "pull"):
            raise ValueError(
                f"max_tokens, combine = {config.max_tokens}, {config.combine!r}: half is kept spare of 2 or more, "
                "and under push only"
            )
        spare = config.max_tokens // 2 if keep_spare else 0
        self.max_tokens = spare or config.max_tokens
        self.generation = 0
        r, t, k, s = config.world, config.max_tokens, config.top_k, config.slots_per_rank
        if r * t * k > MOST_CHOICES:
            raise ValueError(f"world * max_tokens * top_k = {r * t * k}: must be at most {MOST_CHOICES}")
        zeros = partial(torch.zeros, dtype=torch.int32, device=self.device)
        wide = partial(torch.zeros, dtype=torch.int64, device=self.device)
        self.target, self.row = zeros(t, k), zeros(t, k)
        self.sent, self.got, self.answered = zeros(r), zeros(r), zeros(r)
        self.slot_start, self.rows = zeros(s + 1), zeros(r * t * k)
        self.mask, self.lost = zeros(r) + 1, torch.zeros(t, device=self.device)
        self.words, self.fault, self.waited = wide(device_words.NUM_WORDS), wide(r), wide(r)
        self.counts = wide(r * s if num_ids is None else num_ids)
        self._host_fault = torch.zeros(r, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self._ctl = layout.ctl.view(self.block)
        self._no_limit, self._no_table = wide(1) + NO_LIMIT, zeros(3)
        self._arguments: dict[str, Any] = {
            **_offsets(layout),
            **_constants(layout),
            "words": self.words,
            "mask": self.mask,
            "blocks": heap.addresses,
            "own_target": self.target,
            "own_row": self.row,
            "own_sent": self.sent,
            "own_counts": self.counts,
            "own_start": self.slot_start,
            "own_rows": self.rows,
            "own_place": zeros(r * t * k if layout.weights_travel else 1),
            "own_fault": self.fault,
            "own_waited": self.waited,
            "own_lost": self.lost,
            "host_fault": self._host_fault,
            "max_tokens": t,
            "spare": spare,
            "me": self.rank,
            "SOFT": self.device.type == "cpu",
            "CLOCK": self.device.type != "cpu",
        }
        self.set_deadline(deadline)

    def send(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        scales: Tensor | None = None,
        table: ExpertTable | None = None,
        num_tokens: Tensor | None = None,
    ) -> None:
        """Puts each token's row once into every rank that has one of its slots.

        x [b, width] and scales [b, num_scales] of the layout's format; ids int64 [b, K]: experts with a table, slots
        without, -1 for none; weights float32 [b, K]. num_tokens: int64 [1] on the device, if fewer than b are real.
        weights and num_tokens keep their values until receive_back.
        """
        config = self.layout.config
        assert x.shape[0] <= self.max_tokens, f"{x.shape[0]} tokens, at most {self.max_tokens}"
        assert ids.shape == weights.shape == (x.shape[0], config.top_k), f"{ids.shape}, {weights.shape}"
        assert ids.dtype == torch.int64 and weights.dtype == torch.float32
        assert ids.is_contiguous() and weights.is_contiguous() and x.is_contiguous()
        assert (scales is not None) == (config.x.num_scales > 0), f"{config.x.num_scales} scales a row"
        translated = table is not None
        self._arguments |= {
            "ids": ids,
            "weights": weights,
            "num_tokens": self._no_limit if num_tokens is None else num_tokens,
            "tokens": x.shape[0],
            "table": table.slots if table else self._no_table,
            "state": table.state if table else self._no_table,
            "num_experts": table.slots.shape[1] if table else 0,
            "columns": table.slots.shape[2] if table else 1,
            "TRANSLATE": translated,
        }
        word: torch.dtype = self._arguments["WORD"]
        rows = x.view(word)
        self._run(dispatch_kernels.place, (config.world,), BT=self._tokens())
        self._run(
            dispatch_kernels.put,
            self._programs(x.shape[0]),
            x=rows,
            scales=rows if scales is None else scales.view(word),
            BT=self.tiles.rows,
            BH=self.tiles.nbytes // word.itemsize,
        )

    def receive(self) -> Received:
        """What has come for this rank. A rank whose rows are not there by the deadline is masked, its rows dropped."""
        layout, config = self.layout, self.layout.config
        at = self._arguments["mail_at"]
        self._run(dispatch_kernels.wait, (config.world,), own_got=self.got, word_at=at, MAIL=True, ALL=True)
        grid = (config.slots_per_rank, config.world)
        self._run(dispatch_kernels.index, grid, own_got=self.got, BT=self._tokens())
        scales = None if layout.x_scales is None else layout.x_scales.view(self.block)
        return Received(layout.x_values.view(self.block), scales, self.slot_start, self.rows)

    def send_back(self, y: Tensor, rows: int | None = None) -> None:
        """Gives the results to their tokens' ranks.

        y [N or more, width] of the layout's result format, of any float dtype where that is float8, in the order of
        Received.rows, where slot_start[S] says N. rows: N if the host knows it, to launch no more than needed.
        """
        assert y.is_contiguous() and y.shape[1] == self.layout.config.result.width, f"y {tuple(y.shape)}"
        summed, world = self.layout.weights_travel, self.layout.config.world
        most = self.max_tokens if summed else self.rows.numel() if rows is None else rows
        self._run(
            combine_kernels.answer_summed if summed else combine_kernels.answer,
            (*self._programs(most, world), world) if summed else self._programs(most),
            y=y,
            own_got=self.got,
            BT=self.tiles.rows,
            BH=self._width(),
        )

    def receive_back(self, out: Tensor) -> Tensor:
        """Writes the weighted sums to out [b, width] and gives it: its rows beyond num_tokens are 0.

        The choices of a rank that is masked or late count nothing; `lost` has their weight.
        """
        config = self.layout.config
        tokens = self._arguments["tokens"]
        assert out.shape == (tokens, config.result.width) and out.is_contiguous(), f"out {tuple(out.shape)}"
        at, pull = self._arguments["done_at"], config.combine == "pull"
        self._run(
            dispatch_kernels.wait, (config.world,), own_got=self.answered, word_at=at, MAIL=False, ALL=pull
        )
        grid = self._programs(tokens)
        self._run(
            combine_kernels.reduce, grid, out=out, own_got=self.answered, BT=self.tiles.rows, BH=self._width()
        )
        return out

    def set_deadline(self, seconds: float) -> None:
        """How late a rank may be in each wait before it is masked; with 0 a wait looks once."""
        self.words[device_words.DEADLINE.value] = int(seconds * 1e9)

    @property
    def epoch(self) -> int:
        """Of the last step begun. Waits for the device."""
        return int(self.words[device_words.EPOCH.value])

    def query_fault(self) -> list[int]:
        """Members found late since the last set_membership. Waits for no device: a step under way may add to them."""
        return sorted(self.late_at())

    def late_at(self) -> dict[int, int]:
        """Members found late since the last set_membership -> the epoch in which they were."""
        return {rank: epoch for rank, epoch in enumerate(self._host_fault.tolist()) if epoch}

    def set_membership(self, members: Sequence[bool], generation: int, epoch: int) -> None:
        """Takes what the hosts agreed upon: who is in, between steps. All members call it before their next step.

        generation: higher than the last. epoch: the same on all, higher than that of any member's last step. Ranks
        that are not in any more must be gone, or at least have left the step in which they were late. Forgets the
        faults. Raises ValueError for a generation or epoch of the past, or without this rank.
        """
        if generation <= self.generation:
            raise ValueError(f"generation = {generation}: must be above {self.generation}")
        if epoch <= self.epoch:
            raise ValueError(f"epoch = {epoch}: must be above {self.epoch}")
        if not members[self.rank]:
            raise ValueError(f"members = {list(members)}: rank {self.rank} cannot go on without itself")
        self.generation = generation
        self.mask.copy_(torch.tensor(members, dtype=torch.int32))
        self.fault.zero_()
        self._host_fault.zero_()
        self.words[device_words.EPOCH.value] = epoch
        self.words[device_words.UNSAFE.value] = 0
        self._ctl[CTL_GENERATION] = generation

    def stats_snapshot(self) -> tuple[Tensor, Tensor, int]:
        """(counts of each id so far [E], nanoseconds waited for each rank [R], rows that came by another table than
        ours), copies on the host: waits for the device.
        """
        wrong = int(self.words[device_words.MISMATCHES.value])
        return self.counts.cpu(), self.waited.cpu(), wrong

    def _programs(self, items: int, sources: int = 1) -> tuple[int]:
        """The grid for so many rows or tokens: one at least, since the last program says that we are done."""
        most = max(1, self.tiles.programs // sources)
        programs = max(1, min(-(-items // self.tiles.rows), most))
        self._arguments["programs"] = programs
        return (programs,)

    def _width(self) -> int:
        """Values of a result that a program moves at a time."""
        width = self.tiles.nbytes // self.layout.config.result.dtype.itemsize
        return max(width, SCALE_BLOCK) if self.layout.config.result.num_scales else max(width, 1)

    def _tokens(self) -> int:
        """That place and index take at a time."""
        choices = self._arguments["KP"] ** (2 if self.layout.weights_travel else 1)
        return _power_of_two(max(1, min(self.max_tokens, self.tiles.choices // choices)))

    def _run(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        everything = self._arguments | arguments
        self._launch(kernel, grid, {name: everything[name] for name in kernel.arg_names})


def launch_kernel(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Starts a kernel on the current stream."""
    kernel[grid](**arguments, **OPTIONS)


def default_tiles(layout: EpLayout, device: torch.device) -> Tiles:
    """One row a program at a time on a GPU; many under the interpreter, where each operation costs the same."""
    if device.type == "cuda":
        return gpu_tiles(torch.cuda.get_device_properties(device).multi_processor_count)
    longest = max(layout.config.x.values_bytes, layout.config.result.values_bytes)
    return Tiles(programs=2, rows=16, nbytes=_power_of_two(min(longest, 4096)), choices=4096)


def gpu_tiles(processors: int) -> Tiles:
    """16 bytes for each of a program's 128 threads at a time."""
    return Tiles(4 * processors, 1, 2048, 1024)


def _offsets(layout: EpLayout) -> dict[str, int]:
    """The kernels' arguments that say where things lie."""
    z = layout.config.combine == "push"
    cells = layout.result.strides
    source, row, cell = (0, cells[0], cells[1]) if z else cells[:3]
    return {
        "mail_at": layout.mail.offset,
        "done_at": layout.done.offset,
        "epoch_at": layout.ctl.at(CTL_EPOCH),
        "stats_at": layout.stats.offset if layout.stats else 0,
        "stats_source": layout.stats.strides[0] if layout.stats else 0,
        "count_at": layout.slot_cnt.offset,
        "count_parity": layout.slot_cnt.strides[0],
        "count_source": layout.slot_cnt.strides[1],
        "meta_at": layout.meta.offset,
        "meta_source": layout.meta.strides[0],
        "meta_row": layout.meta.strides[1],
        "slots_at": layout.meta_slots.offset - layout.meta.offset,
        "weights_at": layout.meta_weights.offset - layout.meta.offset if layout.meta_weights else 0,
        "x_at": layout.x.offset,
        "x_source": layout.x.strides[0],
        "x_row": layout.x.strides[1],
        "scales_at": layout.config.x.scales_offset,
        "result_at": layout.result.offset,
        "result_source": source,
        "result_row": row,
        "result_cell": cell,
    }


def _constants(layout: EpLayout) -> dict[str, Any]:
    """The kernels' compile-time arguments that follow from the sizes."""
    config = layout.config
    scale_bytes = config.x.num_scales * config.x.scale_dtype.itemsize
    word = torch.int32 if (config.x.values_bytes | scale_bytes) % 4 == 0 else torch.uint8
    result = config.result
    if result.num_scales and result.num_scales != -(-result.width // SCALE_BLOCK):
        raise ValueError(f"num_scales = {result.num_scales}: results have one for each {SCALE_BLOCK} values")
    return {
        "WORD": word,
        "X_WORDS": config.x.values_bytes // word.itemsize,
        "SCALE_WORDS": scale_bytes // word.itemsize,
        "R": config.world,
        "RP": _power_of_two(config.world),
        "S": config.slots_per_rank,
        "SP": _power_of_two(config.slots_per_rank + 1),
        "K": config.top_k,
        "KP": _power_of_two(config.top_k),
        "WIDTH": result.width,
        "GATHERED": config.num_experts,
        "WIRE": device_words.RESULT_TYPES[
            "float32" if result.num_scales else str(result.dtype).removeprefix("torch.")
        ],
        "SCALES_AT": result.scales_offset if result.num_scales else 0,
        "PULL": config.combine == "pull",
        "SUMMED": layout.weights_travel,
    }


def _power_of_two(value: int) -> int:
    """The smallest that is not less than value."""
    return 1 << max(value - 1, 0).bit_length()
