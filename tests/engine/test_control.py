"""Messages into the engine: reports, ends, and what an engine says that schedules as stock."""

from __future__ import annotations

import sys
from typing import get_args, get_type_hints

import msgspec
import pytest
from core_calls import through_core
from test_equivalence import multi_turn
from vllm.v1.request import RequestStatus

from vllm_saga.engine import control
from vllm_saga.policy.explain import STATES
from vllm_saga.router.reports import parse_state
from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import make_scheduler


def run(scheduler, steps: int = 40) -> Driver:
    """Twelve sessions with ids on a pool too small for them, stopped half-way."""
    script = multi_turn(seed=2, sessions=12, turns=6, with_ids=True)
    driver = Driver(scheduler)
    for step in range(steps):
        for call in script.arrivals.get(step, []):
            call = dict(call)
            driver.add(make_request(call.pop("request_id"), **call))
        driver.step()
        driver.now += 0.02
    return driver


def asked(scheduler, op: str = control.STATE, **payload: object):
    """As vLLM asks: through the core, and answered in plain values only."""
    return through_core(scheduler, op, payload)


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_busy_engine_reports_what_a_router_reads(overlapping):
    scheduler = make_scheduler("saga", blocks=60, overlapping=overlapping)
    run(scheduler)
    told = asked(scheduler)
    report = parse_state(msgspec.json.encode(told), at=1.0)
    assert report.running == len(scheduler.running) > 0
    assert report.waiting == len(scheduler.waiting) > 0
    assert report.resident == len(scheduler.saga.residency.residents) > 0
    assert report.used_tokens > 0 and 0 < report.kv_tokens <= 59 * 16
    assert len(report.held_calls) == scheduler.saga.residency.held_calls > 0
    held = {request.session_id for request in scheduler.waiting}
    assert {call.session for call in report.held_calls} <= held
    assert report.sessions and told["saga"] == scheduler.saga.state()


def test_a_session_ends_and_its_blocks_are_the_first_to_go():
    scheduler = make_scheduler("saga", blocks=60)
    driver = Driver(scheduler)
    for name in ("a", "b"):
        tokens = [ord(name)] * 200
        driver.add(make_request(name, tokens, 4, session_id=name))
        driver.drain(100, dt=0.02)
    assert asked(scheduler, control.END, tenant="", session="b") == {"ended": True}
    assert asked(scheduler, control.END, tenant="", session="b") == {"ended": False}
    assert asked(scheduler, control.END, tenant="x", session="a") == {"ended": False}
    assert [name for _, name in asked(scheduler)["sessions"]] == ["a"]
    # Larger than what is left: stock would evict the older one.
    driver.add(make_request("c", [99] * 600, 4, session_id="c"))
    driver.drain(100, dt=0.02)
    hits = {}
    for name in ("a", "b"):
        again = make_request(f"{name}2", [ord(name)] * 200, 4)
        hits[name] = scheduler.kv_cache_manager.get_computed_blocks(again)[1]
    assert hits["a"] == 192 and hits["b"] < 192


def test_a_run_of_the_engine_has_a_name_that_a_reset_changes():
    scheduler, other = make_scheduler("saga"), make_scheduler("saga")
    started = asked(scheduler)["started"]
    assert asked(scheduler)["started"] == started != asked(other)["started"]
    assert scheduler.reset_prefix_cache()
    assert asked(scheduler)["started"] != started


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_an_engine_that_schedules_as_stock_still_reports(prefix_caching):
    scheduler = make_scheduler("saga", blocks=101, prefix_caching=prefix_caching)
    scheduler.saga = None
    driver = Driver(scheduler)
    driver.add(make_request("a", list(range(160)), 50))
    driver.step()
    told = asked(scheduler)
    assert told["running"] == 1 and told["kv_tokens"] == 1600
    assert told["used_tokens"] == pytest.approx(160, abs=32)
    assert told["held_calls"] == told["sessions"] == []
    assert asked(scheduler, control.END, tenant="", session="s") == {"ended": False}


def test_a_fault_in_a_report_leaves_the_engine_serving(monkeypatch):
    scheduler = make_scheduler("saga", blocks=60)
    driver = run(scheduler)
    monkeypatch.setattr(scheduler.saga, "state", lambda: 1 / 0)
    assert asked(scheduler)["saga"] == {}
    assert scheduler.saga_failures == 1
    driver.drain(20_000, dt=0.02)


@pytest.mark.parametrize(
    "op, payload", [("stop", {}), (control.END, {}), (control.END, {"tenant": "", "session": 1})]
)
def test_other_messages_are_refused(op, payload):
    with pytest.raises(ValueError, match="no such message"):
        asked(make_scheduler("saga"), op, **payload)


def test_without_an_engine_core_there_is_nothing_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm.v1.engine.core")
    control.install()
    assert "vllm.v1.engine.core" not in sys.modules


def test_every_workflow_of_a_busy_engine_is_told_as_the_scheduler_has_it():
    scheduler = make_scheduler("saga", blocks=60)
    run(scheduler)
    told = asked(scheduler, control.WORKFLOWS, limit=100)
    assert told["scheduler"] == "saga" and told["running"] == len(scheduler.running)
    assert told["waiting"] == len(scheduler.waiting)
    running = {request.session_id for request in scheduler.running}
    by_state = {state: set() for state in STATES}
    for workflow in told["workflows"]:
        by_state[workflow["state"]].add(workflow["id"])
    assert by_state["running"] == running
    assert len(by_state["held"]) == scheduler.saga.residency.held_workflows > 0
    assert told["pool"]["residents"] == len(scheduler.saga.residency.residents)
    name = next(iter(by_state["held"]))
    held = asked(scheduler, control.WORKFLOW, name=name)["workflow"]
    assert held["waits_for"]["runs_within_s"] > 0 and held["decisions"]
    assert asked(scheduler, control.WORKFLOW, name=name, tenant="else")["workflow"] is None
    assert asked(scheduler, control.WORKFLOWS, tenant="else")["total"] == 0


def test_the_first_held_enters_when_the_one_it_waits_for_has_gone():
    scheduler = make_scheduler("saga", blocks=60)
    driver = Driver(scheduler)
    for name in ("a", "b"):
        driver.add(make_request(name, [ord(name)] * 600, 30, session_id=name))
    driver.step()
    (held,) = asked(scheduler, control.WORKFLOWS, state="held")["workflows"]
    assert held["id"] == "b" and held["waits_for"]["what"] == "room"
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    asked(scheduler, control.END, tenant="", session="a")
    assert asked(scheduler, control.WORKFLOW, name="b")["workflow"]["waits_for"]["what"] == "step"
    driver.step()
    assert asked(scheduler, control.WORKFLOW, name="b")["workflow"]["state"] == "running"


def test_an_engine_that_schedules_as_stock_has_no_workflows():
    scheduler = make_scheduler("saga", blocks=60)
    scheduler.saga = None
    assert asked(scheduler, control.WORKFLOWS) == {
        "scheduler": "stock",
        "running": 0,
        "waiting": 0,
    }
    assert asked(scheduler, control.WORKFLOW, name="s") == {"workflow": None}


def test_a_question_that_fails_costs_the_answer_only(monkeypatch):
    scheduler = make_scheduler("saga", blocks=60)
    driver = run(scheduler)
    monkeypatch.setattr(scheduler.saga.share, "line", lambda now: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asked(scheduler, control.WORKFLOWS)
    assert scheduler.saga is not None and not scheduler.saga_failures
    driver.drain(20_000, dt=0.02)


@pytest.mark.parametrize(
    "payload", [{"limit": -1}, {"limit": 501}, {"state": "ill"}, {"tenant": 1}]
)
def test_listings_of_something_else_are_refused(payload):
    with pytest.raises(ValueError, match=r"Expected|Invalid"):
        asked(make_scheduler("saga"), control.WORKFLOWS, **payload)


def test_every_state_can_be_asked_for():
    states = get_type_hints(control.Listing)["state"]
    assert set(get_args(get_args(states)[0])) == set(STATES)
