"""What has ended lately: every call once, in order, to those who may know."""

from __future__ import annotations

import json

from helpers import arrival, make_policy, run_call

from vllm_saga.policy import timeline
from vllm_saga.policy.explain import Explainer
from vllm_saga.policy.identity import salt_tenant
from vllm_saga.policy.report import end_session
from vllm_saga.policy.timeline import PastCall, PastWorkflow, past_workflow


def past(policy, now: float, within_s: float = 1e9, limit: int = 100, tenant: str | None = None):
    told = Explainer(policy, now, frozenset(), tenant).past(within_s, limit)
    json.dumps(told)
    return told["events"]


def test_calls_and_their_workflow_in_the_order_of_their_ends():
    policy = make_policy()
    tokens = run_call(policy, arrival("a", list(range(10)), "s"), [1, 2], 1.0, 3.0)
    policy.on_arrival(arrival("b", [*tokens, 5], "s"), 10.0)
    policy.on_scheduled("b", 8)
    policy.on_finish("b", 15, 12.0, ["grep"])
    end_session(policy, "", "s", 20.0)
    workflow, second, first = past(policy, 30.0)
    assert (first["arrived_ago_s"], first["let_in_ago_s"], first["ended_ago_s"]) == (29, 29, 27)
    assert (second["prompt_tokens"], second["cached_tokens"], second["output_tokens"]) == (13, 8, 2)
    assert second["tool"] == "grep" and second["session"] == second["id"] == "s"
    assert workflow["what"] == "workflow" and workflow["calls"] == 2
    assert (workflow["began_ago_s"], workflow["ended_ago_s"]) == (29, 18)
    assert [event["number"] for event in (first, second, workflow)] == [0, 1, 2]


def test_a_hold_lies_between_arrival_and_being_let_in():
    policy = make_policy(pool_blocks=20, headroom=0.0, patience=1.0)
    policy.on_arrival(arrival("a", list(range(60)), "a"), 0.0)
    for name in ("b", "c"):
        policy.on_arrival(arrival(name, list(range(100, 150)), name), 1.0)
    policy.on_finish("c", 50, 4.0)
    policy.on_finish("a", 60, 5.0)
    end_session(policy, "", "a", 5.0)
    assert policy.on_step(6.0) == ["b"]
    policy.on_finish("b", 52, 9.0)
    calls = {e["id"]: e for e in past(policy, 10.0) if e["what"] == "call"}
    assert calls["c"]["let_in_ago_s"] is None and calls["c"]["arrived_ago_s"] == 9
    assert (calls["b"]["arrived_ago_s"], calls["b"]["let_in_ago_s"]) == (9, 4)


def test_sub_agents_go_by_their_root_which_may_have_ended():
    policy = make_policy()
    run_call(policy, arrival("a", list(range(10)), "root"), [1], 1.0, 2.0)
    policy.on_arrival(arrival("b", list(range(50, 60)), "child", parent_id="root"), 3.0)
    end_session(policy, "", "root", 4.0)
    policy.on_finish("b", 11, 5.0)
    assert [(e["id"], e["session"]) for e in past(policy, 6.0)] == [
        ("root", "child"),
        ("root", "root"),
    ]


def test_each_tenant_is_told_of_its_own_and_salts_of_nobody():
    policy = make_policy()
    run_call(policy, arrival("a", list(range(10)), "s", tenant="salt"), [1], 1.0)
    run_call(policy, arrival("b", list(range(50, 60)), "s", tenant="other"), [1], 1.0)
    (mine,) = past(policy, 2.0, tenant="salt")
    assert mine["tenant"] == salt_tenant("salt") != "salt"
    assert [mine] == past(policy, 2.0, tenant=mine["tenant"])
    assert len(past(policy, 2.0)) == 2 and past(policy, 2.0, tenant="third") == []


def test_calls_that_belong_to_nobody_are_left_out():
    policy = make_policy()
    run_call(policy, arrival("a", list(range(10))), [1], 1.0)
    assert past(policy, 2.0) == []


def test_the_horizon_the_limit_and_a_presumed_end():
    policy = make_policy(session_idle_s=100.0)
    for i in range(5):
        start = 1000 * i
        run_call(policy, arrival(f"c{i}", list(range(start, start + 10)), f"s{i}"), [1], float(i))
    assert [e["id"] for e in past(policy, 10.0, within_s=7.0)] == ["s4", "s3"]
    assert [e["id"] for e in past(policy, 10.0, limit=1)] == ["s4"]
    policy.on_step(90.0)
    assert all(e["what"] == "call" for e in past(policy, 90.0))
    policy.on_step(101.5)
    assert [e["id"] for e in past(policy, 101.5) if e["what"] == "workflow"] == ["s1", "s0"]


def test_who_follows_it_misses_nothing_that_is_kept(monkeypatch):
    monkeypatch.setattr(timeline, "MAX_EVENTS", 64)
    policy = make_policy()
    run_call(policy, arrival("a", list(range(10)), "s"), [1], 1.0)
    seen = policy.timeline.count
    run_call(policy, arrival("b", list(range(50, 60)), "t", last=True), [1], 2.0)
    call, workflow = policy.timeline.since(seen)
    assert isinstance(call, PastCall) and call.call_id == "b"
    assert isinstance(workflow, PastWorkflow) and workflow.root == ("", "t")
    for i in range(64):
        run_call(policy, arrival(f"x{i}", list(range(10)), "s"), [1], 3.0)
    kept = policy.timeline.since(seen)
    assert [event.call_id for event in kept] == [f"x{i}" for i in range(64)]
    assert policy.timeline.since(policy.timeline.count) == []


def test_a_call_knows_when_its_workflow_began_and_an_open_workflow_that_it_is():
    policy = make_policy()
    tokens = run_call(policy, arrival("a", list(range(10)), "s"), [1], 5.0, 6.0)
    run_call(policy, arrival("b", [*tokens, 3], "s"), [1], 8.0, 9.0)
    assert [call.workflow_began_at for call in policy.timeline.since(0)] == [5.0, 5.0]
    (session,) = policy.table.sessions.values()
    still = past_workflow(session.workflow, 20.0, open=True)
    assert (still.began_at, still.ended_at, still.calls, still.open) == (5.0, 20.0, 2, True)
    end_session(policy, "", "s", 21.0)
    ended = policy.timeline.since(2)[0]
    assert (ended.ended_at, ended.open, ended.workflow) == (9.0, False, still.workflow)
