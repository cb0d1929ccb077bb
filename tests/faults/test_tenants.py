"""Invariant 8 on a real scheduler: no entry lets a client harm another tenant's session."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest
from served import app_of

from vllm_saga.policy.stepfit import Step
from vllm_saga.simulator.driver import Driver, make_request
from vllm_saga.simulator.schedulers import make_scheduler

PROMPT = [random.Random(1).randrange(500) for _ in range(160)]
OURS, THEIRS = "ours", "theirs"


def scheduler_of(**knobs: Any) -> Any:
    return make_scheduler(
        "saga", blocks=200, saga={"tenant_source": "saga_tenant", "session_idle_s": 60, **knobs}
    )


def run(driver: Driver, call_id: str, tokens: list[int], tenant: str, **fields: Any) -> list[int]:
    """A call from its arrival to its end; its context."""
    driver.add(make_request(call_id, tokens, 8, saga_tenant=tenant, **fields))
    driver.drain(100, dt=0.02)
    return [*tokens, *driver.outputs[call_id]]


def sessions_of(scheduler: Any, tenant: str) -> dict[str, Any]:
    return {k[1]: s for k, s in scheduler.saga.table.sessions.items() if k[0] == tenant}


# What another tenant's client may send in the hope to meet a session called "s".
ATTACKS: list[dict[str, Any]] = [
    {"session_id": "s"},
    {"session_id": "s", "saga_last": 1},
    {"session_id": "x", "saga_parent": "s"},
    {"session_id": "x", "saga_parent": "s", "saga_last": 1},
    {"saga_parent": "s", "saga_last": 1},
    {"agent_hint": json.dumps({"session_id": "s", "last": True})},
    {"agent_hint": json.dumps({"session_id": "y", "parent_session_id": "s", "last": True})},
    {"saga_last": 1},  # by its content alone: what it sends goes on with our context
    {},
]


@pytest.mark.parametrize("named", [True, False], ids=["named", "by content"])
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_another_tenant_s_calls_neither_join_nor_end_a_session(attack, named):
    """Both send the same prompts, and no cache salt tells their blocks apart."""
    scheduler = scheduler_of()
    driver = Driver(scheduler)
    ours = {"session_id": "s"} if named else {}
    context = run(driver, "a", PROMPT, OURS, **ours)
    (session,) = sessions_of(scheduler, OURS).values()
    theirs = run(driver, "b", [*context, 7, 8, 9], THEIRS, **attack)
    run(driver, "c", [*theirs, 7, 8, 9], THEIRS, **attack)
    assert sessions_of(scheduler, OURS) == {session.key[1]: session}
    assert not session.ending and session.workflow.calls_done == 1
    assert {s.key[0] for s in session.workflow.sessions.values()} == {OURS}
    # Ours goes on where it was, whatever theirs have learned of its content.
    run(driver, "d", [*context, 1, 2, 3], OURS, **ours)
    assert session.workflow.calls_done == 2
    assert scheduler.saga is not None


def test_a_tenant_s_own_conversation_is_found_beside_others_that_are_the_same():
    scheduler = scheduler_of()
    driver = Driver(scheduler)
    contexts = {t: run(driver, f"{t}0", PROMPT, t) for t in (OURS, THEIRS)}
    for tenant, context in contexts.items():
        run(driver, f"{tenant}1", [*context, 4, 5], tenant)
    for tenant in contexts:
        (session,) = sessions_of(scheduler, tenant).values()
        assert session.workflow.calls_done == 2


@pytest.mark.parametrize("xargs", [{}, {"saga_tenant": OURS}, {"saga_last": 1}], ids=str)
def test_a_salt_is_the_tenant_whatever_the_request_says_besides(xargs):
    scheduler = scheduler_of(tenant_source="cache_salt")
    driver = Driver(scheduler)
    context = PROMPT
    for number, salt in enumerate((OURS, THEIRS, "")):
        # Its blocks were hashed without the salt: as if two salts had met in one hash.
        request = make_request(f"r{number}", context, 8, **(xargs if number else {}))
        request.cache_salt = salt or None
        driver.add(request)
        driver.drain(100, dt=0.02)
        context = [*context, *driver.outputs[f"r{number}"], 7, 8]
    (session,) = sessions_of(scheduler, OURS).values()
    assert session.workflow.calls_done == 1 and not session.ending
    assert session.workflow.tenant == OURS


@pytest.mark.parametrize("source", ["cache_salt", "saga_tenant"])
def test_names_of_a_megabyte_are_not_kept(source):
    scheduler = scheduler_of(tenant_source=source)
    driver = Driver(scheduler)
    for number in range(4):
        huge = f"{number}" + "x" * 1_000_000
        request = make_request(f"r{number}", PROMPT, 2, session_id=huge, saga_tenant=huge)
        request.cache_salt = huge
        driver.add(request)
    driver.drain(100, dt=0.02)
    assert len(scheduler.saga.table.sessions) == 4
    for tenant, session in scheduler.saga.table.sessions:
        assert len(tenant) + len(session) < 1000


# -- who goes first ------------------------------------------------------------------------------

ABSURD: list[dict[str, Any]] = [
    {"deadline_s": 1e-300}, {"steps_left": 0}, {"priority": -(1 << 62), "strict_priority": True},
    {"expected_gap_s": 1e300, "cache_control": {"ttl": 1e300}},
    {"deadline_s": 1e-9, "slo_factor": 1e-300, "steps_left": 0, "cache_control": {"ttl": "9999h"}},
]  # fmt: skip


def our_completions(hint: dict[str, Any] | None, **knobs: Any) -> dict[str, float]:
    """When each of our calls has ended, beside a tenant with three times as many sessions."""
    rng = random.Random(6)
    scheduler = make_scheduler(
        "saga", blocks=60, saga={"tenant_source": "saga_tenant", "max_hold_s": 5.0, **knobs}
    )
    driver = Driver(scheduler)
    for _ in range(64):  # deadlines count once it is known what work costs
        scheduler.saga.cost.observe(Step(512, 60_000, 4_000, 8), 0.02, 0.1)
    assert scheduler.saga.cost.known
    contexts = {
        (tenant, n): [rng.randrange(500) for _ in range(100)]
        for tenant, count in ((THEIRS, 12), (OURS, 4))
        for n in range(count)
    }
    ended: dict[str, float] = {}
    sent = json.dumps(hint) if hint else None
    for step in range(2_000):
        for (tenant, n), context in contexts.items():
            if step % 12 == n and step < 72:
                extra = {"agent_hint": sent} if sent and tenant == THEIRS else {}
                name = f"{tenant}{n}t{step}"
                driver.add(
                    make_request(
                        name, list(context), 5, session_id=str(n), saga_tenant=tenant, **extra
                    )
                )
                context += [rng.randrange(500) for _ in range(30)]
        driver.step()
        driver.now += 0.02
        for name in driver.finished:
            ended.setdefault(name, driver.now)
        if len(ended) == 16 * 6:
            break
    assert len(ended) == 16 * 6, "some calls have never ended"
    assert scheduler.saga is not None
    assert hint is None or sum(scheduler.hint_counts.values()) > 0
    return {name: at for name, at in ended.items() if name.startswith(OURS)}


@pytest.mark.parametrize("window_s", [0.0, 0.3])
def test_what_another_tenant_declares_delays_us_by_the_operator_s_window_at_most(window_s):
    usual = our_completions(None, fair_window_s=window_s)
    for hint in ABSURD:
        found = our_completions(hint, fair_window_s=window_s)
        # Twice: once for each of the two tenants.
        assert max(found[name] - at for name, at in usual.items()) <= 2 * window_s, hint


def test_it_is_the_window_that_keeps_them():
    usual, found = (our_completions(hint, fair_window_s=60.0) for hint in (None, ABSURD[0]))
    assert max(found[name] - at for name, at in usual.items()) > 2 * 0.3


# -- the endpoints of a server -------------------------------------------------------------------


async def client_of(scheduler: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(await app_of(scheduler)), base_url="http://server"
    )


async def test_the_endpoints_of_a_server_know_each_tenant_s_own_only():
    scheduler = scheduler_of()
    driver = Driver(scheduler)
    run(driver, "a", PROMPT, OURS, session_id="s")
    run(driver, "b", PROMPT, THEIRS, session_id="t")
    async with await client_of(scheduler) as client:
        theirs = {"x-tenant-id": THEIRS}
        for query in ("", f"?tenant={OURS}", f"?tenant={OURS}&tenant={THEIRS}"):
            told = (await client.get(f"/v1/saga/workflows{query}", headers=theirs)).json()
            assert [w["id"] for w in told["workflows"]] == ["t"]
            assert OURS not in told["tenants"]
            past = (await client.get(f"/v1/saga/past{query}", headers=theirs)).json()
            assert {e["id"] for e in past["events"]} == {"t"}
            one = await client.get(f"/v1/saga/workflows/s{query}", headers=theirs)
            assert one.status_code == 404
        for name in ("s", "%00a", "s%00"):
            ended = await client.post(f"/v1/saga/sessions/{name}/end", headers=theirs)
            assert ended.json() == {"ended": False}
        # Nor does whoever leaves the header out, or names nobody.
        for headers in ({}, {"x-tenant-id": ""}):
            ended = await client.post("/v1/saga/sessions/s/end", headers=headers)
            assert ended.json() == {"ended": False}
        assert set(sessions_of(scheduler, OURS)) == {"s"}
        mine = await client.post("/v1/saga/sessions/s/end", headers={"x-tenant-id": OURS})
        assert mine.json() == {"ended": True}
