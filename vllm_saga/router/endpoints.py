"""What the router answers itself: its health, its metrics, /v1/saga, and the page that shows it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

import msgspec
from aiohttp import web

from vllm_saga import page
from vllm_saga.policy.clients import is_of_another_site
from vllm_saga.policy.undecodable import UNDECODABLE
from vllm_saga.router.access import Access
from vllm_saga.router.backends import Address, AddressError, Backend, Backends
from vllm_saga.router.journal import Journal
from vllm_saga.router.metrics import Metrics
from vllm_saga.router.problems import Problem
from vllm_saga.router.proxy import Proxy
from vllm_saga.router.workflows import Workflows

_PREFIX = "/v1/saga"
_MOST = 10_000
_LONGEST_BODY = 64 * 1024

Handler = Callable[[web.BaseRequest, str], Awaitable[web.Response]]


class _NewBackend(msgspec.Struct):
    url: str


class Endpoints:
    """Paths of the router."""

    def __init__(
        self,
        access: Access,
        backends: Backends,
        proxy: Proxy,
        journal: Journal,
        metrics: Metrics,
        workflows: Workflows,
        page_files: Mapping[str, page.File],
    ) -> None:
        self._access = access
        self._backends = backends
        self._proxy = proxy
        self._journal = journal
        self._metrics = metrics
        self._workflows = workflows
        self._page = page_files
        self.stopping = False
        self._open: dict[str, Handler] = {
            "/health": self._health, "/ready": self._ready, "/metrics": self._show_metrics,
        }  # fmt: skip
        self._routes: list[tuple[str, re.Pattern[str], Handler]] = [
            ("GET", re.compile("/sessions"), self._sessions),
            ("GET", re.compile("/decisions"), self._decisions),
            ("GET", re.compile("/backends"), self._list),
            ("POST", re.compile("/backends"), self._add),
            ("DELETE", re.compile("/backends/(.+)"), self._remove),
            ("POST", re.compile("/backends/(.+)/drain"), self._drain),
            ("POST", re.compile("/backends/(.+)/undrain"), self._undrain),
            ("POST", re.compile("/sessions/([^/]+)/end"), self._end),
            ("GET", re.compile("/past"), self._past),
            ("GET", re.compile("/workflows"), self._list_workflows),
            ("GET", re.compile("/workflows/(.+)"), self._workflow),
        ]

    def find(self, request: web.BaseRequest) -> Awaitable[web.Response] | None:
        """The answer of a path of the router's own; None if it is for a backend.

        Raises:
            Problem: the router has no such path, or the caller may not use it.
        """
        path = request.rel_url.raw_path
        if path in self._open and request.method in ("GET", "HEAD"):
            return self._open[path](request, "")
        if path == page.PATH or path.startswith(page.PATH + "/"):
            return self._show_page(request, path)
        if path != _PREFIX and not path.startswith(_PREFIX + "/"):
            return None
        allowed = []
        for method, pattern, handler in self._routes:
            if match := pattern.fullmatch(path, len(_PREFIX)):
                if method == request.method:
                    self._check(request, handler)
                    return handler(request, unquote(match[1]) if match.groups() else "")
                allowed.append(method)
        if allowed:
            raise Problem(405, "method", f"{path} takes {', '.join(allowed)}")
        raise Problem(404, "not_found", f"the router has no {path}")

    def _check(self, request: web.BaseRequest, handler: Handler) -> None:
        """Clients may end their tenant's sessions and see its workflows; the rest is operators'."""
        if request.method != "GET" and is_of_another_site(request.headers):
            raise Problem(403, "cross_site", "a web page of another origin may not do this")
        of_tenant = handler in (self._list_workflows, self._workflow, self._past) and (
            self._workflows.tenant(request) is not None
        )
        if handler == self._end or of_tenant:
            self._access.check_client(request)
        else:
            self._access.check_operator(request)

    async def _health(self, request: web.BaseRequest, _: str) -> web.Response:
        return web.Response()

    async def _ready(self, request: web.BaseRequest, _: str) -> web.Response:
        if self.stopping or not self._backends.any_accepting():
            why = "the router is stopping" if self.stopping else "no backend accepts requests"
            raise Problem(503, "not_ready", why, 2)
        return web.Response()

    async def _show_metrics(self, request: web.BaseRequest, _: str) -> web.Response:
        return web.Response(
            body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def _show_page(self, request: web.BaseRequest, path: str) -> web.Response:
        """Anybody may have it: what it shows, it asks for with the key of who looks at it."""
        if request.method not in ("GET", "HEAD"):
            raise Problem(405, "method", f"{path} takes GET, HEAD")
        if path == page.PATH + "/":
            return web.Response(status=308, headers={"Location": ".." + page.PATH})
        file = self._page.get(path)
        if file is None:
            raise Problem(404, "not_found", f"the router has no {path}")
        return web.Response(
            body=file.body, headers={"Content-Type": file.content_type, **page.HEADERS}
        )

    async def _sessions(self, request: web.BaseRequest, _: str) -> web.Response:
        found = self._journal.sessions(_limit(request), time.monotonic())
        return web.json_response({"total": len(self._journal), "sessions": found})

    async def _decisions(self, request: web.BaseRequest, _: str) -> web.Response:
        return web.json_response({"decisions": self._journal.decisions(_limit(request))})

    async def _list(self, request: web.BaseRequest, _: str) -> web.Response:
        now = time.monotonic()
        return web.json_response({"backends": [_describe(b, now) for b in self._backends]})

    async def _add(self, request: web.BaseRequest, _: str) -> web.Response:
        try:
            wanted = msgspec.json.decode(await _read(request), type=_NewBackend)
            backend = self._backends.add(Address.parse(wanted.url))
        except (*UNDECODABLE, AddressError) as error:
            raise Problem(400, "bad_request", str(error)) from None
        return web.json_response(_describe(backend, time.monotonic()))

    async def _remove(self, request: web.BaseRequest, name: str) -> web.Response:
        backend = self._backend(name)
        self._backends.remove(backend)
        return web.json_response({"id": backend.name, "removed": True})

    async def _drain(self, request: web.BaseRequest, name: str) -> web.Response:
        return self._set_draining(name, True)

    async def _undrain(self, request: web.BaseRequest, name: str) -> web.Response:
        return self._set_draining(name, False)

    def _set_draining(self, name: str, draining: bool) -> web.Response:
        backend = self._backend(name)
        self._backends.drain(backend, draining)
        return web.json_response(_describe(backend, time.monotonic()))

    async def _end(self, request: web.BaseRequest, name: str) -> web.Response:
        known = self._proxy.end_session(request, name)
        return web.json_response({"session": name, "known": known})

    async def _past(self, request: web.BaseRequest, _: str) -> web.Response:
        return web.json_response(await self._workflows.past(request))

    async def _list_workflows(self, request: web.BaseRequest, _: str) -> web.Response:
        return web.json_response(await self._workflows.all(request))

    async def _workflow(self, request: web.BaseRequest, name: str) -> web.Response:
        return web.json_response(await self._workflows.one(request, name))

    def _backend(self, name: str) -> Backend:
        backend = self._backends.find(name)
        if backend is None:
            known = ", ".join(b.name for b in self._backends) or "none"
            raise Problem(404, "not_found", f"no backend {name!r}; there are: {known}")
        return backend


def _describe(backend: Backend, now: float) -> dict[str, Any]:
    report = backend.report
    return {
        "id": backend.name,
        "url": backend.address.url,
        "rank": backend.address.rank,
        "state": backend.health.state(now),
        "draining": backend.draining,
        "in_flight": backend.in_flight,
        "speaks_saga": backend.speaks_saga,
        "report": report
        and {
            "age_s": round(now - report.at, 3),
            "started": report.started,
            "kv_tokens": report.kv_tokens,
            "used_tokens": report.used_tokens,
            "running": report.running,
            "waiting": report.waiting,
            "resident": report.resident,
            "held": len(report.held_calls),
            "sessions": len(report.sessions),
        },
    }


def _limit(request: web.BaseRequest) -> int:
    text = request.rel_url.query.get("limit", "1000")
    if not re.fullmatch("[0-9]{1,9}", text):
        raise Problem(400, "bad_request", f"limit = {text!r}: a number is wanted")
    return min(int(text), _MOST)


async def _read(request: web.BaseRequest) -> bytes:
    data = b""
    async with asyncio.timeout(10):
        while piece := await request.content.readany():
            data += piece
            if len(data) > _LONGEST_BODY:
                raise Problem(413, "too_large", f"at most {_LONGEST_BODY} bytes are wanted")
    return data
