"""Messages into the engine: reports, ends, and what an engine says that schedules as stock."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import msgspec
import pytest
from test_equivalence import multi_turn
from vllm.v1.engine.core import EngineCore

from vllm_saga.engine import control
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


def asked(scheduler, op: str = control.STATE, **payload: str):
    """As vLLM asks: through the core, and answered in plain values only."""
    control.install()
    core = SimpleNamespace(scheduler=scheduler)
    answer = EngineCore.saga_control(core, op, payload)
    return msgspec.msgpack.decode(msgspec.msgpack.encode(answer))


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
    assert {call.session[1] for call in report.held_calls} <= held
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
