"""What the router tells of itself: there from the start, and right."""

from __future__ import annotations

import time

from prometheus_client.parser import text_string_to_metric_families

from vllm_saga.router.backends import Address, Backends
from vllm_saga.router.fleet import EngineReport, HeldCall
from vllm_saga.router.health import Health
from vllm_saga.router.metrics import Metrics
from vllm_saga.router.replicas import BasePlacer


def read(metrics: Metrics) -> dict[tuple[str, str], float]:
    """(sample, value of its label) -> value."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_what_has_not_happened_is_told_as_none():
    told = read(Metrics(Backends(BasePlacer(), Health), lambda: 2))
    assert told["saga_router_policy_errors_total", ""] == 2
    for name, label in (
        ("answers_total", "5xx"),
        ("moves_total", "cached"),
        ("retries_total", "died"),
        ("refused_total", "no_backend"),
        ("move_cost_seconds_total", ""),
    ):
        assert told[f"saga_router_{name}", label] == 0


def test_backends_are_told_as_they_report():
    backends = Backends(BasePlacer(), Health)
    metrics = Metrics(backends, lambda: 0)
    reporting = backends.add(Address.parse("http://a:1"))
    backends.add(Address.parse("http://b:1"))
    held = (HeldCall("", "s", True, 1.0, 10),)
    reporting.report = EngineReport(
        time.monotonic() - 5.0, "run", 1000, 250, running=3, waiting=2, resident=4, held_calls=held
    )
    reporting.in_flight = 7
    told = read(metrics)
    for name, value in (
        ("in_flight", 7), ("kv_used", 0.25), ("held", 1), ("running", 3), ("waiting", 2),
        ("resident", 4), ("up", 0), ("draining", 0),
    ):  # fmt: skip
        assert told[f"saga_router_backend_{name}", "a:1"] == value
    assert 5.0 <= told["saga_router_backend_report_age_seconds", "a:1"] < 60.0
    assert ("saga_router_backend_held", "b:1") not in told
    backends.remove(reporting)
    assert not any(label == "a:1" for _, label in read(metrics))
