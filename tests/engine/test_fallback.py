"""Invariant 4: whatever fails in the policy, the engine goes on as stock."""

from __future__ import annotations

import logging

import pytest
from test_equivalence import multi_turn

from vllm_saga.engine import scheduler as adapter
from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import make_scheduler


class Fault(Exception):
    pass


def fail(*args, **kwargs):
    raise Fault


METHODS = [
    "on_arrival", "on_finish", "on_step", "is_held", "owner", "keep_ranks", "rank_epoch", "reset",
]  # fmt: skip


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_fault_anywhere_leaves_the_engine_serving(method, overlapping, monkeypatch):
    script = multi_turn(seed=4, sessions=12, turns=5, with_ids=True)
    scheduler = make_scheduler("saga", blocks=60, overlapping=overlapping)
    driver = Driver(scheduler)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    adapter.logger.addHandler(handler)
    calls = 0
    try:
        for step in range(script.steps):
            if step == 30:
                assert scheduler.saga.residency.held_calls, "nothing held: the fault would be idle"
                monkeypatch.setattr(scheduler.saga, method, fail)
            for call in script.arrivals.get(step, []):
                call = dict(call)
                driver.add(make_request(call.pop("request_id"), **call))
                calls += 1
            driver.step()
            driver.now += 0.02
        driver.drain(20_000, dt=0.02)
        if method == "reset":
            assert scheduler.reset_prefix_cache()
    finally:
        adapter.logger.removeHandler(handler)
    assert len(driver.finished) == calls
    assert scheduler.saga is None and scheduler.saga_failures == 1
    errors = [record for record in records if record.levelno >= logging.ERROR]
    assert len(errors) == 1 and errors[0].exc_info[0] is Fault
