"""Serving metrics of the front-end in one registry, under our names and those that existing boards ask for.

Observing costs a bisect; names and text are made when someone scrapes. Never asks a rank for anything.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

os.environ.setdefault("PROMETHEUS_DISABLE_CREATED_SERIES", "True")  # read by the library's import

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

# Text 0.0.4 always: asked for OpenMetrics, prometheus_client turns vllm:x into vllm_x and empties the boards.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = (*(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000),)


class Histogram:
    """Counts per bucket; upper bounds inclusive, as Prometheus has them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        seen = 0
        buckets = []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), float(seen)))
        return buckets


@dataclass
class ServingMetrics:
    """The numbers. Gauges are read from the front-end at the moment of the scrape."""

    gauges: Callable[[], dict[str, float]]  # running, waiting, kv_usage, preemptions, cached_tokens
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0)
    )
    first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN))
    between_tokens: Histogram = field(default_factory=lambda: Histogram(_BETWEEN_TOKENS))
    end_to_end: Histogram = field(default_factory=lambda: Histogram(_REQUEST))
    queue: Histogram = field(default_factory=lambda: Histogram(_REQUEST))
    prefill: Histogram = field(default_factory=lambda: Histogram(_REQUEST))
    decode: Histogram = field(default_factory=lambda: Histogram(_REQUEST))
    prompt_length: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    output_length: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    max_output_length: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))


class ServingCollector:
    """Shows ServingMetrics to a registry, under moeserve_* and, when asked for, a peer's names."""

    def __init__(self, metrics: ServingMetrics, model_name: str, compat: str) -> None:
        if compat not in _PEERS:
            raise ValueError(f"metrics_compat: {compat!r} is not known; choose one of {', '.join(_PEERS)}")
        self._metrics = metrics
        self._labels = {"model_name": model_name}
        self._compat = compat

    def collect(self) -> Iterator[Metric]:
        yield from self._families("moeserve_", {}, _OURS, self._labels)
        prefix, renamed, wanted = _PEERS[self._compat]
        yield from self._families(prefix, renamed, wanted, {**self._labels, "engine": "0"})

    def _families(
        self, prefix: str, renamed: dict[str, str], wanted: tuple[str, ...], labels: dict[str, str]
    ) -> Iterator[Metric]:
        gauges = self._metrics.gauges()
        names, values = list(labels), list(labels.values())
        for key in wanted:
            name = prefix + renamed.get(key, key)
            text, source = _METRICS[key]
            if key == "request_success":
                counter = CounterMetricFamily(name, text, labels=[*names, "finished_reason"])
                for reason, count in self._metrics.finished.items():
                    counter.add_metric([*values, reason], count)
                yield counter
            elif source in gauges and key in _COUNTED_GAUGES:
                counter = CounterMetricFamily(name, text, labels=names)
                counter.add_metric(values, gauges[source])
                yield counter
            elif source in gauges:
                gauge = GaugeMetricFamily(name, text, labels=names)
                gauge.add_metric(values, gauges[source])
                yield gauge
            elif isinstance(histogram := getattr(self._metrics, source), Histogram):
                family = HistogramMetricFamily(name, text, labels=names)
                family.add_metric(values, buckets=histogram.cumulative(), sum_value=histogram.total)
                yield family
            else:
                counter = CounterMetricFamily(name, text, labels=names)
                counter.add_metric(values, histogram)
                yield counter


def make_registry(metrics: ServingMetrics, model_name: str, compat: str) -> CollectorRegistry:
    """A registry of its own, which other parts add their collectors to."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServingCollector(metrics, model_name, compat))
    return registry


def render(registry: CollectorRegistry) -> bytes:
    return generate_latest(registry)


# key: (help, attribute of ServingMetrics or name of a gauge)
_METRICS = {
    "num_requests_running": ("Sequences in a batch.", "running"),
    "num_requests_waiting": ("Sequences that wait for a place in a batch.", "waiting"),
    "kv_cache_usage_ratio": ("Used part of the KV-cache pages, 0 to 1, over all replicas.", "kv_usage"),
    "preemptions": ("Sequences put back to the queue for lack of KV-cache pages.", "preemptions"),
    "prefix_cache_hit_tokens": ("Prompt tokens found in the prefix cache.", "cached_tokens"),
    "cache_hit_ratio": ("Part of the prompt tokens that was found in the prefix cache.", "hit_ratio"),
    "prompt_tokens": ("Prompt tokens of sequences that got their first output.", "prompt_tokens"),
    "generation_tokens": ("Generated tokens.", "generation_tokens"),
    "request_success": ("Sequences finished, by reason.", "finished"),
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", "first_token"),
    "inter_token_latency_seconds": ("Between two tokens of a sequence.", "between_tokens"),
    "e2e_request_latency_seconds": ("From a request's arrival to its last token.", "end_to_end"),
    "request_queue_time_seconds": ("From arrival at the rank to the first step with it.", "queue"),
    "request_prefill_time_seconds": ("From the first step to the first token.", "prefill"),
    "request_decode_time_seconds": ("From the first token to the last.", "decode"),
    "request_prompt_tokens": ("Prompt tokens of a sequence.", "prompt_length"),
    "request_generation_tokens": ("Generated tokens of a sequence.", "output_length"),
    "request_max_num_generation_tokens": ("max_tokens of a sequence.", "max_output_length"),
    "step_tokens": ("Tokens of an engine step, prompt and generated.", "step_tokens"),
}
_COUNTED_GAUGES = ("preemptions", "prefix_cache_hit_tokens")
_OURS = tuple(key for key in _METRICS if key != "cache_hit_ratio")
_PEERS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "vllm": (
        "vllm:",
        {"kv_cache_usage_ratio": "kv_cache_usage_perc", "step_tokens": "iteration_tokens_total"},
        tuple(key for key in _OURS if key != "prefix_cache_hit_tokens"),
    ),
    "sglang": (
        "sglang_",
        {
            "num_requests_running": "num_running_reqs",
            "num_requests_waiting": "num_queue_reqs",
            "cache_hit_ratio": "cache_hit_rate",
        },
        (
            *("num_requests_running", "num_requests_waiting", "cache_hit_ratio", "prompt_tokens"),
            *("generation_tokens", "time_to_first_token_seconds", "inter_token_latency_seconds"),
            "e2e_request_latency_seconds",
        ),
    ),
    "none": ("", {}, ()),
}
