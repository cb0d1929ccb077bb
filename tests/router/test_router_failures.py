"""Engines that refuse, break off, die and come back."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web
from engines import (
    Engine,
    Held,
    Seen,
    answer_chat,
    answer_pieces,
    answer_status,
    fleet,
    quick,
    until,
)

from vllm_saga.router.app import Router
from vllm_saga.router.backends import Address


async def answer_break_off(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
    """The connection ends, the engine lives on: the call may well have been executed."""
    request.transport.abort()
    raise ConnectionResetError


async def answer_break_off_later(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b"data: some\n\n")
    await asyncio.sleep(0.05)
    request.transport.abort()
    raise ConnectionResetError


async def test_an_engine_that_says_503_is_not_the_last_word():
    full, free = Engine(answer_status(503)), Engine()
    async with fleet(full, free) as client:
        replies = [await client.chat() for _ in range(4)]
        metrics = (await client.get("/metrics")).body.decode()
    assert [r.status for r in replies] == [200] * 4
    assert {r.headers["x-saga-backend"] for r in replies} == {free.name}
    assert full.seen
    assert f'saga_router_retries_total{{cause="503"}} {len(full.seen)}.0' in metrics


async def test_a_503_of_all_engines_passes_with_when_to_come_back():
    engines = Engine(answer_status(503)), Engine(answer_status(503, Retry_After="7"))
    async with fleet(*engines) as client:
        reply = await client.chat()
    assert (reply.status, reply.body) == (503, b"this is 503")
    assert reply.headers["Retry-After"] == "7"
    assert reply.headers["x-saga-backend"] == engines[1].name


@pytest.mark.parametrize("status", [400, 429, 500, 502, 504])
async def test_other_errors_pass_and_are_not_tried_again(status):
    engines = Engine(answer_status(status)), Engine(answer_status(status))
    async with fleet(*engines) as client:
        reply = await client.chat()
        assert reply.status == status
        assert all(b.health.up and b.accepting for b in client.router.backends)
    assert sum(len(engine.seen) for engine in engines) == 1


async def test_an_engine_that_is_not_there_costs_nobody_a_call():
    here, gone = Engine(), Engine()
    async with fleet(here, gone, health_interval=30.0) as client:
        await gone.stop()
        replies = [await client.chat() for _ in range(6)]
        assert [r.status for r in replies] == [200] * 6
        # The first failure has it probed at once; there is no need to wait for the interval.
        await client.until_up(here)


async def test_calls_of_an_engine_that_dies_run_on_another_one():
    held = Held()
    dying, other = Engine(held), Engine()
    async with fleet(dying, other) as client:
        waiting = [asyncio.create_task(client.chat()) for _ in range(4)]
        await until(lambda: len(dying.seen) == 2)
        await dying.stop()
        async with asyncio.timeout(5):
            replies = await asyncio.gather(*waiting)
    assert [r.status for r in replies] == [200] * 4
    assert len(other.seen) == 4


async def test_a_call_that_may_have_been_executed_is_not_sent_again():
    breaking, other = Engine(answer_break_off), Engine()
    async with fleet(breaking, other) as client:
        replies = [await client.chat(), await client.chat()]
    assert sorted(r.status for r in replies) == [200, 502]
    assert (len(breaking.seen), len(other.seen)) == (1, 1)
    failed = next(r for r in replies if r.status == 502)
    assert failed.json()["error"]["type"] == "backend_broke_off"


async def test_what_breaks_off_after_the_first_byte_is_cut_and_not_sent_again():
    engines = Engine(answer_break_off_later), Engine(answer_break_off_later)
    async with fleet(*engines) as client:
        async with client.http.post(client.url + "/v1/completions", json={"prompt": "x"}) as got:
            assert got.status == 200
            assert await got.content.readany() == b"data: some\n\n"
            with pytest.raises(aiohttp.ClientPayloadError):
                await got.content.readany()
        await until(lambda: len(client.router.proxy) == 0)
    assert sum(len(engine.seen) for engine in engines) == 1


async def test_an_engine_that_dies_in_mid_stream_ends_its_streams():
    engine = Engine(answer_pieces([b"data: x\n\n"] * 10_000, pause=0.01))
    async with (
        fleet(engine) as client,
        client.http.post(client.url + "/v1/completions", json={"prompt": "x"}) as got,
    ):
        await got.content.readany()
        await engine.stop()
        with pytest.raises(aiohttp.ClientPayloadError):
            async with asyncio.timeout(5):
                await got.content.read()


async def test_a_streamed_upload_is_sent_once():
    refusing = Engine(answer_status(503)), Engine(answer_status(503))
    async with fleet(*refusing) as client:
        reply = await client.send("POST", "/v1/audio", b"x" * 100_000, {"Content-Type": "a/b"})
    assert reply.status == 503
    assert sum(len(engine.seen) for engine in refusing) == 1


async def test_no_engine_at_all():
    async with fleet(Engine(healthy=True)) as client:
        client.router.backends.remove(next(iter(client.router.backends)))
        reply, ready = await client.chat(), await client.get("/ready")
        health = await client.get("/health")
    assert (reply.status, reply.json()["error"]["type"]) == (503, "no_backend")
    assert reply.headers["Retry-After"] == "2"
    assert (ready.status, health.status) == (503, 200)


async def test_probes_find_an_engine_that_is_ill_and_one_that_is_well_again():
    state = {"started": "r", "kv_tokens": 1, "used_tokens": 0, "running": 0, "waiting": 0}
    engine = Engine(state=state)
    async with fleet(engine, health_failures=2) as client:
        await until(lambda: client.router.backends.get(engine.name).report is not None)
        engine.healthy = False
        await client.until_up()
        assert client.router.backends.get(engine.name).report is None
        assert (await client.chat()).status == 503
        engine.healthy = True
        await client.until_up(engine)
        assert (await client.chat()).status == 200


async def test_the_breaker_opens_where_probes_see_nothing_and_closes_again():
    engine = Engine(answer_break_off)
    async with fleet(engine, breaker_failures=3, breaker_s=0.5) as client:
        replies = [await client.chat() for _ in range(6)]
        assert [r.status for r in replies] == [502] * 3 + [503] * 3
        listed = (await client.get("/v1/saga/backends")).json()["backends"]
        assert listed[0]["state"] == "broken"
        engine.answer = answer_chat
        await client.until_up(engine)
        assert (await client.chat()).status == 200


async def test_an_engine_that_says_nothing_times_out():
    engine = Engine(Held(headers_first=False))
    async with fleet(engine, answer_timeout=0.3) as client:
        reply = await client.chat()
    assert (reply.status, reply.json()["error"]["type"]) == (504, "answer_timeout")


async def test_a_session_comes_back_to_its_engine_after_the_router_was_restarted():
    engines = [await Engine().start() for _ in range(4)]
    addresses = [Address.parse(engine.url) for engine in engines]
    homes: list[dict[str, str]] = []
    try:
        for order in (addresses, addresses[::-1]):
            async with (
                Router(quick(policy="session"), order) as router,
                aiohttp.ClientSession() as http,
            ):
                await until(lambda: all(b.accepting for b in router.backends))
                url = f"http://127.0.0.1:{router.port}/v1/completions"
                found = {}
                for session in map(str, range(40)):
                    headers = {"X-Session-ID": session}
                    async with http.post(url, json={"prompt": session}, headers=headers) as got:
                        found[session] = got.headers["x-saga-backend"]
                homes.append(found)
    finally:
        for engine in engines:
            await engine.stop()
    assert homes[0] == homes[1]
    assert len(set(homes[0].values())) == 4


async def test_a_draining_engine_keeps_its_calls_and_gets_no_more():
    held = Held()
    draining, other = Engine(held), Engine()
    async with fleet(draining, other) as client:
        waiting = asyncio.create_task(client.chat())
        await until(lambda: len(draining.seen) == 1)
        drained = await client.post(f"/v1/saga/backends/{draining.name}/drain", b"")
        replies = [await client.chat() for _ in range(4)]
        held.go.set()
        assert (await waiting).body == b"data: done\n\n"
        await client.post(f"/v1/saga/backends/{draining.name}/undrain", b"")
        again = {(await client.chat()).headers["x-saga-backend"] for _ in range(4)}
    assert drained.json()["draining"] is True
    assert {r.headers["x-saga-backend"] for r in replies} == {other.name}
    assert again == {draining.name, other.name}


async def test_engines_come_and_go_while_calls_run():
    held = Held()
    first, second = Engine(held), await Engine().start()
    async with fleet(first) as client:
        waiting = asyncio.create_task(client.chat())
        await until(lambda: len(first.seen) == 1)
        await client.router_adds(second.url)
        removed = await client.send("DELETE", f"/v1/saga/backends/{first.name}", None)
        assert (await client.chat()).headers["x-saga-backend"] == second.name
        held.go.set()
        assert (await waiting).status == 200
        listed = (await client.get("/v1/saga/backends")).json()["backends"]
        series = (await client.get("/metrics")).body.decode()
    await second.stop()
    assert removed.json() == {"id": first.name, "removed": True}
    assert [b["id"] for b in listed] == [second.name]
    assert first.name not in series


async def test_a_file_of_backends_is_read_again(tmp_path):
    engines = [await Engine().start() for _ in range(3)]
    a, b, c = engines
    path = tmp_path / "backends"
    path.write_text(f"# two\n{a.url}\n{b.url}\n")
    router = Router(quick(), [Address.parse(c.url)], path)
    try:
        async with router:

            def up() -> set[str]:
                return {x.name for x in router.backends if x.accepting}

            await until(lambda: up() == {a.name, b.name, c.name})
            path.write_text(f"{b.url}\n")
            await until(lambda: up() == {b.name, c.name})
            path.write_text("ftp://nowhere\n")
            await asyncio.sleep(1.5)
            assert up() == {b.name, c.name}
            path.write_text(f"{a.url}, {c.url}\n")
            await until(lambda: up() == {a.name, c.name})
            path.unlink()
            await asyncio.sleep(1.5)
            assert up() == {a.name, c.name}
            path.write_text("")
            # What the command line lists stays, whatever the file says.
            await until(lambda: up() == {c.name})
    finally:
        for engine in engines:
            await engine.stop()


async def test_what_is_known_of_engines_is_shown():
    state = {
        "started": "r1", "kv_tokens": 1000, "used_tokens": 250, "running": 1, "waiting": 2,
        "resident": 3, "prefill_tokens_per_s": 10.0, "sessions": [["", "s"]],
        "held_calls": [{"tenant": "", "session": "h", "new": True, "held_s": 1.0, "tokens": 5}],
        "saga": {"more": 1},
    }  # fmt: skip
    stock = (
        'vllm:num_requests_running{engine="0",model_name="m"} 2.0\n'
        'vllm:num_requests_waiting{engine="0",model_name="m"} 1.0\n'
        'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25\n'
        'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0\n'
    )
    saga, plain = Engine(state=state), Engine(metrics=stock)
    async with fleet(saga, plain) as client:
        await until(lambda: all(b.report for b in client.router.backends))
        listed = (await client.get("/v1/saga/backends")).json()["backends"]
        series = (await client.get("/metrics")).body.decode()
        await asyncio.sleep(0.3)
        asked = plain.states_asked
    kept = {b["id"]: (b["speaks_saga"], b["report"]) for b in listed}
    assert kept[saga.name][0] is True
    assert kept[saga.name][1]["used_tokens"] == 250
    assert kept[saga.name][1]["held"] == 1
    assert kept[plain.name][0] is False
    assert kept[plain.name][1]["kv_tokens"] == 1600
    assert kept[plain.name][1]["used_tokens"] == 400
    assert f'saga_router_backend_kv_used{{backend="{plain.name}"}} 0.25' in series
    assert asked == 1


async def test_the_end_of_a_session_reaches_the_engines():
    state = {"started": "r", "kv_tokens": 1, "used_tokens": 0, "running": 0, "waiting": 0}
    engine = Engine(state=state)
    async with fleet(engine) as client:
        await until(lambda: client.router.backends.get(engine.name).speaks_saga is True)
        await client.chat(x_claude_code_session_id="a", x_tenant_id="t")
        reply = await client.post("/v1/saga/sessions/a/end", b"", x_tenant_id="t")
        other = await client.post("/v1/saga/sessions/a/end", b"", x_tenant_id="u")
        await client.chat(x_dynamo_session_id="b", x_dynamo_session_final="true")
        await until(lambda: len(engine.ended_sessions) == 3)
    assert (reply.json()["known"], other.json()["known"]) == (True, False)
    assert engine.ended_sessions == [("t", "a"), ("u", "a"), ("", "b")]


async def test_a_stored_response_is_asked_of_the_engine_that_keeps_it():
    async def answer(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        number = request.transport.get_extra_info("sockname")[1]
        return web.json_response({"id": f"resp_{number}_{len(seen.body)}", "status": "completed"})

    engines = [Engine(answer) for _ in range(3)]
    async with fleet(*engines) as client:
        made = await client.post("/v1/responses", b'{"input": "a question"}')
        home, response = made.headers["x-saga-backend"], made.json()["id"]
        follow = json.dumps({"input": "and then?", "previous_response_id": response}).encode()
        replies = [await client.post("/v1/responses", follow) for _ in range(3)]
        replies += [await client.get(f"/v1/responses/{response}") for _ in range(3)]
        replies += [await client.post(f"/v1/responses/{response}/cancel", b"") for _ in range(3)]
    assert {r.headers["x-saga-backend"] for r in replies} == {home}
    assert {r.headers["X-Session-ID"] for r in replies[:3]} == {made.headers["X-Session-ID"]}
