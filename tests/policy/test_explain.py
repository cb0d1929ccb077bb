"""What is said of a workflow: that it is true, and that asking changes nothing."""

from __future__ import annotations

import json

import pytest
from helpers import BLOCK, arrival, check_integrity, make_policy, prompt, run_call
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saga.policy.explain import MAX_LIMIT, STATES, Explainer
from vllm_saga.policy.report import end_session, public_key
from vllm_saga.policy.stepfit import Step


def told_of(policy, name: str, now: float, tenant: str | None = None, running=frozenset()):
    told = Explainer(policy, now, running, tenant).workflow(name)
    json.dumps(told)
    return told


def listed(policy, now: float, state=None, limit=100, tenant=None, running=frozenset()):
    told = Explainer(policy, now, running, tenant).workflows(state, limit)
    json.dumps(told)
    return told


def whats(told) -> list[str]:
    return [decision["what"] for decision in told["decisions"]]


# -- what a held workflow waits for ---------------------------------------------------------------

Script = st.lists(
    st.tuples(st.integers(0, 7), st.integers(1, 14), st.sampled_from(["", "t", "u"])),
    min_size=3,
    max_size=16,
)
"""(session, blocks of the call's prompt, tenant); sessions that call again go on."""


def played(script, patience: float, watch: bool = False):
    """A pool of 40 blocks after these calls: every third one that runs ends, the others run on."""
    policy = make_policy(pool_blocks=40, patience=patience, tenant_source="saga_tenant")
    contexts: dict[tuple[str, int], list[int]] = {}
    released: list[list[str]] = []
    for number, (session, blocks, tenant) in enumerate(script):
        tokens = [*contexts.get((tenant, session), []), *prompt(10 * session + 1 + number, blocks)]
        call = arrival(f"c{number}", tokens, f"s{session}", tenant=tenant)
        policy.on_arrival(call, float(number))
        if not policy.is_held(call.call_id):
            contexts[tenant, session] = tokens
            if number % 3 != 2:
                policy.on_finish(call.call_id, len(tokens), number + 0.2)
        if watch:
            listed(policy, number + 0.3)
            told_of(policy, f"s{session}", number + 0.3)
        released.append(policy.on_step(number + 0.5))
    check_integrity(policy)
    return policy, len(script) - 0.5, released  # when what is due has been judged


def held_in(policy, now: float) -> list[dict]:
    return listed(policy, now, "held", MAX_LIMIT)["workflows"]


def give_up_ahead(policy, line: list[dict], place: int, now: float) -> None:
    """The clients of those before `place` have hung up."""
    ahead = {(told["tenant"], told["id"]) for told in line[:place]}
    for call_id, call in list(policy.calls.items()):
        workflow = call.context.session.workflow
        if call_id in workflow.held and call.context.session.key in ahead:
            policy.on_finish(call_id, call.prompt_tokens, now)


@given(script=Script, patience=st.sampled_from([0.0, 0.5, 1.0]), pick=st.integers(0, 15))
@settings(max_examples=150)
def test_once_what_it_waits_for_is_gone_it_enters_and_not_a_block_sooner(script, patience, pick):
    policy, now, _ = played(script, patience)
    line = held_in(policy, now)
    if not line:
        return
    place = pick % len(line)
    told = line[place]
    cause = told["waits_for"]
    assert cause["ahead"] == place
    assert (
        cause["short_blocks"]
        == max(
            cause["needed_blocks"]
            + cause["growth_blocks"]
            - cause["free_blocks"]
            - cause["overdraft_blocks"],
            0,
        )
        or not cause["short_blocks"]
    )
    for spare, enters in ((cause["short_blocks"], True), (cause["short_blocks"] - 1, False)):
        if spare < 0:
            continue
        policy, now, _ = played(script, patience)
        give_up_ahead(policy, line, place, now)
        policy.residency.capacity += spare
        workflow = policy.table.sessions[told["tenant"], told["id"]].workflow
        residents = set(policy.residency.residents)
        policy.on_step(now)
        if not enters and residents - set(policy.residency.residents):
            continue  # the other way to room: a resident was away for too long
        assert bool(workflow.held) != enters
        assert workflow.resident == enters


@given(script=Script)
@settings(max_examples=50)
def test_asking_changes_nothing(script):
    alone, _, released = played(script, 0.5)
    asked, _, as_asked = played(script, 0.5, watch=True)
    assert released == as_asked
    assert alone.state() == asked.state()


def one_waits():
    """A pool of 30 blocks: `a` holds 15 of them and works, then `b` wants 20 and `c` 2."""
    policy = make_policy(
        pool_blocks=30, patience=0.0, headroom=0.0, max_hold_s=50.0, short_first=0.0
    )
    policy.on_arrival(arrival("a", prompt(1, 15), "a"), 0.0)
    policy.on_arrival(arrival("b", prompt(2, 20), "b"), 1.0)
    policy.on_arrival(arrival("c", prompt(3, 2), "c"), 2.0)
    return policy


def test_who_is_next_waits_for_room_in_numbers_and_words():
    told = told_of(one_waits(), "b", 11.0, running={"a"})
    assert told["state"] == "held" and not told["resident"]
    cause = told["waits_for"]
    # 15 blocks and one for the next call are used, 20 and one for it are wanted.
    assert cause["what"] == "room" and cause["ahead"] == 0
    assert (cause["needed_blocks"], cause["free_blocks"], cause["short_blocks"]) == (21, 14, 7)
    assert (cause["held_s"], cause["runs_within_s"]) == (10.0, 40.0)
    assert cause["rule"] == "it did not fit the KV pool"
    assert cause["text"] == (
        "room: it needs 21 blocks; 14 of 30 are free, 7 short; runs in any case within 40 s"
    )


def test_who_would_fit_waits_for_its_turn():
    policy = one_waits()
    cause = told_of(policy, "c", 11.0)["waits_for"]
    assert cause["what"] == "line" and (cause["ahead"], cause["first"]) == (1, "b")
    assert cause["short_blocks"] == 0 and cause["first_short_blocks"] == 7
    assert cause["rule"] == "others were waiting already"
    assert "1 workflow is ahead, the first 7 short" in cause["text"] and "fits" in cause["text"]


def test_the_end_of_a_resident_lets_in_who_waited_for_its_blocks():
    policy = one_waits()
    policy.on_finish("a", 15 * BLOCK, 3.0)
    told = told_of(policy, "a", 3.5)
    assert told["state"] == "gap" and told["blocks"] >= 7 and told["idle_s"] == 0.5
    assert end_session(policy, "", "a", 4.0)
    assert told_of(policy, "b", 4.0)["waits_for"]["what"] == "step"
    assert policy.on_step(4.1) == ["b", "c"]
    told = told_of(policy, "b", 5.0, running={"b"})
    assert told["state"] == "running" and told["resident"] and told["waits_for"] is None
    assert whats(told) == ["held", "entered"]
    assert told_of(policy, "c", 5.0, running={"b"})["state"] == "queued"
    assert told_of(policy, "a", 5.0) is None


def test_it_runs_within_the_time_it_says():
    policy = one_waits()
    within = told_of(policy, "b", 11.0)["waits_for"]["runs_within_s"]
    assert policy.on_step(11.0 + within - 0.01) == []
    assert policy.on_step(11.0 + within) == ["b"]
    told = told_of(policy, "b", 52.0, running={"b"})
    assert whats(told) == ["held", "forced"] and not told["resident"] and told["blocks"] > 0


# -- decisions ------------------------------------------------------------------------------------


def test_who_loses_its_place_is_told_why():
    policy = make_policy(pool_blocks=40, patience=0.0, headroom=0.0)
    first = run_call(policy, arrival("a1", prompt(1, 10), "a"), [], 0.0)
    for name in ("b", "c"):
        run_call(policy, arrival(f"{name}1", prompt(ord(name), 10), name), [], 0.0)
    policy.on_arrival(arrival("a2", [*first, *prompt(4, 15)], "a"), 0.1)
    told = told_of(policy, "c", 1.0)
    assert whats(told) == ["entered", "displaced"] and "youngest" in told["decisions"][1]["why"]
    assert told["decisions"][1]["ago_s"] == 0.9 and not told["resident"]
    assert whats(told_of(policy, "b", 1.0)) == ["entered"]
    policy.reset(2.0)
    assert whats(told_of(policy, "b", 2.0)) == ["entered", "left"]


def test_who_gives_way_and_who_is_away_for_too_long():
    policy = make_policy(pool_blocks=30, headroom=0.0)
    for _ in range(64):
        policy.cost.observe(Step(1000, 500_000, 0, 8), 0.1, 0.1)
    run_call(policy, arrival("a", prompt(1, 20), "a"), [], 0.0)
    policy.on_arrival(arrival("b", prompt(2, 20), "b"), 0.1)
    now = 0.1
    while policy.is_held("b"):
        now += 1.0
        policy.on_step(now)
        assert now < 300.0
    told = told_of(policy, "a", now)
    assert whats(told) == ["entered", "gave way"]
    policy.on_step(1700.0)
    told = told_of(policy, "a", 1700.0)
    assert told["state"] == "presumed_ended" and whats(told)[-1] == "presumed ended"
    assert told["predicted"]["p_return"] is None


def test_the_last_decisions_are_kept():
    policy = make_policy(pool_blocks=40)
    for number in range(30):
        run_call(policy, arrival(f"c{number}", prompt(1, 5), "a"), [], float(number))
        policy.reset(number + 0.5)
    told = told_of(policy, "a", 30.0)
    assert len(told["decisions"]) == 8
    assert [d["ago_s"] for d in told["decisions"]] == sorted(
        (d["ago_s"] for d in told["decisions"]), reverse=True
    )


def test_tokens_that_were_evicted_and_computed_again_are_counted():
    policy = make_policy(pool_blocks=100)
    context = run_call(policy, arrival("a", prompt(1, 10), "s"), [5] * BLOCK, 0.0)
    assert told_of(policy, "s", 0.5)["lost_tokens"] == 0
    policy.on_arrival(arrival("b", [*context, *prompt(2, 3)], "s"), 1.0)
    # The last token's block was not complete in the cache.
    policy.on_scheduled("b", 4 * BLOCK)
    assert told_of(policy, "s", 2.0)["lost_tokens"] == 6 * BLOCK
    policy.on_finish("b", 14 * BLOCK, 2.0)
    policy.on_arrival(arrival("c", [*context, *prompt(3, 3)], "s"), 3.0)
    policy.on_scheduled("c", 11 * BLOCK)
    assert told_of(policy, "s", 4.0)["lost_tokens"] == 6 * BLOCK


# -- who is told what -----------------------------------------------------------------------------


def of_two_tenants(source: str = "saga_tenant"):
    """`t` and `u` have a session "s" each; both hold KV, and `t` works."""
    policy = make_policy(pool_blocks=100, tenant_source=source)
    for number, tenant in enumerate(("t", "u")):
        run_call(policy, arrival(tenant, prompt(number, 10), "s", tenant=tenant), [], 0.0)
    policy.on_arrival(arrival("t2", prompt(0, 12), "s", tenant="t"), 1.0)
    return policy


def test_a_tenant_is_told_of_its_own_only():
    policy = of_two_tenants()
    run_call(policy, arrival("x", prompt(9, 5), "only-u", tenant="u"), [], 1.0)
    mine = listed(policy, 2.0, tenant="t", running={"t2"})
    assert [(w["tenant"], w["id"], w["state"]) for w in mine["workflows"]] == [
        ("t", "s", "running")
    ]
    assert mine["total"] == 1 and set(mine["tenants"]) <= {"t"}
    assert told_of(policy, "only-u", 2.0, "t") is None
    assert told_of(policy, "only-u", 2.0, "u")["id"] == "only-u"
    assert told_of(policy, "s", 2.0, "u")["tenant"] == "u"
    # An operator gets the one that made a call last.
    assert told_of(policy, "s", 2.0)["tenant"] == "t"
    assert listed(policy, 2.0)["total"] == 3


def test_who_is_ahead_is_named_to_its_own_tenant_only():
    policy = make_policy(pool_blocks=30, headroom=0.0, tenant_source="saga_tenant")
    for number, (name, tenant) in enumerate((("a", "t"), ("b", "u"), ("c", "t"), ("d", "t"))):
        call = arrival(name, prompt(number + 1, 18), name, tenant=tenant)
        policy.on_arrival(call, float(number))
    line = [(w["tenant"], w["id"]) for w in held_in(policy, 5.0)]
    last_tenant, last = line[-1]
    first_tenant, first = line[0]
    assert last_tenant == "t" and first_tenant == "u"
    assert told_of(policy, last, 5.0, "t")["waits_for"]["first"] is None
    assert told_of(policy, last, 5.0)["waits_for"]["first"] == first
    assert told_of(policy, last, 5.0, "t")["waits_for"]["ahead"] == 2


def test_a_salt_stands_for_its_tenant_and_is_never_told():
    policy = of_two_tenants("cache_salt")
    public = public_key(policy, ("t", ""))[0]
    assert public != "t"
    told = listed(policy, 2.0)
    assert {w["tenant"] for w in told["workflows"]} == {public, public_key(policy, ("u", ""))[0]}
    assert set(told["tenants"]) <= {w["tenant"] for w in told["workflows"]}
    for asker in ("t", public):
        assert [w["tenant"] for w in listed(policy, 2.0, tenant=asker)["workflows"]] == [public]


def test_states_select_and_limits_cut():
    policy = one_waits()
    everybody = listed(policy, 5.0, running={"a"})
    assert [w["id"] for w in everybody["workflows"]] == ["b", "c", "a"]
    assert everybody["counts"] == dict.fromkeys(STATES, 0) | {"held": 2, "running": 1}
    assert [w["id"] for w in listed(policy, 5.0, "held", 1)["workflows"]] == ["b"]
    assert listed(policy, 5.0, "held", 1)["total"] == 2
    assert listed(policy, 5.0, "gap")["workflows"] == []


def test_calls_that_nobody_named_go_by_their_first_call():
    policy = make_policy(pool_blocks=100)
    context = run_call(policy, arrival("first", prompt(1, 10)), [], 0.0)
    assert told_of(policy, "first", 0.5) is None, "a plain call that is over is no workflow"
    policy.on_arrival(arrival("second", [*context, *prompt(2, 2)]), 1.0)
    told = told_of(policy, "first", 2.0)
    assert told["id"] == "first" and not told["plain"] and told["calls"]["queued"] == 1
    policy.on_arrival(arrival("lone", prompt(7, 3)), 2.0)
    assert told_of(policy, "lone", 2.0)["plain"] and told_of(policy, "lone", 2.0)["blocks"] > 0


def test_the_pool_adds_up():
    policy = make_policy(pool_blocks=100, headroom=0.0)
    run_call(policy, arrival("a", prompt(1, 10), "a"), [], 0.0)
    policy.on_arrival(arrival("b", prompt(2, 20), "b"), 1.0)
    policy.on_arrival(arrival("plain", prompt(3, 5)), 1.0)
    pool = listed(policy, 2.0)["pool"]
    assert (pool["running_blocks"], pool["gap_blocks"]) == (20, 10)
    assert (pool["residents"], pool["residents_in_gap"]) == (2, 1)
    assert pool["visitor_blocks"] == 6
    parts = ("running_blocks", "gap_blocks", "promised_blocks", "visitor_blocks", "free_blocks")
    assert sum(pool[part] for part in parts) == pool["capacity_blocks"] == 100


def test_what_is_expected_of_it_is_what_its_class_has_learned():
    policy = make_policy(pool_blocks=10_000)
    for number in range(20):
        run_call(policy, arrival(f"c{number}", prompt(1, 10 + number), "a"), [], 3.0 * number)
    told = told_of(policy, "a", 58.0)
    agent = policy.table.sessions["", "a"].workflow.agent
    assert told["predicted"]["gap_s"]["p50"] == pytest.approx(3.0, rel=0.4)
    assert told["predicted"]["calls_left"] == pytest.approx(agent.remaining_calls(20), abs=0.01)
    assert 0.0 < told["predicted"]["p_return"] < 1.0
    assert told["agent"] in dict(policy.classes.items())


@pytest.mark.parametrize("name", ["", "\0a", "x" * 10_000, "\udc80"])
def test_nobody_has_a_strange_name(name):
    assert told_of(one_waits(), name, 1.0) is None
