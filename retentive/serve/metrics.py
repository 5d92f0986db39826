"""Metrics for Prometheus: this server's counts, and the engine's figures at the time of each scrape."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from retentive.serve.async_engine import AsyncEngine
from retentive.serve.sessions import Sessions

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the histograms' buckets, up to the default time-out."""


class Metrics:
    """Metrics of one server, in their own registry, so that two servers in a process do not mix."""

    def __init__(self, parts: "Sequence[Part]"):
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
        self.registry.register(_Figures(parts))

    def text(self) -> bytes:
        """Returns all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class Part(Protocol):
    """A model of the server, with its engine and its sessions."""

    engine: AsyncEngine
    sessions: Sessions


class _Figures(Collector):
    """Reads the engines at each scrape, and adds them up. Threads run meanwhile: numbers may be a step apart."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts

    def collect(self) -> Iterator[Metric]:
        engines, sessions = [part.engine for part in self.parts], [part.sessions for part in self.parts]
        caches = [engine.cache for engine in engines if engine.cache is not None]
        pools = [engine.pool for engine in engines if engine.pool is not None]

        def counted(name: str) -> int:
            return sum(engine.counts[name] for engine in engines)

        for name, value, text in (
            ("queue_length", sum(len(engine.queue) for engine in engines), "Requests that wait for a slot."),
            ("running", sum(engine.taken for engine in engines), "Slots in use."),
            ("slots", sum(engine.slots for engine in engines), "Number of slots."),
            ("pool_bytes", sum(pool.nbytes for pool in pools), "Memory of the slots' states."),
            ("sessions", sum(len(each.held) for each in sessions), "Conversations in memory."),
            ("session_bytes", sum(each.nbytes for each in sessions), "Memory of their states."),
            ("cache_bytes", sum(cache.nbytes for cache in caches), "Memory of cached prefixes' states."),
        ):
            yield GaugeMetricFamily(f"retentive_{name}", text, value)
        for name, value, text in (
            ("prompt_tokens", counted("prompt_tokens"), "Prompt tokens read."),
            ("cached_tokens", counted("cached_tokens"), "Prompt tokens that a cached state had read."),
            ("generated_tokens", counted("tokens"), "Tokens generated."),
            ("engine_steps", counted("steps"), "Steps of the engine."),
            ("cache_hits", sum(cache.hits for cache in caches), "Prompts that start as an earlier one."),
            ("cache_misses", sum(cache.misses for cache in caches), "Prompts that do not start as an earlier one."),
            ("sessions_evicted", sum(each.evictions for each in sessions), "Conversations dropped for lack of memory."),
        ):
            yield CounterMetricFamily(f"retentive_{name}", text, value)
