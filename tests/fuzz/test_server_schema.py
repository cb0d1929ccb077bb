"""The server's /v1/saga by its own OpenAPI description, over a scheduler with agents on it."""

from __future__ import annotations

import asyncio
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import app_of
from under_pressure import BLOCKS, calls

from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import make_scheduler

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def busy_scheduler() -> Any:
    """Some calls run, some are held, some have ended."""
    scheduler = make_scheduler("saga", blocks=BLOCKS)
    driver, arrivals = Driver(scheduler), calls()
    for step in range(30):
        for call in arrivals.get(step, ()):
            driver.add(make_request(**call))
        driver.step()
        driver.now += 0.02
    assert scheduler.saga.residency.held_calls
    return scheduler


SCHEDULER = busy_scheduler()
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", asyncio.run(app_of(SCHEDULER)))


@SCHEMA.parametrize()
@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
def test_whatever_is_asked_is_answered_as_described(case):
    case.call_and_validate(checks=CHECKS)
    assert SCHEDULER.saga is not None and SCHEDULER.saga_failures == 0
