"""A load client for any OpenAI-style server: bursts of equal requests, measured from the client's side.

Streams over plain asyncio sockets: on a small machine the client shares the cores with the server it measures,
and a full HTTP client takes a tenth of them.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Load:
    """What is asked of the server: num_requests prompts of input_len random token ids, output_len tokens each."""

    num_requests: int
    concurrency: int
    input_len: int = 128
    output_len: int = 64
    vocab_size: int = 4096
    seed: int = 0


@dataclass(frozen=True)
class RequestTimes:
    """One answered request; times in seconds from its start. token_times: arrival of each chunk with choices."""

    output_tokens: int
    total: float
    token_times: tuple[float, ...]


@dataclass(frozen=True)
class LoadResult:
    """Figures of one load. Latencies in milliseconds; tpot: mean time a token after the first, by request."""

    concurrency: int
    requests: int
    output_tokens: int
    seconds: float
    output_tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float


async def complete(url: str, body: dict[str, object], api_key: str | None = None) -> RequestTimes:
    """Stream one completion. Raises RuntimeError with the server's answer when it is not a 200 stream."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"url = {url!r}: must be http://HOST:PORT, without TLS")
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    payload = json.dumps(body).encode()
    head = [
        f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        "Connection: close",
        *([f"Authorization: Bearer {api_key}"] if api_key else []),
    ]
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + payload)
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            answer = (await reader.read()).decode(errors="replace")
            raise RuntimeError(f"{url}: {status.decode().strip()}: {answer[-500:]}")
        return await _read_stream(reader, start)
    finally:
        writer.close()


async def _read_stream(reader: asyncio.StreamReader, start: float) -> RequestTimes:
    times: list[float] = []
    tokens = 0
    async for line in reader:  # chunked framing lies between the events and never begins with "data:"
        if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[5:])
        if "error" in event:
            raise RuntimeError(f"error event: {event['error']}")
        if event.get("choices"):
            times.append(time.perf_counter() - start)
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    if not times:
        raise RuntimeError("the stream ended without a token")
    return RequestTimes(tokens or len(times), time.perf_counter() - start, tuple(times))


async def run_load(
    url: str,
    model: str,
    load: Load,
    api_key: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> LoadResult:
    """Send the load, at most `concurrency` requests under way at once. Raises RuntimeError when one fails."""
    rng = random.Random(load.seed)
    prompts = [
        [rng.randrange(10, load.vocab_size) for _ in range(load.input_len)] for _ in range(load.num_requests)
    ]
    places = asyncio.Semaphore(load.concurrency)
    done = 0

    async def one(prompt: list[int]) -> RequestTimes:
        nonlocal done
        body: dict[str, object] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": load.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with places:
            times = await complete(url, body, api_key)
        done += 1
        if progress is not None:
            progress(done)
        return times

    start = time.perf_counter()
    answers = await asyncio.gather(*map(one, prompts))
    return _summarise(load, answers, time.perf_counter() - start)


def _summarise(load: Load, answers: Sequence[RequestTimes], seconds: float) -> LoadResult:
    first = [answer.token_times[0] * 1e3 for answer in answers]
    later = [
        (answer.token_times[-1] - answer.token_times[0]) / max(1, answer.output_tokens - 1) * 1e3
        for answer in answers
    ]
    tokens = sum(answer.output_tokens for answer in answers)
    return LoadResult(
        concurrency=load.concurrency,
        requests=len(answers),
        output_tokens=tokens,
        seconds=seconds,
        output_tokens_per_second=tokens / seconds,
        ttft_p50=statistics.median(first),
        ttft_p99=percentile(first, 0.99),
        tpot_p50=statistics.median(later),
        tpot_p99=percentile(later, 0.99),
    )


def percentile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least `fraction` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


def table(results: Sequence[LoadResult]) -> str:
    """The results as aligned text."""
    head = (
        f"{'at once':>8} {'requests':>9} {'tok/s':>9} {'TTFT p50':>10} {'p99':>9} {'TPOT p50':>10} {'p99':>9}"
    )
    rows = [
        f"{r.concurrency:>8} {r.requests:>9} {r.output_tokens_per_second:>9.1f} {r.ttft_p50:>7.1f} ms"
        f" {r.ttft_p99:>6.1f} ms {r.tpot_p50:>7.2f} ms {r.tpot_p99:>6.2f} ms"
        for r in results
    ]
    return "\n".join([head, *rows])


def as_json(results: Sequence[LoadResult]) -> list[dict[str, float]]:
    return [asdict(result) for result in results]
