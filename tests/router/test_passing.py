"""What passes through a router: everything, as it is."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random

import aiohttp
import pytest
from aiohttp import web
from engines import Engine, Held, Seen, answer_pieces, answer_status, fleet, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


async def test_an_answer_says_where_it_was_made():
    engine = Engine()
    async with fleet(engine) as client:
        reply = await client.chat(X_Session_ID="s1")
    assert reply.status == 200
    assert reply.json()["usage"]["total_tokens"] == 7
    assert reply.headers["x-saga-backend"] == engine.name
    assert reply.headers["x-saga-decision"] == "round_robin"
    assert reply.headers["X-Session-ID"] == "s1"


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=20))
def test_a_stream_passes_byte_for_byte(pieces):
    async def check():
        async with fleet(Engine(answer_pieces(pieces))) as client:
            reply = await client.chat()
        assert reply.body == b"".join(pieces)
        assert reply.headers["Content-Type"] == "text/event-stream"

    asyncio.run(check())


async def test_events_pass_as_they_come():
    pieces = [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"]
    async with fleet(Engine(answer_pieces(pieces, pause=0.2))) as client:
        url = client.url + "/v1/completions"
        async with client.http.post(url, json={"prompt": "x"}) as got:
            loop = asyncio.get_running_loop()
            start, times, parts = loop.time(), [], []
            async for part in got.content.iter_any():
                times.append(loop.time() - start)
                parts.append(part)
    assert parts == pieces
    assert times[-1] - times[0] == pytest.approx(0.4, abs=0.15)


async def test_the_request_passes_as_it_is():
    engine = Engine()
    body = b'{ "prompt" : "caf\\u00e9",\n "n":1.0, "n": 2 }'
    async with fleet(engine) as client:
        path = "/v1/completions?a=%2Fb&c=d%20e&c=f"
        await client.post(path, body, Authorization="Bearer k", X_Odd="a, b", Accept="x/y")
    seen = engine.seen[0]
    assert (seen.method, seen.path, seen.body) == ("POST", path, body)
    assert seen.headers["Authorization"] == "Bearer k"
    assert seen.headers["X-Odd"] == "a, b"
    assert seen.headers["Accept"] == "x/y"
    assert seen.headers["Content-Length"] == str(len(body))
    assert seen.headers["Host"] == engine.name


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_every_method_and_path_passes(method):
    engine = Engine(answer_status(418, X_Kept="yes"))
    async with fleet(engine) as client:
        reply = await client.send(method, "/some/path", None)
    assert reply.status == 418
    assert reply.headers["X-Kept"] == "yes"
    assert reply.body == (b"" if method == "HEAD" else b"this is 418")
    assert engine.seen[0].method == method


async def test_models_are_those_of_a_backend():
    async def answer(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [{"id": seen.path}]})

    async with fleet(Engine(answer)) as client:
        reply = await client.get("/v1/models")
    assert reply.json()["data"] == [{"id": "/v1/models"}]


@pytest.mark.parametrize("body", [b'{"messages": [', b"\xff\xfe", b"[" * 5000, b"3", b"", b"null"])
async def test_malformed_json_is_for_the_engine_to_complain_of(body):
    engine = Engine(answer_status(400))
    async with fleet(engine) as client:
        reply = await client.post("/v1/chat/completions", body, X_Session_ID="s")
    assert (reply.status, reply.body) == (400, b"this is 400")
    assert engine.seen[0].body == body
    assert reply.headers["X-Session-ID"] == "s"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "half an emoji: \\ud83d", "prompt_cache_key": "k"}',
        b'{"prompt": "x", "temperature": NaN, "prompt_cache_key": "k"}',
        '{"prompt": "x", "prompt_cache_key": "k"}'.encode("utf-16"),
    ],
)
async def test_json_that_only_vllm_s_parser_takes_is_read_all_the_same(body):
    engine = Engine()
    async with fleet(engine) as client:
        reply = await client.post("/v1/completions", body)
    assert (reply.status, reply.headers["X-Session-ID"]) == (200, "k")
    assert engine.seen[0].body == body


async def test_half_an_emoji_breaks_no_conversation():
    turns = [{"role": "user", "content": "cut here: \ud83d"}]
    sessions = []
    async with fleet(Engine()) as client:
        for text in ("go on", "and on"):
            body = json.dumps({"messages": turns}).encode()
            reply = await client.post("/v1/chat/completions", body)
            sessions.append(reply.headers["X-Session-ID"])
            turns += [{"role": "assistant", "content": "x"}, {"role": "user", "content": text}]
    assert sessions[0] == sessions[1]


async def test_uploads_are_streamed():
    engine = Engine()
    data = os.urandom(3_000_000)
    async with fleet(engine) as client:
        form = aiohttp.FormData({"model": "w"})
        form.add_field("file", data, filename="a.wav", content_type="audio/wav")
        reply = await client.send("POST", "/v1/audio/transcriptions", form)
    assert reply.status == 200
    assert data in engine.seen[0].body
    assert engine.seen[0].headers["Content-Type"].startswith("multipart/form-data; boundary=")


async def test_a_body_of_unknown_length_passes():
    engine = Engine()

    async def pieces():
        yield b'{"prompt": "a'
        yield b'b"}'

    async with fleet(engine) as client:
        headers = {"Content-Type": "application/json"}
        await client.send("POST", "/v1/completions", pieces(), headers)
    assert engine.seen[0].body == b'{"prompt": "ab"}'


@pytest.mark.parametrize("limits", [{"max_json": 1000}, {"max_buffered": 1000}])
async def test_bodies_beyond_the_limits_are_known_by_their_headers(limits):
    engine = Engine()
    body = json.dumps({"prompt": "x" * 300_000, "session_id": "inside"}).encode()
    async with fleet(engine, **limits) as client:
        first = await client.post("/v1/completions", body)
        second = await client.post("/v1/completions", body, X_Session_ID="outside")
        assert client.router.proxy.budget.used == 0
    assert [seen.body for seen in engine.seen] == [body, body]
    assert "X-Session-ID" not in first.headers
    assert second.headers["X-Session-ID"] == "outside"


async def test_compressed_bodies_and_answers_stay_compressed():
    packed = gzip.compress(b'{"prompt": "x"}')

    async def answer(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=seen.body, headers={"Content-Encoding": "gzip"})

    engine = Engine(answer)
    async with fleet(engine) as client:
        reply = await client.post("/v1/completions", packed, Content_Encoding="gzip")
    assert engine.seen[0].body == packed
    assert reply.body == packed
    assert reply.headers["Content-Encoding"] == "gzip"


async def test_headers_of_the_connection_do_not_pass():
    async def answer(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(headers={"Connection": "X-Hop", "X-Hop": "1", "Keep-Alive": "9"})

    engine = Engine(answer)
    async with fleet(engine) as client:
        reply = await client.get("/x", Connection="X-Mine", X_Mine="1", TE="trailers")
    assert not {"X-Mine", "TE"} & set(engine.seen[0].headers)
    assert not {"X-Hop", "Keep-Alive"} & set(reply.headers)


async def test_cookies_are_of_the_client_only():
    engine = Engine(answer_status(200, Set_Cookie="a=b"))
    async with fleet(engine) as client:
        first = await client.get("/x")
        client.http.cookie_jar.clear()
        await client.get("/x")
    assert first.headers["Set-Cookie"] == "a=b"
    assert "Cookie" not in engine.seen[1].headers


async def test_redirects_are_for_the_client_to_follow():
    engine = Engine(answer_status(307, Location="/elsewhere"))
    async with (
        fleet(engine) as client,
        client.http.get(client.url + "/x", allow_redirects=False) as got,
    ):
        assert (got.status, got.headers["Location"]) == (307, "/elsewhere")
    assert len(engine.seen) == 1


async def test_a_client_that_expects_to_be_asked_is_asked():
    engine = Engine()
    async with fleet(engine) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.router.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + b"Content-Length: 15\r\nExpect: 100-continue\r\n\r\n")
        async with asyncio.timeout(5):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b'{"prompt": "x"}')
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
    assert engine.seen[0].body == b'{"prompt": "x"}'
    assert "Expect" not in engine.seen[0].headers


async def test_the_rank_of_an_engine_is_sent_and_cannot_be_chosen_by_clients():
    engine = Engine()
    async with fleet(engine) as client:
        await client.chat(X_data_parallel_rank="7")
        await client.router_adds(f"{engine.url}#1")
        client.router.backends.remove(client.router.backends.get(engine.name))
        reply = await client.chat(X_data_parallel_rank="7")
    assert engine.seen[0].headers["X-data-parallel-rank"] == "7"
    assert engine.seen[1].headers["X-data-parallel-rank"] == "1"
    assert reply.headers["x-saga-backend"] == f"{engine.name}-dp1"


async def test_a_client_that_leaves_aborts_its_call():
    held = Held()
    engine = Engine(held)
    async with fleet(engine) as client:
        waiting = asyncio.create_task(client.chat())
        await until(lambda: len(engine.seen) == 1)
        waiting.cancel()
        await until(lambda: engine.seen[0].aborted)
        await until(lambda: len(client.router.proxy) == 0)
        assert client.router.backends.get(engine.name).in_flight == 0
        assert client.router.proxy.budget.used == 0


async def test_a_client_that_leaves_in_mid_stream_aborts_its_call():
    engine = Engine(answer_pieces([b"data: x\n\n"] * 1000, pause=0.02))
    async with fleet(engine) as client:
        async with client.http.post(client.url + "/v1/completions", json={"prompt": "x"}) as got:
            await got.content.readany()
            got.close()
        await until(lambda: engine.seen[0].aborted)


async def test_ids_of_clients_are_forwarded_as_the_engines_know_them():
    engine = Engine()
    async with fleet(engine) as client:
        reply = await client.chat(x_claude_code_session_id="cc-1")
        await client.post("/v1/completions", b'{"prompt": "x", "session_id": "own"}')
        await client.chat(X_Session_ID="first", x_claude_code_session_id="cc-1")
    sent = [seen.headers.get("X-Session-ID") for seen in engine.seen]
    assert sent == ["cc-1", None, "first"]
    assert reply.headers["X-Session-ID"] == "cc-1"


async def test_conversations_without_ids_keep_their_session():
    engine = Engine()
    turns = [{"role": "system", "content": "you are one of many"}]
    sessions = []
    async with fleet(engine) as client:
        for text in ("fix the bug", "now test it"):
            turns = [*turns, {"role": "user", "content": text}]
            reply = await client.post(
                "/v1/chat/completions", json.dumps({"messages": turns}).encode()
            )
            sessions.append(reply.headers["X-Session-ID"])
            turns = [*turns, {"role": "assistant", "content": "done"}]
        other = [turns[0], {"role": "user", "content": "something else"}]
        reply = await client.post("/v1/chat/completions", json.dumps({"messages": other}).encode())
    assert sessions[0] == sessions[1] != reply.headers["X-Session-ID"]


async def test_plain_requests_have_no_session():
    async with fleet(Engine()) as client:
        reply = await client.post("/v1/embeddings", b'{"input": "a text"}')
        assert "X-Session-ID" not in reply.headers
        assert len(client.router.journal) == 0


@pytest.mark.parametrize("target", ["/a//b", "/..%2f..%2fetc", "/%00", "/a;b=c", "//x/y", "/@x"])
async def test_odd_paths_pass_as_they_are(target):
    engine = Engine()
    async with fleet(engine) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.router.port)
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        async with asyncio.timeout(5):
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
    assert engine.seen[0].path == target


async def test_garbage_ends_in_an_error_and_nothing_else():
    generator = random.Random(4)
    async with fleet(Engine()) as client:
        for _ in range(50):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.router.port)
            writer.write(generator.randbytes(generator.randrange(1, 400)) + b"\r\n\r\n")
            writer.write_eof()
            async with asyncio.timeout(5):
                answer = await reader.read()
            assert answer == b"" or answer.startswith(b"HTTP/1."), answer
            writer.close()
        assert (await client.chat()).status == 200
