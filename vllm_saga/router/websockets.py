"""Websockets (`/v1/realtime`): messages both ways until one side ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TypeAlias

import aiohttp
from aiohttp import WSMsgType, web

_MAX_MESSAGE = 64 << 20

_Socket: TypeAlias = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


def is_websocket(request: web.BaseRequest) -> bool:
    return request.headers.get("Upgrade", "").lower() == "websocket"


async def connect(
    http: aiohttp.ClientSession, url: str, headers: Mapping[str, str], request: web.BaseRequest
) -> aiohttp.ClientWebSocketResponse:
    """Open the backend's side.

    Raises:
        aiohttp.WSServerHandshakeError: the backend has answered something else.
        aiohttp.ClientError, TimeoutError: it cannot be reached.
    """
    offered = request.headers.get("Sec-WebSocket-Protocol", "")
    return await http.ws_connect(
        url,
        headers=headers,
        protocols=[name.strip() for name in offered.split(",") if name.strip()],
        autoping=False,
        max_msg_size=_MAX_MESSAGE,
    )


async def relay(
    request: web.BaseRequest, backend: aiohttp.ClientWebSocketResponse, headers: Mapping[str, str]
) -> web.WebSocketResponse:
    """Answer the client's handshake, then pass on what either side says."""
    client = web.WebSocketResponse(
        protocols=[backend.protocol] if backend.protocol else [],
        autoping=False,
        max_msg_size=_MAX_MESSAGE,
    )
    client.headers.update(headers)
    await client.prepare(request)
    pumps = {
        asyncio.create_task(_pump(client, backend)), asyncio.create_task(_pump(backend, client)),
    }  # fmt: skip
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        # The side that is still open gets the code with which the other one has ended.
        await backend.close(code=_code(client))
        await client.close(code=_code(backend))
    return client


async def _pump(source: _Socket, sink: _Socket) -> None:
    async for message in source:
        if message.type is WSMsgType.TEXT:
            await sink.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await sink.send_bytes(message.data)
        elif message.type is WSMsgType.PING:
            await sink.ping(message.data)
        elif message.type is WSMsgType.PONG:
            await sink.pong(message.data)
        else:
            return


def _code(socket: _Socket) -> int:
    """A close code that may be sent: some only tell that there was none."""
    code = socket.close_code
    return code if code is not None and code not in (1005, 1006, 1015) else 1000
