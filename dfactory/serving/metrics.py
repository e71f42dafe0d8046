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
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCounts(engine))
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
    """Reads the engine's counts at every scrape."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self):
        counts, engine = self.engine.counts, self.engine
        yield CounterMetricFamily("dfactory_forwards", "forwards of the whole batch", value=counts.forwards)
        yield CounterMetricFamily("dfactory_answers", "completed answers", value=counts.answers)
        yield CounterMetricFamily(
            "dfactory_answer_tokens", "tokens of completed answers, EOS included", value=counts.tokens
        )
        yield CounterMetricFamily(
            "dfactory_answer_forwards", "denoising passes, summed over completed answers", value=counts.answer_forwards
        )
        yield CounterMetricFamily("dfactory_given_up", "answers cancelled before their end", value=counts.given_up)
        yield GaugeMetricFamily("dfactory_slots", "answers that can be decoded together", value=engine.slots)
        yield GaugeMetricFamily("dfactory_slots_busy", "slots that hold an answer", value=len(engine.running))
        yield GaugeMetricFamily("dfactory_waiting", "answers in the queue", value=len(engine.waiting))
