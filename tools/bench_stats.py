"""What expert statistics cost while serving: nothing counted, counted and collected, and with the dashboard open.

    PYTHONPATH=. python tools/bench_stats.py --json figures.json

Two servers of the serving benchmark's model stand side by side, one rank of one thread each; one of them counts
nothing (its counter is taken away before it starts, there is no setting for that). Turns alternate between them, so
that all see the same machine; with the dashboard open a client does what the page does: it holds the event stream and
fetches every panel anew for new counts. Step: time a token at eight sequences at once, as clients see it. Figures are
medians over the turns, ratios are of those medians; CPU is that of the processes, which other work on the machine
disturbs less than time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bench_model import make_bench_model
from bench_serving import VOCAB, healthy, note, record_of

from moeserve.bench import Load, run_load

NO_COUNTING = """
import moeserve.engine.runner
moeserve.engine.runner.ExpertLoad = lambda *given: None
"""
MODES = ("nothing counted", "counted", "dashboard open")
REFRESH_SECONDS, SOLVE_SECONDS = 2.0, 10.0  # as the page has them
PANELS = (
    "summary",
    "map?phase=decode&by=rank",
    "history?phase=decode&layer=0",
    "layer?phase=decode&layer=0",
    "rebalances",
)
SOLVED = ("verdict?phase=decode", "what-if?phase=decode&layer=0")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(Path(tempfile.gettempdir()) / "moeserve-bench-model"))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args()
    model = make_bench_model(Path(flags.model))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        (Path(folder) / "sitecustomize.py").write_text(NO_COUNTING)
        without, counting = (stack.enter_context(server(model, path)) for path in (folder, None))
        turns: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for each in (without, counting):
            turn(each, flags)  # warm-up
        for number in range(flags.turns):
            note(f"turn {number + 1} of {flags.turns}")
            order = MODES if number % 2 else MODES[::-1]
            for mode in order:
                page = open_page(counting.url) if mode == MODES[2] else contextlib.nullcontext()
                with page:
                    turns[mode].append(turn(without if mode == MODES[0] else counting, flags))
    medians = {
        mode: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        for mode, figures in turns.items()
    }
    print(table(medians))
    if flags.json:
        Path(flags.json).write_text(json.dumps(record_of(medians, turns), indent=1))


class Server:
    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self.front = process.pid
        self.ranks = [rank for child in children(self.front) for rank in children(child)]


@contextlib.contextmanager
def server(model: Path, path: str | None) -> Iterator[Server]:
    """A server on a free port; path: a folder whose sitecustomize.py its processes run first."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, root]))}
    command = [
        *(sys.executable, "-m", "moeserve", "serve", str(model), "--port", "0", "--num-threads", "1"),
        *("--dtype", "bfloat16", "--served-model-name", "bench", "--max-batch-size", "32"),
        *("--kv-cache-config.enable-block-reuse", "false"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if b"  API " in line:
                break
        else:
            raise SystemExit("a server did not start")
        url = line.split()[1].decode().removesuffix("/v1")
        assert healthy(url)
        yield Server(url, process)
    finally:
        process.terminate()
        process.wait(60)


def turn(served: Server, flags: argparse.Namespace) -> dict[str, float]:
    """One burst; CPU of its processes in milliseconds a step and in part of the time."""
    load = Load(flags.concurrency, flags.concurrency, 16, flags.output_len, VOCAB)
    before = [cpu_seconds([served.front]), cpu_seconds(served.ranks)]
    begun = time.perf_counter()
    found = asyncio.run(run_load(served.url, "bench", load))
    seconds = time.perf_counter() - begun
    front, ranks = (
        now - then
        for now, then in zip([cpu_seconds([served.front]), cpu_seconds(served.ranks)], before, strict=True)
    )
    return {
        "step_ms": found.tpot_p50,
        "rank_cpu_ms": 1e3 * ranks / flags.output_len,
        "front_cpu": front / seconds,
    }


@contextlib.contextmanager
def open_page(url: str) -> Iterator[None]:
    """A client that does what the dashboard does."""
    done = threading.Event()

    def look() -> None:
        refreshed = solved = 0.0
        with urllib.request.urlopen(f"{url}/dashboard/events", timeout=30) as events:
            while not done.is_set():
                events.readline()
                now = time.monotonic()
                if now - refreshed >= REFRESH_SECONDS:
                    refreshed = now
                    names = PANELS + (SOLVED if now - solved >= SOLVE_SECONDS else ())
                    solved = now if len(names) > len(PANELS) else solved
                    for name in names:
                        with urllib.request.urlopen(f"{url}/dashboard/api/{name}", timeout=30) as answer:
                            answer.read()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def table(medians: dict[str, dict[str, float]]) -> str:
    base = medians[MODES[0]]
    lines = [f"{'':<18}{'step':>11}{'ratio':>8}{'rank CPU a step':>18}{'ratio':>8}{'front CPU':>12}"]
    for mode, found in medians.items():
        step, cpu = found["step_ms"], found["rank_cpu_ms"]
        lines.append(
            f"{mode:<18}{step:>8.3f} ms{step / base['step_ms']:>8.3f}{cpu:>15.3f} ms"
            f"{cpu / base['rank_cpu_ms']:>8.3f}{found['front_cpu']:>10.1%}"
        )
    return "\n".join(lines)


def children(pid: int) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry))
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Time on a CPU of the processes so far, all their threads."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


if __name__ == "__main__":
    main()
