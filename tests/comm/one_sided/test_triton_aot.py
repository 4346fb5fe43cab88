"""All kernels compiled for GPUs ahead of time, without one: what their PTX must and must not contain, and registers."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve.comm.all_to_all.one_sided.layout import EpConfig, EpLayout, RowFormat
from moeserve.comm.symm import SymmHeap
from moeserve.comm.symm.heap import Blocks

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        "TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: triton compiles nothing"
    ),
]

BFLOAT16 = RowFormat(7168, torch.bfloat16)
FLOAT8 = RowFormat(7168, torch.float8_e4m3fn, 56)
FLOAT4 = RowFormat(3584, torch.uint8, 448, torch.uint8)
CONFIGS = {
    "fp8 to bf16, push": EpConfig(8, 4, 8, 36, FLOAT8, BFLOAT16),
    "bf16, pull": EpConfig(72, 4, 8, 4, BFLOAT16, BFLOAT16, "pull"),
    "nvfp4 to fp8, push": EpConfig(16, 4, 6, 18, FLOAT4, FLOAT8),
    "bf16 to fp8, pull": EpConfig(8, 4, 8, 36, BFLOAT16, FLOAT8, "pull"),
    "bf16, push, by rank": EpConfig(8, 4, 8, 36, BFLOAT16, BFLOAT16, "push", "rank"),
    "bf16, pull, by rank": EpConfig(8, 4, 8, 36, BFLOAT16, BFLOAT16, "pull", "rank"),
    "fp8, pull, by rank": EpConfig(4, 4, 4, 5, BFLOAT16, FLOAT8, "pull", "rank"),
    "22 choices, counts gathered": EpConfig(72, 4, 22, 8, BFLOAT16, BFLOAT16, num_experts=512),
    "float32 and an odd width": EpConfig(
        5, 4, 3, 3, RowFormat(100, torch.float32), RowFormat(100, torch.float32)
    ),
    "fp16": EpConfig(2, 4, 1, 1, RowFormat(512, torch.float16), RowFormat(512, torch.float16)),
}
FAST = ("fp8 to bf16, push",)
TARGETS = (90, 100, 103)
MOST_REGISTERS = 128
"""Of a thread: four programs of 128 threads fit on a processor."""
MOST_STACK = 16
"""Bytes of a thread: ptxas at times puts away a word that the loops do not use."""


@dataclass(frozen=True)
class Launch:
    """A kernel as the engine would start it."""

    kernel: Any
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target. operations: of memory, barriers and fused multiplications, in order of the text."""

    name: str
    arguments: dict[str, Any]
    operations: list[str]
    registers: int
    stack: int


def launches(config: EpConfig) -> list[Launch]:
    """Of one step, with a table and without."""
    from moeserve.comm.all_to_all.one_sided.triton_engine import ExpertTable, TritonEngine, gpu_tiles

    found: list[Launch] = []

    def keep(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        found.append(
            Launch(
                kernel, arguments | {name: name == "CLOCK" for name in ("SOFT", "CLOCK") if name in arguments}
            )
        )

    layout = EpLayout(config)
    block = torch.empty(layout.nbytes, dtype=torch.uint8)  # of all ranks: nothing is run
    heap = SymmHeap("local", 0, layout.nbytes, Blocks([block] * config.world))
    engine = TritonEngine(heap, layout, tiles=gpu_tiles(132), launch=keep)
    tokens, x = config.max_tokens, config.x
    kind = torch.bfloat16 if config.result.num_scales else config.result.dtype
    ids, weights = torch.zeros(tokens, config.top_k, dtype=torch.int64), torch.zeros(tokens, config.top_k)
    scales = torch.zeros(tokens, x.num_scales, dtype=x.scale_dtype) if x.num_scales else None
    for table in (None, ExpertTable(torch.zeros(8, 4), "cpu")):
        engine.send(torch.zeros(tokens, x.width, dtype=x.dtype), ids, weights, scales, table)
        engine.receive()
        engine.send_back(torch.zeros(16, config.result.width, dtype=kind))
        engine.receive_back(torch.zeros(tokens, config.result.width, dtype=kind))
    return found


def compile_launch(launch: Launch, target: int, folder: Path) -> Compiled:
    """As triton would at the launch: integers that are 1 are constants, those divisible by 16 are known to be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    from moeserve.comm.all_to_all.one_sided.triton_engine import OPTIONS

    signature, constants, attributes = {}, {}, {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(parameter.num,)] = value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=OPTIONS)
    operations = re.findall(
        r"^\s*(?:@%\S+ )?((?:ld|st|atom|red|fma|bar|membar|fence)\.\S+?)[;\s]", made.asm["ptx"], re.M
    )
    operations = [name for name in operations if not re.match(r"(ld|st)\.(param|shared)", name)]
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (
        int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK", "LOCAL")
    )
    return Compiled(launch.kernel.__name__, launch.arguments, operations, registers, stack + local)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path


def cases() -> Iterator[Any]:
    for name in CONFIGS:
        for target in TARGETS:
            fast = name in FAST and target == TARGETS[0]
            yield pytest.param(name, target, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "target"), cases())
def test_compiled_kernels(fresh_cache: Path, name: str, target: int) -> None:
    config = CONFIGS[name]
    seen: set[str] = set()
    for launch in launches(config):
        compiled = compile_launch(launch, target, fresh_cache)
        seen.add(compiled.name)
        try:
            check_any(compiled)
            check_payload(compiled, config)
        except AssertionError as error:
            raise AssertionError(f"{compiled.name}: {error}\n{compiled.operations}") from error
    answer = "answer_summed" if config.cells == "rank" else "answer"
    assert seen == {"place", "put", "wait", "index", answer, "reduce"}


def check_any(compiled: Compiled) -> None:
    """Order and coherence, whatever the kernel."""
    operations = compiled.operations
    assert compiled.stack <= MOST_STACK, f"spills {compiled.stack} bytes"
    assert compiled.registers <= MOST_REGISTERS, f"{compiled.registers} registers"
    assert not any(".nc" in name or ".weak.nc" in name for name in operations), "reads that may be stale"
    assert not any(name.startswith("fma") for name in operations), "a product is added before it is rounded"
    releases = [at for at, name in enumerate(operations) if "release" in name and "sys" in name]
    arrivals = [at for at, name in enumerate(operations) if "acq_rel" in name]
    acquires = [at for at, name in enumerate(operations) if name.startswith("ld") and "acquire" in name]
    signals = compiled.name in ("put", "answer", "answer_summed")
    assert len(releases) == len(arrivals) == (1 if signals else 0)
    assert all(".sys" in operations[at] for at in acquires)
    assert bool(acquires) == (compiled.name == "wait")
    for at in releases + arrivals:
        before = [name.split(".")[0] for name in operations[:at]]
        last_store = max((i for i, name in enumerate(before) if name == "st"), default=-1)
        last_barrier = max((i for i, name in enumerate(before) if name == "bar"), default=-2)
        assert last_store < last_barrier, "a store may come after the word that says it is there"
    for at in arrivals:  # no read of what others wrote before all threads know that they have
        after = [name.split(".")[0] for name in operations[at + 1 :]]
        assert after.index("bar") < after.index("ld")


def check_payload(compiled: Compiled, config: EpConfig) -> None:
    """Rows move 16 bytes a thread at a time."""
    counts = Counter(re.sub(r"\.(global|relaxed|weak)", "", name) for name in compiled.operations)
    wide_stores, wide_loads = counts["st.v4.b32"], counts["ld.v4.b32"]
    stores = {name for name in counts if name.startswith("st")}
    if compiled.name == "put":
        assert wide_loads and wide_stores >= config.top_k
        assert stores <= {"st.v4.b32", "st.b64"} | ({"st.b32"} if config.num_experts else set())
    if compiled.name in ("answer", "answer_summed"):
        scale = {"st.b32"} if config.result.num_scales else set()
        assert wide_stores and stores <= {"st.v4.b32", "st.b64"} | scale
        assert wide_loads
    if compiled.name == "reduce":
        assert wide_loads >= config.top_k and wide_stores
        assert stores <= {"st.v4.b32", "st.b32"}  # b32: the lost weight
