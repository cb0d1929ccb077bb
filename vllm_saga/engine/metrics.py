"""The stat logger that puts the engine's reports on vLLM's own `/metrics`.

vLLM loads it in every API server (entry point `vllm.stat_logger_plugins`). A report goes to one of
them, and counters travel as what was added: so with several ranks and several API servers sums are
right, and gauges are those of the latest report.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_saga.engine import series, stats
from vllm_saga.plugin import SCHEDULER_NAME

logger = logging.getLogger("vllm.saga")

_LABELS = ("model_name", "engine")


class EngineMetrics:
    """Prometheus' side of `series.ALL`, for the engines of one API server."""

    def __init__(
        self, model_name: str, engines: Sequence[int], registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._model_name = model_name
        self._metrics = {s.name: _make(s, registry) for s in series.ALL}
        for each in series.ALL:
            if each.kind != "gauge":
                for engine in engines:
                    for value in each.values:
                        self._child(each.name, engine, value)

    def record(self, report: stats.Report, engine: int) -> None:
        """Take over what one engine reports."""
        for name, gauges in report.gauges.items():
            for label, value in gauges.items():
                self._child(name, engine, label).set(value)
        for name, counters in report.counters.items():
            for label, amount in counters.items():
                self._child(name, engine, label).inc(amount)
        for name, distributions in report.values.items():
            for label, values in distributions.items():
                child = self._child(name, engine, label)
                for value in values:
                    child.observe(value)

    def _child(self, name: str, engine: int, label: str) -> Any:
        values = (self._model_name, str(engine))
        metric = self._metrics[name]
        return metric.labels(*values, label) if label else metric.labels(*values)


def _make(each: series.Series, registry: CollectorRegistry) -> Any:
    name = series.PREFIX + each.name
    labels = (*_LABELS, each.label) if each.label else _LABELS
    if each.kind == "gauge":
        return Gauge(name, each.meaning, labels, registry=registry, multiprocess_mode="mostrecent")
    if each.kind == "counter":
        return Counter(name, each.meaning, labels, registry=registry)
    return Histogram(name, each.meaning, labels, registry=registry, buckets=each.buckets)


class SagaStatLogger(AggregateStatLoggerBase):
    """vLLM's interface. Where no engine runs saga it registers nothing and does nothing."""

    def __init__(self, vllm_config: Any, engine_indexes: Sequence[int]) -> None:
        self._config = vllm_config
        self._engines = engine_indexes
        self._metrics: EngineMetrics | None = None
        self._broken = False

    def log_engine_initialized(self) -> None:
        # Not before: to begin with, vLLM's own logger removes whatever is called `vllm:...`.
        if _runs_saga(self._config.scheduler_config.scheduler_cls):
            self._register()

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None or self._broken:
            return
        try:
            report = stats.take(scheduler_stats)
            if report is not None:
                self._register().record(report, engine_idx)
        except Exception:
            # What is raised here would end vLLM's output loop.
            self._broken = True
            logger.exception("saga: no metrics from here on. Please report this.")

    def _register(self) -> EngineMetrics:
        if self._metrics is None:
            name = self._config.model_config.served_model_name
            self._metrics = EngineMetrics(name, self._engines)
        return self._metrics


def _runs_saga(scheduler_cls: Any) -> bool:
    path = getattr(scheduler_cls, "__module__", scheduler_cls) or ""
    return path == SCHEDULER_NAME or path.split(".")[0] == "vllm_saga"
