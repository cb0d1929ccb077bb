"""Parts of the policy at work together: tenants, sub-agents, deadlines, an idle engine."""

from __future__ import annotations

import pytest
from helpers import BLOCK, arrival, check_integrity, learn_costs, make_policy, prompt, run_call

from vllm_saga.policy.hints import Hint
from vllm_saga.policy.toolgraph import SUBAGENTS


def timed(**knobs):
    """A policy whose engine is known to prefill 10,000 tokens a second."""
    policy = make_policy(pool_blocks=100, headroom=0.0, **knobs)
    learn_costs(policy)
    return policy


def finish(policy, call_id, now):
    call = policy.calls[call_id]
    policy.on_finish(call_id, call.prompt_tokens, now)


def waiting_line(policy, tenants, at):
    """One held workflow for each of `tenants`, in that order of arrival."""
    for number, tenant in enumerate(tenants):
        call = arrival(f"{tenant}{number}", prompt(10 + number, 60), f"w{number}", tenant=tenant)
        policy.on_arrival(call, at + 0.01 * number)
        assert policy.is_held(call.call_id)


@pytest.mark.parametrize("window_s, first", [(0.0, "quiet1"), (1e9, "busy0")])
def test_the_tenant_that_was_served_least_enters_first(window_s, first):
    policy = timed(tenant_source="saga_tenant", fair_window_s=window_s)
    policy.on_arrival(arrival("big", prompt(1, 90), "big", tenant="busy", last=True), 0.0)
    policy.on_scheduled("big", 0)
    waiting_line(policy, ["busy", "quiet"], 1.0)
    finish(policy, "big", 30.0)
    assert policy.on_step(30.0) == [first]
    check_integrity(policy)


def test_a_resident_pays_for_the_pool_it_holds_only_while_others_wait():
    policy = timed()
    run_call(policy, arrival("a", prompt(1, 50), "a", tenant="x"), [], 0.0)
    policy.on_arrival(arrival("a2", [*prompt(1, 50), 1], "a", tenant="x"), 10.0)
    account = policy.share.state()["x"]
    assert account["pool_s"] == pytest.approx(0.5 * 10.0)
    assert account["virtual_s"] == 0.0


def test_a_held_workflow_pays_nothing():
    policy = timed()
    policy.on_arrival(arrival("a", prompt(1, 80), "a", tenant="x", last=True), 0.0)
    policy.on_arrival(arrival("b", prompt(2, 80), "b", tenant="y"), 0.0)
    assert policy.is_held("b")
    finish(policy, "a", 100.0)
    assert policy.on_step(100.0) == ["b"]
    finish(policy, "b", 101.0)
    assert policy.share.state()["y"]["pool_s"] < 1.0


def test_cached_tokens_are_not_charged():
    def charged(cached):
        policy = timed()
        policy.on_arrival(arrival("a", prompt(1, 50), "a", tenant="x"), 0.0)
        policy.on_scheduled("a", cached)
        finish(policy, "a", 0.0)
        return policy.share.state()["x"]["gpu_s"]

    assert charged(0) > 5 * charged(49 * BLOCK)


def test_sub_agents_are_on_the_bill_of_their_root_and_join_it():
    policy = timed()
    run_call(policy, arrival("r1", prompt(1, 10), "root", tenant="x"), [], 0.0, 1.0)
    for child in ("c1", "c2"):
        call = arrival(child, prompt(2, 5), child, tenant="x", parent_id="root")
        run_call(policy, call, [], 2.0, 3.0)
    root = policy.table.sessions["x", "root"].workflow
    assert policy.table.sessions["x", "c1"].workflow is root
    policy.on_arrival(arrival("r2", [*prompt(1, 10), 1], "root", tenant="x"), 4.0)
    context = policy.calls["r2"].context
    assert context.tool == SUBAGENTS
    assert dict(root.agent.tools.items())[SUBAGENTS].gaps.returns == 1.0


def test_the_nearer_deadline_goes_first_within_the_window():
    policy = timed(fair_window_s=1e9)
    policy.on_arrival(arrival("big", prompt(1, 95), "big", last=True), 0.0)
    for name, deadline_s in (("calm", 10_000.0), ("urgent", 30.0)):
        call = arrival(
            name, prompt(len(name), 60), name, tenant=name, hint=Hint(deadline_s=deadline_s)
        )
        policy.on_arrival(call, 1.0)
    finish(policy, "big", 2.0)
    assert policy.on_step(2.0) == ["urgent"]


def test_an_idle_engine_waits_no_longer_than_computing_again_would_take():
    policy = timed(patience=1.0)
    run_call(policy, arrival("a", prompt(1, 70), "s1"), [], 0.0)
    again_s = policy.cost.prefill_s(70 * BLOCK)
    policy.on_arrival(arrival("b", prompt(2, 70), "s2"), 0.5)
    assert policy.on_step(0.5 + 0.9 * again_s) == []
    assert policy.on_step(0.5 + 1.1 * again_s) == ["b"]
    # Its place was taken, but it has not ended: nothing of the kind is learned.
    assert policy.table.sessions["", "s1"].workflow.stale is False
    check_integrity(policy)
