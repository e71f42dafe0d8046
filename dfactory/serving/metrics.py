"""The metrics of GET /metrics, in Prometheus' text format."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from dfactory.serving.engine import Engine

CLIENT_GONE = 499  # nginx's number for a client that hung up
COUNTED = (
    ("dfactory_forwards", "forwards of the whole batch", lambda counts: counts.forwards),
    ("dfactory_answers", "completed answers", lambda counts: counts.answers),
    ("dfactory_answer_tokens", "tokens of completed answers, EOS included", lambda counts: counts.tokens),
    (
        "dfactory_answer_forwards",
        "denoising passes, summed over completed answers",
        lambda counts: counts.answer_forwards,
    ),
    ("dfactory_given_up", "answers cancelled before their end", lambda counts: counts.given_up),
)
MEASURED = (
    ("dfactory_slots", "answers that can be decoded together", lambda engine: engine.slots),
    ("dfactory_slots_busy", "slots that hold an answer", lambda engine: len(engine.running)),
    ("dfactory_waiting", "answers in the queue", lambda engine: len(engine.waiting)),
)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, engines: list[Engine]):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCounts(engines))
        self.requests = Counter("dfactory_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "dfactory_request_seconds", "seconds of an HTTP request", ["route"], buckets=SECONDS, registry=self.registry
        )

    @contextlib.contextmanager
    def request(self, route: str) -> Iterator[SimpleNamespace]:
        """Count one request under the `status` that the caller sets on the result; 500 if its handler raises."""
        result, started = SimpleNamespace(status=500), time.perf_counter()
        try:
            yield result
        except asyncio.CancelledError:
            result.status = CLIENT_GONE
            raise
        finally:
            self.requests.labels(route, str(result.status)).inc()
            self.seconds.labels(route).observe(time.perf_counter() - started)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCounts:
    """Reads the engines' counts at every scrape; those of several models add up."""

    def __init__(self, engines: list[Engine]):
        self.engines = engines

    def collect(self):
        for name, meaning, of in COUNTED:
            yield CounterMetricFamily(name, meaning, value=sum(of(engine.counts) for engine in self.engines))
        for name, meaning, of in MEASURED:
            yield GaugeMetricFamily(name, meaning, value=sum(of(engine) for engine in self.engines))
