"""The router process: its parts put together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from vllm_saga import page
from vllm_saga.policy.clients import Rules
from vllm_saga.router.access import Access
from vllm_saga.router.backends import Address, Backends, BackendsFile
from vllm_saga.router.edge import Edge
from vllm_saga.router.endpoints import Endpoints
from vllm_saga.router.fleet import Placer
from vllm_saga.router.guard import GuardedPlacer
from vllm_saga.router.health import Health
from vllm_saga.router.journal import Journal
from vllm_saga.router.metrics import Metrics
from vllm_saga.router.placement import Settings as Placement
from vllm_saga.router.placement import make_placer
from vllm_saga.router.problems import Problem
from vllm_saga.router.proxy import Proxy
from vllm_saga.router.settings import RouterSettings
from vllm_saga.router.watch import Watcher, follow
from vllm_saga.router.workflows import Workflows

logger = logging.getLogger(__name__)

EPOCH_S = 0.1
_MAX_FIELD = 32 * 1024
# So long the rest of a body is read that nobody wants, so that its sender can read the answer.
_LINGER_S = 2.0
# vLLM closes connections that are idle for 5 s; one that is just being closed must not be used.
_KEEP_BACKEND_S = 3.0
# A peer that vanished without a word is noticed after 15 + 4 x 5 seconds.
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))


class Router:
    """One router: `async with` starts it. `placer` replaces the one that the settings name."""

    def __init__(
        self,
        settings: RouterSettings,
        addresses: Sequence[Address] = (),
        backends_file: Path | None = None,
        placer: Placer | None = None,
    ) -> None:
        self.settings = settings
        self._addresses = addresses
        self._file = BackendsFile(backends_file) if backends_file else None
        limits = Placement(
            max_idle_sessions=settings.max_sessions, session_idle_s=settings.session_idle
        )
        self._inner = placer or make_placer(settings.policy, limits)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Router:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self.endpoints.stopping = True
        await self._stack.aclose()

    @property
    def port(self) -> int:
        """Where it listens, also if that was left to the system."""
        return int(self._runner.addresses[0][1])

    async def _start(self) -> None:
        settings = self.settings
        http = await self._stack.enter_async_context(_client(settings))
        key = settings.backend_api_key or settings.api_key
        shown = {"Authorization": f"Bearer {key}"} if key else {}
        watching = await self._stack.enter_async_context(_client(settings, shown))
        self.placer = GuardedPlacer(self._inner, self._in_flight)
        self.backends = Backends(self.placer, self._make_health)
        self.watcher = Watcher(settings, watching, self.placer, self.backends)
        self._stack.callback(self.watcher.stop_all)
        rules = Rules(settings.session_headers, settings.tenant_header)
        self.edge = Edge(rules, settings.max_sessions, settings.session_idle)
        self.journal = Journal(settings.max_sessions, settings.session_idle)
        self.metrics = Metrics(self.backends, lambda: self.placer.errors + self.edge.errors)
        self.proxy = Proxy(
            settings, http, self.backends, self.placer, self.watcher, self.edge, self.journal,
            self.metrics,
        )  # fmt: skip
        self.metrics.in_flight.set_function(lambda: len(self.proxy))
        self.metrics.buffered.set_function(lambda: self.proxy.budget.used)
        self.metrics.sessions.set_function(lambda: len(self.journal))
        self.metrics.connections.set_function(lambda: self._server.open)
        self.access = Access(settings.api_key, settings.admin_api_key)
        self.endpoints = Endpoints(
            self.access, self.backends, self.proxy, self.journal, self.metrics,
            Workflows(settings, watching, self.backends),
            page.load(settings.tenant_header, served_by="router"),
        )  # fmt: skip
        for address in self._addresses:
            self.backends.add(address)
        if self._file is not None:
            # The first time it must be right; later changes may have mistakes.
            self._file.update(self.backends)
            await self._stack.enter_async_context(_running(follow(self._file, self.backends)))
        await self._stack.enter_async_context(_running(self._epochs()))
        await self._listen()

    async def _listen(self) -> None:
        settings = self.settings
        self._server = _Server(
            self._handle, settings.max_connections, keepalive_timeout=settings.idle_timeout
        )
        self._runner = web.ServerRunner(
            self._server, shutdown_timeout=settings.shutdown_timeout, access_log=None
        )
        await self._runner.setup()
        self._stack.push_async_callback(self._runner.cleanup)
        site = web.TCPSite(
            self._runner, settings.host, settings.port, backlog=4096,
            reuse_port=settings.reuse_port or None,
        )  # fmt: skip
        await site.start()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            own = self.endpoints.find(request)
            if own is not None:
                response: web.StreamResponse = await own
            else:
                self.access.check_client(request)
                response = await self.proxy.serve(request)
        except Problem as problem:
            self.metrics.refused.labels(problem.reason).inc()
            response = problem.response()
        self.metrics.answers.labels(f"{response.status // 100}xx").inc()
        return response

    async def _epochs(self) -> None:
        while True:
            await asyncio.sleep(EPOCH_S)
            for move in self.placer.epoch(time.monotonic()):
                self.proxy.carry_out(move)

    def _in_flight(self, replica: str) -> int:
        backend = self.backends.get(replica)
        return backend.in_flight if backend else 0

    def _make_health(self) -> Health:
        s = self.settings
        return Health(s.health_failures, s.health_successes, s.breaker_failures, s.breaker_s)


class _Server(web.Server):
    """Closes connections beyond a number, so that file descriptors remain for backends."""

    def __init__(self, handler: object, most: int, **options: Any) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,
            auto_decompress=False,
            max_line_size=_MAX_FIELD,
            max_field_size=_MAX_FIELD,
            lingering_time=_LINGER_S,
            access_log=None,
            logger=_protocol_logger(),
            **options,
        )
        self._most = most
        self.open = 0

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self.open += 1
        if self.open > self._most:
            transport.abort()

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        self.open -= 1


def _protocol_logger() -> logging.Logger:
    """What is wrong with a client's HTTP is no error of ours, and must not fill the log."""

    def ours(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError)

    found = logging.getLogger(f"{__name__}.http")
    if not found.filters:
        found.addFilter(ours)
    return found


def _client(
    settings: RouterSettings, headers: Mapping[str, str] | None = None
) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(
            limit=0, keepalive_timeout=_KEEP_BACKEND_S, socket_factory=_make_socket
        ),
        timeout=aiohttp.ClientTimeout(
            total=None,
            sock_connect=settings.connect_timeout,
            sock_read=settings.answer_timeout,
        ),
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        max_line_size=_MAX_FIELD,
        max_field_size=_MAX_FIELD,
    )


def _make_socket(info: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
    family, kind, protocol, _, _ = info
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made


@contextlib.asynccontextmanager
async def _running(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Run it beside the rest, and stop it at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
