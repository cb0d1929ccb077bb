"""Limits: keys, floods, clients that are slow on purpose, bodies and tables without end."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from engines import Engine, Held, answer_pieces, fleet, until
from router_process import router_process


async def raw(port: int, data: bytes, within: float = 5.0) -> bytes:
    """What comes back on a connection before it ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    async with asyncio.timeout(within):
        answer = await reader.read()
    writer.close()
    return answer


async def test_the_api_key_is_wanted_and_passed_on():
    engine = Engine()
    async with fleet(engine, api_key="secret") as client:
        replies = [
            await client.chat(),
            await client.chat(Authorization="Bearer wrong"),
            await client.chat(Authorization="Bearer secret"),
            await client.chat(x_api_key="secret"),
            await client.get("/tokenize"),
            await client.post("/v1/saga/sessions/x/end", b""),
        ]
        open_ = [(await client.get(path)).status for path in ("/health", "/ready", "/metrics")]
    assert [r.status for r in replies] == [401, 401, 200, 200, 401, 401]
    assert replies[0].json()["error"]["message"] == "the API key is missing or wrong"
    assert [s.headers["Authorization"] for s in engine.seen] == ["Bearer secret"] * 2
    assert open_ == [200] * 3


async def test_backends_may_have_a_key_of_their_own():
    engine = Engine()
    async with fleet(engine, api_key="outer", backend_api_key="inner") as client:
        await client.chat(Authorization="Bearer outer")
        await until(lambda: engine.states_asked > 0)
    assert engine.seen[0].headers["Authorization"] == "Bearer inner"
    assert engine.keys_of_probes == {"Bearer inner"}


async def test_operators_need_their_key_or_be_local():
    async with fleet(Engine(), api_key="key") as client:
        local = await client.get("/v1/saga/backends", Authorization="Bearer key")
        far = await client.get(
            "/v1/saga/backends", Authorization="Bearer key", X_Forwarded_For="10.0.0.1"
        )
    async with fleet(Engine(), api_key="key", admin_api_key="admin") as client:
        user = await client.get("/v1/saga/sessions", Authorization="Bearer key")
        admin = await client.get("/v1/saga/sessions", Authorization="Bearer admin")
    assert (local.status, far.status, user.status, admin.status) == (200, 403, 401, 200)


async def test_what_does_not_exist_is_said_to():
    async with fleet(Engine()) as client:
        replies = [
            await client.get("/v1/saga/nothing"),
            await client.post("/v1/saga/sessions", b""),
            await client.post("/v1/saga/backends/nowhere:1/drain", b""),
            await client.post("/v1/saga/backends", b'{"url": "ftp://x"}'),
            await client.get("/v1/saga/decisions?limit=x"),
        ]
    assert [r.status for r in replies] == [404, 405, 404, 400, 400]
    assert "there are: 127.0.0.1:" in replies[2].json()["error"]["message"]


async def test_more_calls_than_may_be_in_flight_are_told_to_come_back():
    held = Held()
    engine = Engine(held)
    async with fleet(engine, max_in_flight=2) as client:
        waiting = [asyncio.create_task(client.chat()) for _ in range(2)]
        await until(lambda: len(engine.seen) == 2)
        reply = await client.chat()
        held.go.set()
        assert [(await task).status for task in waiting] == [200, 200]
        assert (await client.chat()).status == 200
    assert (reply.status, reply.json()["error"]["type"]) == (429, "router_full")
    assert reply.headers["Retry-After"] == "1"


async def test_a_full_backend_gets_no_more():
    held = Held()
    first, second = Engine(held), Engine(held)
    async with fleet(first, second, max_per_backend=1, policy="session") as client:
        waiting = [asyncio.create_task(client.chat(X_Session_ID="s")) for _ in range(2)]
        await until(lambda: len(first.seen) == len(second.seen) == 1)
        reply = await client.chat(X_Session_ID="s")
        held.go.set()
        await asyncio.gather(*waiting)
    assert (reply.status, reply.json()["error"]["type"]) == (429, "backends_full")


async def test_headers_without_end_are_refused(caplog):
    async with fleet(Engine()) as client:
        port = client.router.port
        many = (
            b"GET /x HTTP/1.1\r\nHost: x\r\n"
            + b"".join(b"h%d: x\r\n" % i for i in range(500))
            + b"\r\n"
        )
        long = b"GET /x HTTP/1.1\r\nHost: x\r\nh: " + b"x" * 200_000 + b"\r\n\r\n"
        assert b" 400 Bad Request" in (await raw(port, many)).splitlines()[0]
        assert b" 400 Bad Request" in (await raw(port, long)).splitlines()[0]
        assert (await client.chat()).status == 200
    # A flood of them must not become a flood of the log.
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


async def test_headers_that_do_not_come_end_the_connection():
    async with fleet(Engine(), idle_timeout=0.3) as client:
        port = client.router.port
        assert await raw(port, b"") == b""
        assert await raw(port, b"GET /x HTTP/1.1\r\nHost: ") == b""

        async def drip() -> int:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            sent = 0
            while not reader.at_eof() and sent < 100:
                writer.write(b"GET / HTTP/1.1\r\n"[sent % 16 : sent % 16 + 1])
                sent += 1
                await asyncio.sleep(0.02)
                if client.router._server.open == 0:
                    break
            writer.close()
            return sent

        assert await drip() < 30


async def test_a_body_that_does_not_come_is_not_waited_for():
    engine = Engine()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    head += b"Connection: close\r\n"
    async with fleet(engine, body_timeout=0.3) as client:
        kept = await raw(client.router.port, head + b"Content-Type: application/json\r\n\r\n{", 15)
        streamed = await raw(client.router.port, head + b"Content-Type: a/b\r\n\r\nx", 15)
        assert len(client.router.proxy) == 0
        assert client.router.proxy.budget.used == 0
    assert kept.startswith(b"HTTP/1.1 408")
    assert streamed.startswith(b"HTTP/1.1 408")
    assert not any(seen.ended for seen in engine.seen)


async def test_a_client_that_takes_nothing_of_its_answer_is_cut_off():
    engine = Engine(answer_pieces([b"x" * 1_000_000] * 100))
    async with fleet(engine, write_timeout=0.5) as client:
        _, writer = await asyncio.open_connection("127.0.0.1", client.router.port)
        writer.write(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: len(engine.seen) == 1)
        await until(lambda: len(client.router.proxy) == 0)
        await until(lambda: engine.seen[0].aborted)
        writer.close()


async def test_connections_beyond_the_limit_are_closed():
    async with fleet(Engine(), max_connections=5) as client:
        opened = [await asyncio.open_connection("127.0.0.1", client.router.port) for _ in range(5)]
        with pytest.raises(ConnectionError):
            if await raw(client.router.port, b"GET /health HTTP/1.1\r\n\r\n") == b"":
                raise ConnectionResetError
        for _, writer in opened:
            writer.close()
        await until(lambda: client.router._server.open == 0)
        assert (await client.get("/health")).status == 200


async def test_sessions_are_bounded():
    engine = Engine()
    async with fleet(engine, max_sessions=50, policy="saga") as client:
        for number in range(120):
            await client.chat(f"task {number}", X_Session_ID=f"s{number}")
        listed = (await client.get("/v1/saga/sessions?limit=100")).json()
        decisions = (await client.get("/v1/saga/decisions?limit=3")).json()["decisions"]
        metrics = (await client.get("/metrics")).body.decode()
        await until(lambda: len(client.router._inner.sessions) == 50)
    assert listed["total"] == 50
    assert [s["session"] for s in listed["sessions"]] == [f"s{n}" for n in range(119, 69, -1)]
    assert [d["session"] for d in decisions] == ["s119", "s118", "s117"]
    assert "s119" not in metrics


async def call(http: aiohttp.ClientSession, url: str, asked: dict[str, str]) -> None:
    """As clients do: whoever is told to come back comes back."""
    while True:
        async with http.post(url, json=asked) as reply:
            if reply.status == 200:
                return
            assert reply.status in (429, 503), await reply.text()
            await asyncio.sleep(float(reply.headers["Retry-After"]))


@pytest.mark.switch("SAGA_TEST_SESSIONS", "100,000 calls, minutes")
@pytest.mark.timeout(1800)
async def test_a_hundred_thousand_sessions_take_no_more_memory_than_those_that_are_kept():
    kept, lanes, rounds = 20_000, 16, (30_000, 100_000)
    engine = await Engine(keeps_bodies=False).start()
    memory = []
    async with (
        router_process("--backends", engine.url, "--max-sessions", str(kept)) as router,
        aiohttp.ClientSession() as http,
    ):

        async def lane(numbers: range) -> None:
            for number in numbers:
                asked = {"prompt": f"task {number}", "session_id": f"s{number}"}
                await call(http, f"{router.url}/v1/completions", asked)

        begun = 0
        for end in rounds:
            spans = [range(begun + lane, end, lanes) for lane in range(lanes)]
            await asyncio.gather(*map(lane, spans))
            begun = end
            memory.append(router.memory())
            engine.seen.clear()
        async with http.get(f"{router.url}/v1/saga/sessions?limit=1") as reply:
            listed = await reply.json()
    await engine.stop()
    print(f"router: {memory[0] / 2**20:.0f} MiB, then {memory[1] / 2**20:.0f} MiB")
    assert listed["total"] == kept
    assert int(listed["sessions"][0]["session"][1:]) >= rounds[-1] - 2 * lanes
    assert memory[1] < 1.1 * memory[0]


async def test_what_a_session_holds_is_taken_from_its_answers():
    async with fleet(Engine()) as client:
        await client.chat(X_Session_ID="s", x_tenant_id="t")
        listed = (await client.get("/v1/saga/sessions")).json()["sessions"]
    entry = listed[0]
    assert (entry["tenant"], entry["session"]) == ("t", "s")
    assert (entry["total_tokens"], entry["calls"], entry["source"]) == (7, 1, "vllm")


async def test_ids_that_are_no_headers_do_no_harm():
    engine = Engine()
    async with fleet(engine) as client:
        for session in ("a\r\nX-Evil: 1", "séance", "x" * 10_000, "", 7, None, {"a": 1}):
            body = json.dumps({"prompt": "x", "session_id": session}).encode()
            assert (await client.post("/v1/completions", body)).status == 200
            body = json.dumps({"prompt": "x", "prompt_cache_key": session}).encode()
            assert (await client.post("/v1/completions", body)).status == 200
    assert len(engine.seen) == 14
    assert not any("X-Evil" in seen.headers for seen in engine.seen)


async def test_no_web_page_of_somebody_else_s_changes_the_router():
    """Not even one that an operator has open on the router's own machine."""
    engine = Engine()
    page = {"Origin": "http://elsewhere", "Content-Type": "text/plain"}
    asked = [
        ("POST", "/v1/saga/backends", b'{"url": "http://10.0.0.1:1"}'),
        ("POST", f"/v1/saga/backends/{engine.name}/drain", b""),
        ("POST", "/v1/saga/sessions/s/end", b""),
    ]
    async with fleet(engine) as client:
        for method, path, body in asked:
            assert (await client.send(method, path, body, page)).status == 403
        removed = f"/v1/saga/backends/{engine.name}"
        cross = {"Sec-Fetch-Site": "cross-site"}
        assert (await client.send("DELETE", removed, None, cross)).status == 403
        assert len(client.router.backends) == 1
        own = {"Origin": client.url}
        assert (await client.send("POST", *asked[2][1:], own)).status == 200
        assert (await client.send("DELETE", removed, None, own)).status == 200
