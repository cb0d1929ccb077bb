"""A pytest plugin for vLLM's own tests: records outcomes and, if asked, swaps our scheduler in.

Loaded with `-p swap_plugin` by run.py. Environment:
  SAGA_UPSTREAM_MODE     stock, or saga: `Scheduler` and `AsyncScheduler` become ours
  SAGA_UPSTREAM_REPORT   file for the outcomes
  SAGA_UPSTREAM_STRESS   1: every request is its own session, and saga is on even where prefix
                         caching is off (normally it then leaves everything to stock); it holds no
                         call, because the tests assert that calls start under KV pressure
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import vllm.v1.core.sched as sched_package
from vllm.v1.core.sched import async_scheduler, scheduler

from vllm_saga.config import load_config
from vllm_saga.engine import compat

MODE = os.environ["SAGA_UPSTREAM_MODE"]
REPORT = Path(os.environ["SAGA_UPSTREAM_REPORT"])
STRESS = os.environ.get("SAGA_UPSTREAM_STRESS") == "1"

outcomes: dict[str, str] = {}
policy_failures: list[str] = []
made = {"stock": 0, "saga": 0, "saga on": 0}

# Later phases may only make an outcome worse.
_SEVERITY = ["passed", "xpassed", "skipped", "xfailed", "failed", "error"]


class PolicyFailures(logging.Handler):
    """A failing policy falls back to stock behaviour, which would let a broken one pass."""

    def emit(self, record: logging.LogRecord) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "?")
        detail = repr(record.exc_info[1]) if record.exc_info else record.getMessage()
        policy_failures.append(f"{test}: {detail}")


def count_instances(cls: type[Any], kind: str) -> None:
    original = cls.__init__

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is not cls:
            return
        made[kind] += 1
        if kind == "saga":
            if STRESS and self.saga is None:
                self._install(load_config(None))
            made["saga on"] += self.saga is not None

    cls.__init__ = counting  # type: ignore[misc]


def force_sessions(cls: type[Any]) -> None:
    original = cls.add_request

    def with_session(self: Any, request: Any) -> Any:
        if getattr(request, "session_id", None) is None:
            request.session_id = request.request_id
        return original(self, request)

    cls.add_request = with_session


def swap() -> None:
    # Upstream's own subclasses must be built on stock classes before the names are rebound.
    for module in pkgutil.iter_modules(sched_package.__path__):
        importlib.import_module(f"vllm.v1.core.sched.{module.name}")
    from vllm_saga.engine.scheduler import SagaAsyncScheduler, SagaSyncScheduler

    for cls in (SagaSyncScheduler, SagaAsyncScheduler):
        count_instances(cls, "saga")
        if STRESS:
            force_sessions(cls)
    scheduler.Scheduler = SagaSyncScheduler  # type: ignore[misc]
    async_scheduler.AsyncScheduler = SagaAsyncScheduler  # type: ignore[misc]
    handler = PolicyFailures(level=logging.ERROR)
    logging.getLogger("vllm.saga").addHandler(handler)


if MODE == "saga":
    swap()
elif MODE == "stock":
    count_instances(scheduler.Scheduler, "stock")
    count_instances(async_scheduler.AsyncScheduler, "stock")
else:
    raise ValueError(f"SAGA_UPSTREAM_MODE: {MODE!r} is neither stock nor saga")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Upstream's marker against a slow clean-up of accelerators after each test.
    for item in items:
        item.add_marker(pytest.mark.skip_global_cleanup)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        outcomes[report.nodeid] = "error"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome: str = report.outcome
    if report.failed and report.when != "call":
        outcome = "error"
    elif hasattr(report, "wasxfail"):
        outcome = "xfailed" if report.skipped else "xpassed"
    worst = max(outcome, outcomes.get(report.nodeid, "passed"), key=_SEVERITY.index)
    outcomes[report.nodeid] = worst


def pytest_sessionfinish() -> None:
    report = {
        "outcomes": outcomes,
        "made": made,
        "policy_failures": policy_failures,
        "hooks": sorted(compat.HOOKS),
    }
    REPORT.write_text(json.dumps(report, indent=1))
