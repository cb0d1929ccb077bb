"""Websockets through the router."""

from __future__ import annotations

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from engines import Engine, Seen, answer_status, fleet, until


async def answer_echo(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
    socket = web.WebSocketResponse(protocols=["realtime"])
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            if message.data == "bye":
                await socket.close(code=4001, message=b"so long")
                break
            await socket.send_str("heard " + message.data)
        elif message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data[::-1])
    return socket


async def test_messages_pass_both_ways():
    engine = Engine(answer_echo)
    async with fleet(engine) as client:
        url = client.url + "/v1/realtime?model=m"
        async with client.http.ws_connect(
            url, protocols=["realtime"], headers={"Authorization": "Bearer k"}
        ) as socket:
            assert socket.protocol == "realtime"
            assert socket._response.headers["x-saga-backend"] == engine.name
            await socket.send_str("hé")
            assert (await socket.receive(5)).data == "heard hé"
            await socket.send_bytes(b"\x00\xff" * 100_000)
            assert (await socket.receive(5)).data == b"\xff\x00" * 100_000
            await socket.send_str("bye")
            closing = await socket.receive(5)
            assert (closing.type, closing.data) == (WSMsgType.CLOSE, 4001)
        await until(lambda: len(client.router.proxy) == 0)
    assert engine.seen[0].path == "/v1/realtime?model=m"
    assert engine.seen[0].headers["Authorization"] == "Bearer k"


async def test_a_client_that_leaves_ends_the_engines_side():
    engine = Engine(answer_echo)
    async with fleet(engine) as client:
        socket = await client.http.ws_connect(client.url + "/v1/realtime")
        await socket.send_str("x")
        await socket.receive(5)
        socket._response.connection.transport.abort()
        await until(lambda: engine.seen[0].ended or engine.seen[0].aborted)
        await until(lambda: len(client.router.proxy) == 0)


async def test_what_the_engine_refuses_is_refused():
    async with fleet(Engine(answer_status(403))) as client:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await client.http.ws_connect(client.url + "/v1/realtime")
    assert caught.value.status == 403


async def test_another_engine_serves_where_one_is_gone():
    here, gone = Engine(answer_echo), Engine(answer_echo)
    async with fleet(here, gone, health_interval=30.0) as client:
        await gone.stop()
        for _ in range(3):
            async with client.http.ws_connect(client.url + "/v1/realtime") as socket:
                await socket.send_str("x")
                assert (await socket.receive(5)).data == "heard x"
