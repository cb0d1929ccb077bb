"""Invariant 8 at the router: sessions are their tenant's, whatever another's client asks for."""

from __future__ import annotations

import json

from engines import Engine, fleet, until

STATE = {
    "started": "1", "kv_tokens": 1000, "used_tokens": 0, "running": 0, "waiting": 0,
    "resident": 1, "prefill_tokens_per_s": 1.0, "held_calls": [], "sessions": [], "saga": {},
}  # fmt: skip
OURS, THEIRS = {"x_tenant_id": "ours"}, {"x_tenant_id": "theirs"}


async def test_a_session_is_ended_for_its_own_tenant_only():
    engine = Engine(state=STATE)
    async with fleet(engine, policy="saga") as client:
        await until(lambda: engine.states_asked > 0)
        await client.chat(X_Session_ID="s", **OURS)
        for whose in (THEIRS, {}, {"x_tenant_id": ""}):
            reply = await client.post("/v1/saga/sessions/s/end", b"", **whose)
            assert reply.json() == {"session": "s", "known": False}
        told = (await client.get("/v1/saga/sessions")).json()
        assert [(s["tenant"], s["session"]) for s in told["sessions"]] == [("ours", "s")]
        mine = await client.post("/v1/saga/sessions/s/end", b"", **OURS)
        assert mine.json()["known"] is True
        await until(lambda: len(engine.ended_sessions) == 4)
    assert sorted(engine.ended_sessions) == [("", "s"), ("", "s"), ("ours", "s"), ("theirs", "s")]


async def test_a_call_that_ends_a_session_ends_its_own_tenant_s():
    async with fleet(Engine(state=STATE), policy="saga") as client:
        await client.chat(X_Session_ID="s", **OURS)
        await client.chat(X_Session_ID="s", X_Dynamo_Session_Final="true", **THEIRS)
        told = (await client.get("/v1/saga/sessions")).json()
    assert [(s["tenant"], s["session"]) for s in told["sessions"]] == [("ours", "s")]


async def test_a_conversation_known_by_its_content_outlives_another_tenant_s_word():
    turns = [{"role": "user", "content": "begin"}]

    def body() -> bytes:
        return json.dumps({"model": "m", "messages": turns}).encode()

    async with fleet(Engine(state=STATE), policy="saga") as client:
        first = await client.post("/v1/chat/completions", body(), **OURS)
        session = first.headers["X-Session-ID"]
        await client.post(f"/v1/saga/sessions/{session}/end", b"", **THEIRS)
        await client.chat(X_Session_ID=session, X_Dynamo_Session_Final="true", **THEIRS)
        # A copy of ours that has begun since would now be taken for it.
        copy = await client.post("/v1/chat/completions", body(), **OURS)
        turns.extend(
            [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "go on"}]
        )
        second = await client.post("/v1/chat/completions", body(), **OURS)
        theirs = await client.post("/v1/chat/completions", body(), **THEIRS)
    assert copy.headers["X-Session-ID"] == f"{session}.1"
    assert second.headers["X-Session-ID"] in (session, f"{session}.1")
    assert theirs.headers["X-Session-ID"] not in (session, f"{session}.1")


async def test_a_session_of_a_huge_name_can_be_ended():
    engine = Engine(state=STATE)
    async with fleet(engine, policy="saga") as client:
        name = "n" * 4000
        await client.chat(X_Session_ID=name, **OURS)
        reply = await client.post(f"/v1/saga/sessions/{name}/end", b"", **OURS)
        assert reply.json()["known"] is True
