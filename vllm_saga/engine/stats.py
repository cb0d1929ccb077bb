"""Numbers out of the scheduler, on vLLM's own way to the API server.

vLLM's typed decoder drops every field that `SchedulerStats` has not. So what is measured travels as
one key of a dictionary that only engines with LoRA fill; engine/metrics.py takes it out again. With
patches/ vLLM has a field for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

import msgspec
import vllm.envs as envs

from vllm_saga.engine import series
from vllm_saga.policy.fairness import OTHER
from vllm_saga.policy.report import public_key
from vllm_saga.policy.saga import SagaPolicy

#: The name of our entry point in vLLM's group of stat loggers.
LOGGER, LOGGER_GROUP = "saga", "vllm.stat_logger_plugins"
INTERVAL_S = 1.0
MAX_TENANTS = 50
OTHER_TENANTS, NO_TENANT = "(other)", "(none)"

_KEY = "\0saga:"
_MOST_CLASSES = 64

Key = tuple[str, str]
"""(series, value of its label, or empty)."""


class Report(msgspec.Struct, array_like=True):
    """What has been measured since the last one; counters are what was added."""

    gauges: dict[str, dict[str, float]]
    counters: dict[str, dict[str, float]]
    values: dict[str, dict[str, list[float]]]


def is_heard() -> bool:
    """Whether this server's front end loads our stat logger: otherwise nobody takes reports out."""
    allowed = envs.VLLM_PLUGINS
    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        return False
    if allowed is not None and LOGGER not in allowed:
        return False
    return bool(entry_points(group=LOGGER_GROUP, name=LOGGER))


def put(report: Report, stats: Any) -> None:
    """Add a report to vLLM's `SchedulerStats`."""
    if hasattr(stats, "custom_stats"):
        stats.custom_stats = {**(stats.custom_stats or {}), LOGGER: msgspec.to_builtins(report)}
        return
    stats.waiting_lora_adapters[_KEY + msgspec.json.encode(report).decode()] = 0


def take(stats: Any) -> Report | None:
    """Take the report out again; None if there is none."""
    told = (getattr(stats, "custom_stats", None) or {}).pop(LOGGER, None)
    if told is not None:
        return msgspec.convert(told, Report)
    adapters = stats.waiting_lora_adapters
    for key in adapters:
        if key.startswith(_KEY):
            del adapters[key]
            return msgspec.json.decode(key[len(_KEY) :], type=Report)
    return None


class Reporter:
    """Makes reports: one a second while the engine is busy, and one when it has nothing to do."""

    def __init__(self) -> None:
        self._next_at = 0.0
        self._untold = False
        self._told: dict[Key, float] = {}
        self._labels: dict[str, str] = {}
        self._shown: set[str] = set()
        self._served: dict[str, tuple[float, float]] = {}

    def is_due(self, now: float, idle: bool) -> bool:
        """Whether to make a report with the stats of this step."""
        due = now >= self._next_at or (idle and self._untold)
        if due:
            self._next_at = now + INTERVAL_S
        self._untold = not idle
        return due

    def make(
        self, saga: SagaPolicy | None, hints: Mapping[Any, int], failures: int, now: float
    ) -> Report:
        """saga: None where the engine schedules as stock does."""
        report = Report(
            {s.name: dict.fromkeys(s.values, 0.0) for s in series.ALL if s.kind == "gauge"}, {}, {}
        )
        totals = {(series.HINTS, str(outcome)): float(count) for outcome, count in hints.items()}
        totals[series.FAILURES, ""] = float(failures)
        if saga is not None:
            for (name, label), value in _gauges(saga, now):
                report.gauges[name][label] = value
            self._add_tenants(saga, report)
            totals |= saga.tally.sums
            for (name, label), values in saga.tally.take().items():
                report.values.setdefault(name, {})[label] = values
        for key, total in totals.items():
            _add(report, key, total - self._told.get(key, 0.0))
        self._told |= totals
        return report

    def _add_tenants(self, saga: SagaPolicy, report: Report) -> None:
        served: dict[str, tuple[float, float]] = {}
        waiting = report.gauges[series.TENANT_WAITING]
        waiting.update(dict.fromkeys(self._shown, 0.0))
        for tenant, account in saga.share.state().items():
            label = self._label(saga, tenant)
            self._shown.add(label)
            served[tenant] = now_s = (account["gpu_s"], account["pool_s"])
            before = self._served.get(tenant, (0.0, 0.0))
            # An account that was closed and opened again begins at 0.
            if now_s < before:
                before = (0.0, 0.0)
            _add(report, (series.TENANT_GPU_S, label), max(now_s[0] - before[0], 0.0))
            _add(report, (series.TENANT_POOL_S, label), max(now_s[1] - before[1], 0.0))
            waiting[label] = waiting.get(label, 0.0) + account["waiting"]
        self._served = served

    def _label(self, saga: SagaPolicy, tenant: str) -> str:
        """What a tenant is called: a name of its own for the first ones, for good."""
        label = self._labels.get(tenant)
        if label is None:
            if tenant == OTHER or len(self._labels) >= MAX_TENANTS:
                return OTHER_TENANTS
            label = self._labels[tenant] = public_key(saga, (tenant, ""))[0] or NO_TENANT
        return label


def _add(report: Report, key: Key, amount: float) -> None:
    if amount:
        name, label = key
        labels = report.counters.setdefault(name, {})
        labels[label] = labels.get(label, 0.0) + amount


def _gauges(saga: SagaPolicy, now: float) -> Iterator[tuple[Key, float]]:
    residency, table = saga.residency, saga.table
    protected = [w for w in residency.residents if not w.calls]
    held_since = (
        call.context.session.workflow.held_since
        for call in saga.calls.values()
        if call.context.session.workflow.held
    )
    yield (series.ACTIVE, ""), 1.0
    yield (series.WORKFLOWS, series.RUNNING), len(residency.residents) - len(protected)
    yield (series.WORKFLOWS, series.PROTECTED_STATE), len(protected)
    yield (series.WORKFLOWS, series.HELD), residency.held_workflows
    yield (series.WORKFLOWS, series.AWAY), len(table.idle) - len(protected)
    yield (series.SESSIONS, ""), len(table.sessions)
    yield (series.HELD_CALLS, ""), residency.held_calls
    yield (series.OLDEST_HOLD_S, ""), now - min(held_since, default=now)
    yield (series.CAPACITY, ""), residency.capacity
    yield (series.USED, ""), residency.used_blocks
    yield (
        (series.PROTECTED, ""),
        sum(residency.ledger.part_of(context) for w in protected for context in w.contexts()),
    )
    yield (series.CLASSES, ""), len(saga.classes)
    yield (series.CALIBRATION, ""), _calibration(saga)
    yield (series.JAIN, ""), saga.share.jain()


def _calibration(saga: SagaPolicy) -> float:
    """That of the classes of late, weighted by the gaps seen of each; 1 before any was."""
    lately = [agent.gaps for _, agent in saga.classes.items()][-_MOST_CLASSES:]
    known = [(gaps.returns, gaps.calibration()) for gaps in lately if gaps.returns]
    total = sum(weight for weight, _ in known)
    return sum(weight * score for weight, score in known) / total if total else 1.0
