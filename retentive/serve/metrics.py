"""Metrics for Prometheus: this server's counts, and the engine's figures at the time of each scrape."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from retentive.infer.engine import Engine
from retentive.serve.sessions import Sessions

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the histograms' buckets, up to the default time-out."""


class Metrics:
    """Metrics of one server, in their own registry, so that two servers in a process do not mix."""

    def __init__(self, engine: Engine, sessions: Sessions):
        self.registry = CollectorRegistry()
        self.requests = Counter("retentive_requests", "Requests answered.", ("path", "status"), registry=self.registry)
        self.seconds = Histogram(
            "retentive_request_seconds", "From a completion's arrival to its end.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first = Histogram(
            "retentive_time_to_first_token_seconds", "From a completion's arrival to its first token.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.token = Histogram(
            "retentive_time_per_token_seconds", "Mean of a completion's tokens after the first.",
            buckets=(0.001, 0.0025, *SECONDS), registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Figures(engine, sessions))

    def text(self) -> bytes:
        """Returns all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class _Figures(Collector):
    """Reads the engine at each scrape. Its thread runs meanwhile, so that numbers may be a step apart."""

    def __init__(self, engine: Engine, sessions: Sessions):
        self.engine, self.sessions = engine, sessions

    def collect(self) -> Iterator[Metric]:
        engine, cache, pool = self.engine, self.engine.cache, self.engine.pool
        for name, value, text in (
            ("queue_length", len(engine.queue), "Requests that wait for a slot."),
            ("running", engine.taken, "Slots in use."),
            ("slots", engine.slots, "Number of slots."),
            ("pool_bytes", 0 if pool is None else pool.nbytes, "Memory of the slots' states."),
            ("sessions", len(self.sessions.held), "Conversations in memory."),
            ("session_bytes", self.sessions.nbytes, "Memory of their states."),
            ("cache_bytes", 0 if cache is None else cache.nbytes, "Memory of cached prefixes' states."),
        ):
            yield GaugeMetricFamily(f"retentive_{name}", text, value)
        for name, value, text in (
            ("prompt_tokens", engine.counts["prompt_tokens"], "Prompt tokens read."),
            ("cached_tokens", engine.counts["cached_tokens"], "Prompt tokens that a cached state had read."),
            ("generated_tokens", engine.counts["tokens"], "Tokens generated."),
            ("engine_steps", engine.counts["steps"], "Steps of the engine."),
            ("cache_hits", 0 if cache is None else cache.hits, "Prompts that start as an earlier one."),
            ("cache_misses", 0 if cache is None else cache.misses, "Prompts that do not start as an earlier one."),
            ("sessions_evicted", self.sessions.evictions, "Conversations dropped for lack of memory."),
        ):
            yield CounterMetricFamily(f"retentive_{name}", text, value)
