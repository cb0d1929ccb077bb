"""Small engines behind a router: real HTTP servers that answer, hold, break off or die."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from vllm_saga.router.app import Router
from vllm_saga.router.backends import Address
from vllm_saga.router.settings import RouterSettings

Answering = Callable[["Seen", web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass
class Seen:
    """A request as the engine got it. `ended`: answered in full; `aborted`: the caller had gone."""

    method: str
    path: str
    headers: Any
    body: bytes
    size: int = 0
    ended: bool = False
    aborted: bool = False


@dataclass
class Engine:
    """Answers with `answer`; its health is `healthy`, its /v1/saga/state `state`, if not None."""

    answer: Answering | None = None
    healthy: bool = True
    state: dict[str, Any] | None = None
    metrics: str | None = None
    port: int = 0
    keeps_bodies: bool = True
    seen: list[Seen] = field(default_factory=list)
    probes: int = 0
    ended_sessions: list[tuple[str, str]] = field(default_factory=list)
    states_asked: int = 0
    keys_of_probes: set[str | None] = field(default_factory=set)

    async def start(self) -> Engine:
        self._server = web.Server(self._handle, handler_cancellation=True, auto_decompress=False)
        self._runner = web.ServerRunner(self._server, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        """As `kill -9` does: nobody listens any more, and connections are reset."""
        for site in list(self._runner.sites):
            await site.stop()
        for connection in list(self._server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/health":
            self.probes += 1
            return web.Response(status=200 if self.healthy else 503)
        if request.path == "/v1/saga/state":
            self.states_asked += 1
            self.keys_of_probes.add(request.headers.get("Authorization"))
            return web.json_response(self.state) if self.state else web.Response(status=404)
        if request.path == "/metrics":
            return web.Response(text=self.metrics) if self.metrics else web.Response(status=404)
        if request.path.startswith("/v1/saga/sessions/"):
            session = request.path.split("/")[4]
            self.ended_sessions.append((request.headers.get("x-tenant-id", ""), session))
            return web.json_response({})
        seen = Seen(request.method, request.raw_path, request.headers.copy(), b"")
        self.seen.append(seen)
        try:
            async for piece in request.content.iter_any():
                seen.size += len(piece)
                if self.keeps_bodies:
                    seen.body += piece
            response = await (self.answer or answer_chat)(seen, request)
        except (asyncio.CancelledError, ConnectionError):
            seen.aborted = True
            raise
        seen.ended = True
        return response


async def answer_chat(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    return web.json_response({"id": "chat-1", "choices": [], "usage": usage})


def answer_status(status: int, **headers: str) -> Answering:
    async def answer(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, headers=spelled(headers), text=f"this is {status}")

    return answer


def answer_pieces(pieces: list[bytes], pause: float = 0.0) -> Answering:
    """A stream of these pieces; vLLM's headers too are sent at once."""

    async def answer(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for piece in pieces:
            await asyncio.sleep(pause)
            await response.write(piece)
        await response.write_eof()
        return response

    return answer


class Held:
    """Answers nothing until `go` is set; `headers_first`: but for the headers of a stream."""

    def __init__(self, headers_first: bool = True) -> None:
        self.go = asyncio.Event()
        self.headers_first = headers_first

    async def __call__(self, seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        if not self.headers_first:
            await self.go.wait()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"")
        await self.go.wait()
        await response.write(b"data: done\n\n")
        await response.write_eof()
        return response


def quick(**changes: Any) -> RouterSettings:
    """Settings for tests: every interval is short."""
    values: dict[str, Any] = {
        "policy": "round_robin", "port": 0, "health_interval": 0.1, "health_timeout": 1.0,
        "report_interval": 0.1, "breaker_s": 0.3, "shutdown_timeout": 0.2, "connect_timeout": 1.0,
    }  # fmt: skip
    return RouterSettings(**values | changes)


@dataclass
class Client:
    """A client of a router, and what it may look into."""

    router: Router
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.router.port}"

    async def chat(self, text: str = "hello", **options: Any) -> Reply:
        body = {"model": "m", "messages": [{"role": "user", "content": text}]}
        return await self.post("/v1/chat/completions", json.dumps(body).encode(), **options)

    async def post(self, path: str, body: bytes, **headers: str) -> Reply:
        json_ = {"Content-Type": "application/json"}
        return await self.send("POST", path, body, json_ | spelled(headers))

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.send("GET", path, None, spelled(headers))

    async def send(
        self, method: str, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> Reply:
        url = URL(self.url + path, encoded=True)
        async with self.http.request(method, url, data=body, headers=headers) as got:
            return Reply(got.status, got.headers.copy(), await got.read())

    async def router_adds(self, url: str) -> str:
        """Add a backend as operators do, and wait until it is up; its id."""
        reply = await self.post("/v1/saga/backends", json.dumps({"url": url}).encode())
        name = reply.json()["id"]
        await until(lambda: self.router.backends.get(name).accepting)
        return name

    async def until_up(self, *engines: Engine) -> None:
        """Wait until these, and only these, accept calls."""
        wanted = {engine.name for engine in engines}
        await until(lambda: {b.name for b in self.router.backends if b.accepting} == wanted)


@dataclass
class Reply:
    status: int
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def spelled(headers: dict[str, str]) -> dict[str, str]:
    """Headers given as keyword arguments, by their names."""
    return {name.replace("_", "-"): value for name, value in headers.items()}


async def until(true: Callable[[], bool], within: float = 5.0) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(within):
        while not true():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def fleet(*engines: Engine, **changes: Any) -> AsyncIterator[Client]:
    """These engines behind a router whose settings are `changes` (`placer`: its own brain)."""
    placer = changes.pop("placer", None)
    for engine in engines:
        await engine.start()
    addresses = [Address.parse(engine.url) for engine in engines]
    try:
        async with (
            Router(quick(**changes), addresses, placer=placer) as router,
            aiohttp.ClientSession(auto_decompress=False) as http,
        ):
            client = Client(router, http)
            await client.until_up(*engines)
            yield client
    finally:
        for engine in engines:
            await engine.stop()
