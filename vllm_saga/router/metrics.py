"""The router's own metrics; nothing in a label grows with the number of sessions or tenants."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from vllm_saga.router.backends import Backends

_FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_STATUSES = ("2xx", "4xx", "5xx")
_MOVES = ("new", "uncached", "cached")
_CAUSES = ("connect", "died", "503")
_REFUSALS = ("router_full", "backends_full", "backends_failed", "no_backend")


class Metrics:
    """Counted where things happen; what backends are like is read when somebody asks.

    errors: how many bugs in placement and identity were survived.
    """

    def __init__(self, backends: Backends, errors: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.answers = counter(
            "saga_router_answers", "Answers by status class (2xx, ...).", ["status"]
        )
        self.decisions = counter(
            "saga_router_decisions", "Calls sent, by why they went where.", ["reason"]
        )
        self.identity = counter(
            "saga_router_identity", "Requests by what named their session.", ["source"]
        )
        self.moves = counter(
            "saga_router_moves", "Sessions that changed their backend.", ["reason"]
        )
        self.move_cost = counter(
            "saga_router_move_cost_seconds", "Prefill that moves were expected to take."
        )
        self.move_saved = counter(
            "saga_router_move_saved_seconds", "Waiting that moves were expected to save."
        )
        self.withdrawn = counter(
            "saga_router_withdrawn", "Calls taken back unanswered and sent elsewhere."
        )
        self.retries = counter(
            "saga_router_retries", "Calls offered to another backend.", ["cause"]
        )
        self.refused = counter(
            "saga_router_refused", "Requests that the router itself answered.", ["reason"]
        )
        self.choosing = histogram(
            "saga_router_choosing_seconds",
            "From a request to its being sent, body included.",
            buckets=_FAST,
        )
        self.first_byte = histogram(
            "saga_router_first_byte_seconds",
            "From a request to the first byte of its answer.",
            buckets=_SLOW,
        )
        self.in_flight = gauge("saga_router_in_flight", "Calls sent and not ended.")
        self.connections = gauge("saga_router_connections", "Open connections of clients.")
        self.sessions = gauge("saga_router_sessions", "Sessions of late.")
        self.buffered = gauge("saga_router_buffered_bytes", "Bodies that are kept.")
        for metric, values in (
            (self.answers, _STATUSES),
            (self.moves, _MOVES),
            (self.retries, _CAUSES),
            (self.refused, _REFUSALS),
        ):
            # There before they first happen: a rate needs a value to start from.
            for value in values:
                metric.labels(value)
        registry.register(_Errors(errors))
        registry.register(_OfBackends(backends))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Errors:
    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "saga_router_policy_errors",
            "Bugs in placement and identity that were survived.",
            self._count(),
        )


class _OfBackends:
    """One series for each backend of now: those that have left leave no series behind."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends

    def collect(self) -> Iterator[Metric]:
        up = _family("up", "1 while calls may be sent there.")
        in_flight = _family("in_flight", "Calls sent there and not ended.")
        draining = _family("draining", "1 while it gets no new sessions.")
        used = _family("kv_used", "Share of its KV pool, as it reports.")
        held = _family("held", "Calls that it holds back, as it reports.")
        running = _family("running", "Calls that it computes, as it reports.")
        waiting = _family("waiting", "Calls that wait there, held ones included, as it reports.")
        resident = _family("resident", "Workflows that hold its KV, as it reports.")
        age = _family("report_age_seconds", "How old its last report is.")
        now = time.monotonic()
        for backend in self._backends:
            label = [backend.name]
            up.add_metric(label, backend.accepting)
            in_flight.add_metric(label, backend.in_flight)
            draining.add_metric(label, backend.draining)
            if report := backend.report:
                used.add_metric(label, report.used_tokens / max(report.kv_tokens, 1))
                held.add_metric(label, len(report.held_calls))
                running.add_metric(label, report.running)
                waiting.add_metric(label, report.waiting)
                resident.add_metric(label, report.resident)
                age.add_metric(label, now - report.at)
        yield from (up, in_flight, draining, used, held, running, waiting, resident, age)


def _family(name: str, meaning: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"saga_router_backend_{name}", meaning, labels=["backend"])
