"""The `moeserve` command: serve, generate, plan, bench, record, dashboard. Exit codes: 0 done, 1 the engine failed,
2 bad settings, 130 Ctrl-C (before `serve` answers; then it drains)."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import sys
from collections.abc import Sequence

from moeserve import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="moeserve", description="Wide expert-parallel serving of mixture-of-experts models."
    )
    parser.add_argument("--version", action="version", version=f"moeserve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, add, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(function=function)
        add(sub)
    flags = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # As launch.py has it for the ranks it starts; one that torchrun or Slurm started imports torch after this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code: int = flags.function(flags)
        return code
    except ValueError as error:
        print(f"moeserve: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"moeserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def add_engine(parser: argparse.ArgumentParser) -> None:
    from moeserve.config import add_model_and_flags

    add_model_and_flags(parser)


def serve(flags: argparse.Namespace) -> int:
    """Start the ranks, or be one when a launcher started this process, and answer HTTP."""
    import uvloop

    from moeserve.config import read_config
    from moeserve.launch import place_from_environment, run_rank_here
    from moeserve.plan import check_local_ranks, describe, make_plan
    from moeserve.server.run import bind
    from moeserve.serving import serve_http, with_tokenizer

    config = read_config(flags)
    place = place_from_environment(os.environ)
    plan, tokenizer = with_tokenizer(make_plan(config))
    world = plan.layout.world_size
    if place is not None and place.world_size != world:
        raise ValueError(
            f"tensor_parallel_size = {world}: the launcher started {place.world_size} ranks; make them equal"
        )
    check_local_ranks(plan, world if place is None else place.local_size)
    if place is not None and plan.config.moe_config.load_balancer.on_rank_loss == "shrink":
        raise ValueError(
            "moe_config.load_balancer.on_rank_loss = shrink: torchrun and Slurm end all ranks with the first that "
            "dies; use fail, or let one moeserve start all ranks on its host"
        )
    if place is not None and place.rank > 0:
        return run_rank_here(plan, place)
    listener = bind(config.host, config.port)
    print(describe(plan), flush=True)
    if config.host not in ("127.0.0.1", "localhost", "::1") and not config.api_key:
        logging.warning(
            "host = %s: anyone who reaches this machine may use the API; set api_key", config.host
        )
    return uvloop.run(serve_http(plan, tokenizer, listener, place))


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to add (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    add_engine(parser)


def generate(flags: argparse.Namespace) -> int:
    """Continue prompts without a server."""
    import dataclasses

    from moeserve.config import read_config
    from moeserve.llm import LLM
    from moeserve.messages import SamplingParams

    if flags.max_tokens < 1:
        raise ValueError(f"max_tokens = {flags.max_tokens}: must be at least 1")
    if not flags.temperature >= 0:
        raise ValueError(f"temperature = {flags.temperature}: must be at least 0")
    params = SamplingParams(max_tokens=flags.max_tokens, temperature=flags.temperature, seed=flags.seed)
    with LLM(**dataclasses.asdict(read_config(flags))) as llm:
        for prompt, answer in zip(flags.prompt, llm.generate(flags.prompt, params), strict=True):
            print(f"{prompt}{answer.text}\n")
    return 0


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-gib", type=float, help="memory of a rank's device (default: this machine's)"
    )
    add_engine(parser)


def plan(flags: argparse.Namespace) -> int:
    """Print the resolved layout, placement and memory a rank; loads no weights."""
    from moeserve.config import read_config
    from moeserve.plan import GIB, describe, make_plan

    if flags.memory_gib is not None and not flags.memory_gib > 0:
        raise ValueError(f"memory_gib = {flags.memory_gib}: must be above 0")
    memory = None if flags.memory_gib is None else int(flags.memory_gib * GIB)
    print(describe(make_plan(read_config(flags)), memory))
    return 0


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="server to load (default: %(default)s)"
    )
    parser.add_argument("--model", required=True, help="its name there")
    parser.add_argument("--concurrency", default="1,8,32", help="requests at once (default: %(default)s)")
    parser.add_argument("--num-requests", type=int, help="of each load (default: 4 at once, 32 at most)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens to add (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="prompts draw ids below it")
    parser.add_argument("--api-key")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")


def bench(flags: argparse.Namespace) -> int:
    """Load an OpenAI-style server with equal requests and print what its clients saw."""
    from moeserve.bench import Load, as_json, run_load, table

    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", flags.concurrency):
        raise ValueError(f"concurrency = {flags.concurrency!r}: must be numbers above 0, such as 1,8,32")
    for name, least in {"num_requests": 1, "input_len": 1, "output_len": 1, "vocab_size": 11}.items():
        value = getattr(flags, name)
        if value is not None and value < least:
            raise ValueError(f"{name} = {value}: must be at least {least}")
    try:
        file = open(flags.json, "w") if flags.json else None  # noqa: SIM115 - before the work, not after
    except OSError as error:
        raise ValueError(f"--json {flags.json}: cannot be written: {error.strerror}") from error
    levels = [int(text) for text in flags.concurrency.split(",")]
    results = []
    for level in levels:
        count = flags.num_requests or max(level, min(32, 4 * level))
        load = Load(count, level, flags.input_len, flags.output_len, flags.vocab_size)
        print(f"{count} requests, {level} at once ...", file=sys.stderr, flush=True)
        try:
            results.append(asyncio.run(run_load(flags.url, flags.model, load, flags.api_key)))
        except OSError as error:
            raise RuntimeError(f"{flags.url}: {error}") from error
    print(table(results))
    if file is not None:
        with file:
            json.dump(as_json(results), file, indent=1)
    return 0


def add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="server to ask: moeserve, vLLM or SGLang")
    parser.add_argument(
        "--requests",
        required=True,
        metavar="FILE",
        help="a request a line: JSON body, entry of an OpenAI batch file, or plain text",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="stats.json, .json.gz or .npz")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="of requests that do not say (default: %(default)s)"
    )
    parser.add_argument("--num-experts", type=int, help="of a layer (default: the highest id seen)")
    parser.add_argument("--top-k", type=int, help="experts a token; SGLang's answers do not say it")
    parser.add_argument("--ep-size", type=int, help="ranks to write down (default: what the server says)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds an answer may take (default: %(default)g)"
    )
    parser.add_argument("--api-key")


def record(flags: argparse.Namespace) -> int:
    """Send requests to any engine that returns routed experts, and write the expert load of its answers."""
    from pathlib import Path

    from moeserve.eplb.formats.stats import write_stats
    from moeserve.eplb.table import progress
    from moeserve.record import Server, read_requests, record

    for name in ("concurrency", "max_tokens", "num_experts", "top_k", "ep_size", "timeout"):
        value = getattr(flags, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} = {value}: must be above 0")
    output = Path(flags.output)
    if not output.parent.is_dir():
        raise ValueError(f"output = {flags.output}: there is no folder {output.parent}")
    requests = read_requests(Path(flags.requests), flags.max_tokens)
    found = record(
        Server(flags.url, flags.api_key, flags.timeout), requests, concurrency=flags.concurrency,
        num_experts=flags.num_experts, top_k=flags.top_k, ep_size=flags.ep_size,
        watch=lambda answers, total: progress(answers, total, "requests"),
    )  # fmt: skip
    assert found.load is not None
    write_stats(output, found.load)
    load = found.load
    print(
        f"{flags.output}: {found.answers} answers, {found.tokens} tokens, {load.num_layers} MoE layers of "
        f"{load.num_experts} experts"
    )
    for failure in found.failures[:5]:
        print(f"moeserve: not recorded: {failure}", file=sys.stderr)
    if found.failures:
        raise RuntimeError(f"{len(found.failures)} of {len(requests)} requests are not in {flags.output}")
    return 0


def add_dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stats", metavar="STATS", help="file or folder of expert load, of any engine")
    parser.add_argument("--ep-size", type=int, metavar="N", help="ranks (default: as recorded)")
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="(default: as recorded, else one node)"
    )
    parser.add_argument(
        "--expert-bytes",
        type=int,
        default=0,
        metavar="N",
        help="weights of one expert in a layer, to show bytes",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one (default: %(default)s)")


def dashboard(flags: argparse.Namespace) -> int:
    """Show recorded expert load in a browser, as a running server shows its own."""
    from pathlib import Path

    from moeserve.dashboard.recording import FileSource
    from moeserve.server.dashboard import serve_recorded
    from moeserve.server.run import bind

    for name in ("ep_size", "ranks_per_node"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if flags.expert_bytes < 0:
        raise ValueError(f"expert_bytes = {flags.expert_bytes}: must be at least 0")
    source = FileSource(Path(flags.stats), flags.ep_size, flags.ranks_per_node, flags.expert_bytes)
    listener = bind(flags.host, flags.port)
    host, port = listener.getsockname()[:2]
    print(f"{flags.stats} is shown at http://{host}:{port}/dashboard (Ctrl-C ends it)", flush=True)
    serve_recorded(source, listener)
    return 0


COMMANDS = {
    "serve": (serve, add_engine, "serve a model over HTTP"),
    "generate": (generate, add_generate, "continue prompts, offline"),
    "plan": (plan, add_plan, "show layout, placement and memory; loads no weights"),
    "bench": (bench, add_bench, "load an OpenAI-style server and measure it"),
    "record": (record, add_record, "record the expert load of any engine over HTTP"),
    "dashboard": (dashboard, add_dashboard, "show recorded expert load in a browser"),
}

if __name__ == "__main__":
    sys.exit(main())
