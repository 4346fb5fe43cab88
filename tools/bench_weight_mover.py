"""Weights on their way between ranks of this host, and where they may lie: two comparisons, each in one run.

    PYTHONPATH=. python tools/bench_weight_mover.py [--ranks N] [--mib N] [--repeats N] [--json FILE]

Movers: one expert from every rank to the next at once, by all-to-all steps (ExchangeMover over shared-memory rings)
and by reading it out of the other's memory (HeapMover), in chunks of --chunk KiB a step; MB/s a rank, checksums
included. Memory: an expert step of few rows, which reads every slot's weights once, with the weights in the pages
that the engine asks for (large ones) and in a heap that other ranks can read. Forms take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_serving import note, record_of
from torch import Tensor
from tqdm import tqdm

from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankPool
from moeserve.comm.symm import SymmHeap
from moeserve.comm.weight_mover import WeightMover
from moeserve.comm.weight_mover.exchange import ExchangeMover
from moeserve.comm.weight_mover.heap import HeapMover, SlotMemory, heap_bytes, writing
from moeserve.ops import native, table
from moeserve.ops.memory import WeightMemory

SLOTS, HIDDEN, INNER = 24, 2048, 768


def move(rank: int, size: int, nbytes: int, chunk: int, repeats: int) -> dict[str, list[float]]:
    """MB/s of each repeat by mover."""
    group = Mesh(ParallelLayout(dp=size), rank).ep
    shape = ((2, nbytes), torch.uint8)
    heap = SymmHeap.create("shm", rank, size, heap_bytes([shape]), group)
    forms: dict[str, tuple[WeightMover, Tensor]] = {
        "exchange": (ExchangeMover(group, 2), torch.zeros(2, nbytes, dtype=torch.uint8)),
        "heap": (HeapMover(heap, 2), SlotMemory(heap).empty(*shape)),
    }
    moves = [(2 * source, (2 * source + 3) % (2 * size)) for source in range(size)]
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name, (mover, weights) in forms.items():
            with writing(heap, [weights], 0) if name == "heap" else contextlib.nullcontext():
                weights[0].fill_(repeat % 251 + rank)
            mover.begin([weights], moves)
            group.barrier()
            start = time.perf_counter()
            while not all(row[0] for row in group.all_gather_ints([mover.advance(chunk)])):
                pass
            mover.commit()
            group.barrier()
            if repeat:  # the first touches memory for the first time
                rates[name].append(nbytes / (time.perf_counter() - start) / 1e6)
            assert int(weights[1, -1]) == repeat % 251 + (rank - 1) % size
    return rates


def step_times(repeats: int) -> dict[str, list[float]]:
    """Milliseconds of an expert step by where the weights lie."""
    torch.set_num_threads(1)
    native.enable()
    experts = table.get("grouped_experts", "cpu")
    shapes = [((SLOTS, 2 * INNER, HIDDEN), torch.bfloat16), ((SLOTS, HIDDEN, INNER), torch.bfloat16)]
    heap = SymmHeap.create("shm", 0, 1, heap_bytes(shapes), Mesh(ParallelLayout(), 0).ep)
    makers: dict[str, Callable[[tuple[int, ...], torch.dtype], Tensor]] = {
        "engine's": WeightMemory().empty,
        "heap": SlotMemory(heap).empty,
    }
    sets = {name: [make(*shape).normal_(std=0.02) for shape in shapes] for name, make in makers.items()}
    rows, tokens = torch.randn(SLOTS, HIDDEN).to(torch.bfloat16), torch.ones(SLOTS, dtype=torch.int64)
    times: dict[str, list[float]] = {name: [] for name in sets}
    for repeat in range(repeats + 2):
        for name, (gate_up, down) in sets.items():
            start = time.perf_counter()
            experts(rows, tokens, gate_up, down)
            if repeat > 1:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def large_pages() -> str:
    """What the kernel does for memory that processes share, and for other memory."""
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    words = []
    for name in ("enabled", "shmem_enabled"):
        file = folder / name
        text = file.read_text() if file.exists() else "[absent]"
        words.append(f"{name} {text.split('[')[1].split(']')[0]}")
    return ", ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mib", type=int, default=16, help="of an expert")
    parser.add_argument("--chunk", type=int, nargs="+", default=[256, 4096], help="KiB a step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    turns: dict[str, dict[str, list[float]]] = {}
    with RankPool(arguments.ranks) as pool:
        for chunk in tqdm(arguments.chunk, desc="movers", leave=False):
            ranks = pool.run(
                move, arguments.ranks, arguments.mib << 20, chunk << 10, arguments.repeats, timeout=600
            )
            turns[f"MB/s, {chunk} KiB a step"] = ranks[0]
    turns["expert step, ms"] = step_times(arguments.repeats)
    medians = {
        what: {name: statistics.median(v) for name, v in forms.items()} for what, forms in turns.items()
    }
    note(f"{arguments.ranks} ranks, experts of {arguments.mib} MiB; large pages: {large_pages()}")
    for what, forms in medians.items():
        first, second = forms.items()
        line = f"{what:24} {first[0]:>9} {first[1]:9.1f} {second[0]:>6} {second[1]:9.1f}"
        print(f"{line}  x{second[1] / first[1]:.2f}")
    if arguments.json:
        record = record_of(medians, turns) | {"large_pages": large_pages()}
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
