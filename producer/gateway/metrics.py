"""`/metrics`: the queue as the broker knows it, looked at when asked, and this gateway's own requests.

The queue's figures are the broker's: every gateway of a broker shows the same ones, so take them from one, or aggregate
with `max`. `latentq_http_…` are this process's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from broker_config.connection import broker_errors
from broker_config.errors import LatentqError
from broker_config.tally import TIMES, Tallies, bounds_s
from broker_config.webhook_deliveries import WebhookDeliveries
from producer.async_client import AsyncDecodeClient
from producer.operations import Operations

#: A long-poll may take half a minute.
_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class GatewayMetrics:
    """The registry of one gateway."""

    def __init__(
        self, client: AsyncDecodeClient, operations: Operations, tallies: Tallies, deliveries: WebhookDeliveries
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(BrokerCollector(client, operations, tallies, deliveries))
        #: Requests answered, by route, method and status.
        self.requests = Counter(
            "latentq_http_requests", "Requests answered.", ("route", "method", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "latentq_http_request_seconds",
            "Time from a request to the end of its answer.",
            ("route",),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self.streams = Gauge("latentq_http_streams", "Event streams that are open.", registry=self._registry)
        self.connections = Gauge("latentq_http_connections", "Connections, closing ones too.", registry=self._registry)
        self.uploads = Gauge("latentq_http_uploads", "Bodies that are being read.", registry=self._registry)

    def text(self) -> bytes:
        """Everything in the text format. Asks the broker: call it in a thread."""
        return generate_latest(self._registry)


class BrokerCollector(Collector):
    """The queue's figures, read from the broker when they are asked for."""

    def __init__(
        self, client: AsyncDecodeClient, operations: Operations, tallies: Tallies, deliveries: WebhookDeliveries
    ) -> None:
        self._client = client
        self._operations = operations
        self._tallies = tallies
        self._deliveries = deliveries

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask the broker."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("latentq_broker_up", "Whether the broker answers.")
        try:
            found = [*self._queues(), *self._totals(), *self._ended(), *self._webhooks()]
            up.add_metric([], 1)
        except LatentqError:
            found = []
            up.add_metric([], 0)
        yield up
        yield from found

    def _queues(self) -> Iterator[Metric]:
        labels = ("vae", "priority")
        queued = GaugeMetricFamily("latentq_queue_jobs", "Jobs that wait.", labels=labels)
        oldest = GaugeMetricFamily("latentq_queue_oldest_seconds", "Since the oldest was submitted.", labels=labels)
        processing = GaugeMetricFamily("latentq_processing_jobs", "Jobs that a worker holds.", labels=labels)
        parked = GaugeMetricFamily("latentq_parked_jobs", "Jobs that wait for a newer worker.", labels=labels)
        failed = GaugeMetricFamily("latentq_failed_jobs", "Failed jobs that are retained.", labels=labels)
        paused = GaugeMetricFamily("latentq_queue_paused", "Whether it is held back.", labels=labels)
        workers = GaugeMetricFamily("latentq_workers", "Live workers that serve the VAE.", labels=("vae",))
        serving: dict[str, int] = {}
        for queue in self._operations.report.queues():
            name = (queue.vae, str(queue.priority))
            queued.add_metric(name, queue.queued)
            oldest.add_metric(name, queue.oldest_s or 0)
            processing.add_metric(name, queue.processing)
            parked.add_metric(name, queue.parked)
            failed.add_metric(name, queue.failed)
            paused.add_metric(name, int(queue.paused))
            serving[queue.vae] = queue.workers
        for vae, count in serving.items():
            workers.add_metric((vae,), count)
        yield from (queued, oldest, processing, parked, failed, paused, workers)

    def _totals(self) -> Iterator[Metric]:
        totals = self._operations.report.totals()
        connections = self._client.store.connections
        with broker_errors(connections.url):
            memory = connections.commands.info("memory")
        for name, text, value in (
            ("latentq_pending_jobs", "Jobs that have not ended.", totals.jobs),
            ("latentq_pending_latents_bytes", "Latents of jobs that have not ended.", totals.latents_bytes),
            ("latentq_pending_pixels", "Pixels of jobs that have not ended.", self._tallies.pending_px()),
            ("latentq_reserved_bytes", "Bytes their outputs may take.", totals.reserved_bytes),
            ("latentq_broker_memory_bytes", "Memory the broker uses.", int(memory["used_memory"])),
            ("latentq_broker_memory_limit_bytes", "Its maxmemory; 0: none.", int(memory.get("maxmemory", 0))),
        ):
            yield GaugeMetricFamily(name, text, value=value)

    def _ended(self) -> Iterator[Metric]:
        outcomes = CounterMetricFamily("latentq_jobs_ended", "Jobs that ended.", labels=("vae", "outcome"))
        times = {
            name: HistogramMetricFamily(
                f"latentq_{name}_seconds", f"Time to {name}, of jobs that succeeded.", labels=("vae",)
            )
            for name in TIMES
        }
        names = {queue.vae for queue in self._operations.report.queues()} | set(self._client.catalog)
        bounds = [*(f"{bound:g}" for bound in bounds_s()), "+Inf"]
        for tally in self._tallies.of_vaes(sorted(names)):
            if not any(tally.outcomes.values()):
                continue
            for outcome, count in tally.outcomes.items():
                outcomes.add_metric((tally.vae, outcome), count)
            for name, family in times.items():
                histogram = tally.times[name]
                buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
                family.add_metric((tally.vae,), buckets, sum_value=histogram.sum_s)
        yield outcomes
        yield from times.values()

    def _webhooks(self) -> Iterator[Metric]:
        counts = self._deliveries.counts()
        for name, text, value in (
            ("latentq_webhooks_pending", "Deliveries on their way.", counts.pending),
            (
                "latentq_webhooks_overdue_seconds",
                "Since the oldest one could be tried; 0: none.",
                counts.overdue_s or 0,
            ),
            ("latentq_webhooks_dead_letters", "Deliveries that were given up and are kept.", counts.dead_letters),
            ("latentq_webhooks_stopped_endpoints", "Endpoints that answered 410.", counts.stopped_endpoints),
            ("latentq_couriers", "Live couriers.", counts.couriers),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        ended = CounterMetricFamily("latentq_webhooks_ended", "Deliveries that ended.", labels=("outcome",))
        for outcome in ("delivered", "dead", "dropped"):
            ended.add_metric((outcome,), getattr(counts, outcome))
        tried = CounterMetricFamily("latentq_webhook_attempts", "Attempts to deliver.", labels=("outcome",))
        tried.add_metric(("good",), counts.attempts_good)
        tried.add_metric(("bad",), counts.attempts_bad)
        yield from (ended, tried)
