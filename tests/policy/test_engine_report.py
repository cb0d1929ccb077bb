"""What a router is told of the policy, and sessions that a client ends."""

from __future__ import annotations

import pytest
from helpers import BLOCK, arrival, check_integrity, make_policy, run_call
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.identity import salt_tenant
from vllm_saga.policy.report import MAX_HELD_CALLS, MAX_SESSIONS, end_session, report
from vllm_saga.policy.stepfit import Step

PROMPT = list(range(40))


def own(number: int, length: int = 40) -> list[int]:
    return [1000 * (number + 1) + i for i in range(length)]


def full(policy, sessions: int = 3):
    """A pool of 100 blocks in which `sessions` calls with 60 blocks each want to run."""
    for number in range(sessions):
        call = arrival(f"c{number}", own(number, 60 * BLOCK), f"s{number}", tenant="t")
        policy.on_arrival(call, float(number))
    return policy


def test_a_report_speaks_of_tokens_and_of_who_is_where():
    policy = full(make_policy(tenant_source="saga_tenant", headroom=0.0))
    told = report(policy, 10.0)
    assert told["kv_tokens"] == 100 * BLOCK
    assert 60 * BLOCK <= told["used_tokens"] <= 100 * BLOCK
    assert told["resident"] == 1
    assert told["sessions"] == [("t", "s0")]
    assert told["held_calls"] == [
        {"tenant": "t", "session": "s1", "new": True, "held_s": 9.0, "tokens": 60 * BLOCK},
        {"tenant": "t", "session": "s2", "new": True, "held_s": 8.0, "tokens": 60 * BLOCK},
    ]
    assert told["saga"] == policy.state()


def test_a_session_that_has_computed_here_is_not_new_when_it_is_held():
    policy = make_policy(headroom=0.0)
    context = run_call(policy, arrival("a", own(9), "old"), [7] * 9, 0.0)
    policy.residency.leave(policy.table.sessions["", "old"].workflow)
    full(policy, 2)
    policy.on_arrival(arrival("b", [*context, *own(5, 60 * BLOCK)], "old"), 3.0)
    held = {call["session"]: call["new"] for call in report(policy, 4.0)["held_calls"]}
    assert held == {"s1": True, "old": False}


def test_sessions_that_nobody_named_are_left_out():
    policy = make_policy(pool_blocks=1000)
    context = run_call(policy, arrival("a", PROMPT), [7] * 9, 0.0)
    run_call(policy, arrival("b", [*context, 1, 2]), [7] * 9, 1.0)
    assert len(policy.table.sessions) == 1
    assert report(policy, 2.0)["sessions"] == []


def test_a_salt_is_never_told():
    policy = make_policy(pool_blocks=1000)
    for number, salt in enumerate(("secret", "other", "")):
        run_call(policy, arrival(f"c{number}", own(number), "s", tenant=salt), [7] * 9, 0.0)
    tenants = [tenant for tenant, _ in report(policy, 1.0)["sessions"]]
    assert len(set(tenants)) == 3 and "" in tenants
    assert "secret" not in str(report(policy, 1.0))
    assert not end_session(policy, "salt:", "s", 2.0)
    assert end_session(policy, salt_tenant("other"), "s", 2.0)
    assert {tenant for tenant, _ in policy.table.sessions} == {"secret", ""}


def test_the_lists_are_bounded_and_hold_the_latest():
    policy = make_policy(pool_blocks=100_000, headroom=0.0)
    for number in range(MAX_SESSIONS + 50):
        run_call(policy, arrival(f"c{number}", own(number), f"s{number}"), [7], float(number))
    sessions = report(policy, 2000.0)["sessions"]
    assert len(sessions) == MAX_SESSIONS and sessions[0] == ("", f"s{MAX_SESSIONS + 49}")
    policy = full(make_policy(headroom=0.0), MAX_HELD_CALLS + 50)
    held = report(policy, 2000.0)["held_calls"]
    assert len(held) == MAX_HELD_CALLS
    assert held[-1]["session"] == f"s{MAX_HELD_CALLS + 49}"
    assert [call["held_s"] for call in held] == sorted((c["held_s"] for c in held), reverse=True)


def test_the_prefill_speed_is_what_was_measured_and_0_before():
    policy = make_policy()
    assert report(policy, 0.0)["prefill_tokens_per_s"] == 0.0
    for number in range(400):
        new = 100 + 400 * (number % 7)
        policy.cost.observe(Step(new, new * new // 2, 0), 0.01 + new / 20_000, 0.1)
    assert report(policy, 0.0)["prefill_tokens_per_s"] == pytest.approx(20_000, rel=0.2)


def test_an_idle_session_ends_at_once_and_its_room_is_free():
    policy = make_policy(pool_blocks=1000)
    run_call(policy, arrival("a", own(1), "s", tenant="t"), [7] * 9, 0.0)
    context = next(policy.table.sessions["t", "s"].workflow.contexts())
    assert not end_session(policy, "other", "s", 1.0) and not end_session(policy, "t", "x", 1.0)
    assert not context.dead
    assert end_session(policy, "t", "s", 1.0)
    assert context.dead and not policy.table.sessions and not policy.residency.residents
    assert not policy.table.idle and policy.residency.used_blocks == 0
    assert not end_session(policy, "t", "s", 2.0)
    check_integrity(policy)


def test_a_session_with_a_call_in_flight_ends_with_it():
    policy = make_policy(pool_blocks=1000)
    policy.on_arrival(arrival("a", own(1), "s"), 0.0)
    assert end_session(policy, "", "s", 1.0)
    assert policy.table.sessions
    policy.on_finish("a", 50, 2.0)
    assert not policy.table.sessions and not policy.residency.residents


def test_the_end_of_a_sub_agent_leaves_its_workflow():
    policy = make_policy(pool_blocks=1000)
    run_call(policy, arrival("a", own(1), "root"), [7] * 9, 0.0)
    run_call(policy, arrival("b", own(2), "child", parent_id="root"), [7] * 9, 1.0)
    workflow = policy.table.sessions["", "root"].workflow
    used = policy.residency.used_blocks
    assert end_session(policy, "", "child", 2.0)
    assert workflow.resident and list(workflow.sessions) == [("", "root")]
    assert policy.residency.used_blocks < used
    check_integrity(policy)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["arrive", "finish", "end", "step"]),
            st.integers(0, 4),
            st.integers(0, 2),
        ),
        max_size=60,
    )
)
def test_ends_at_any_time_keep_the_books(events):
    policy = make_policy(headroom=0.0, max_hold_s=30.0)
    calls: list[str] = []
    for number, (event, session, parent) in enumerate(events):
        now = float(number)
        if event == "arrive":
            calls.append(f"c{number}")
            prompt = own(session, 20 + 4 * number)
            parent_id = f"s{parent}" if parent < session else None
            policy.on_arrival(arrival(calls[-1], prompt, f"s{session}", parent_id=parent_id), now)
        elif event == "finish" and calls:
            policy.on_finish(calls.pop(session % len(calls)), 30 + 4 * number, now)
        elif event == "end":
            end_session(policy, "", f"s{session}", now)
        policy.on_step(now)
        told = report(policy, now)
        assert len(told["held_calls"]) == policy.residency.held_calls
        check_integrity(policy)
    for number, call in enumerate(calls):
        policy.on_finish(call, 30, 1000.0 + number)
    for session in range(5):
        end_session(policy, "", f"s{session}", 2000.0)
    assert not policy.table.sessions and policy.residency.used_blocks == 0
