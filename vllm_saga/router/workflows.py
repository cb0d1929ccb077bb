"""The workflows of all engines, asked of each when somebody asks."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Set
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from vllm_saga.policy import overview
from vllm_saga.policy.explain import MAX_LIMIT, STATES
from vllm_saga.policy.timeline import MAX_EVENTS
from vllm_saga.router.backends import Backend, Backends
from vllm_saga.router.problems import Problem
from vllm_saga.router.settings import RouterSettings

_PATH = "/v1/saga/workflows"
_PAST_PATH = "/v1/saga/past"
_TIMEOUT_S = 5.0
_DEFAULT_LIMIT = 100
_DEFAULT_EVENTS = 1000


class Workflows:
    """Asks every backend that runs saga, and puts the answers together (policy/overview.py)."""

    def __init__(
        self, settings: RouterSettings, http: aiohttp.ClientSession, backends: Backends
    ) -> None:
        self._settings = settings
        self._http = http
        self._backends = backends

    def tenant(self, request: web.BaseRequest) -> str | None:
        """Whose workflows the caller may see, as the gateway says; None if it does not."""
        tenant: str | None = request.headers.get(self._settings.tenant_header)
        return tenant

    async def all(self, request: web.BaseRequest) -> overview.Overview:
        """The workflows of every backend; one that cannot be asked is listed with the reason.

        Raises:
            Problem: the query is wrong.
        """
        query = _read_query(request)
        parts = await self._parts(_PATH, query, request, {"total", "workflows", "tenants"})
        return overview.together(parts, int(query["limit"]))

    async def past(self, request: web.BaseRequest) -> overview.Past:
        """What has ended lately on every backend; one that cannot be asked is listed as in `all`.

        Raises:
            Problem: the query is wrong.
        """
        query = _read_past_query(request)
        parts = await self._parts(_PAST_PATH, query, request, {"events"})
        return overview.past_together(parts, int(query["limit"]))

    async def one(self, request: web.BaseRequest, name: str) -> dict[str, Any]:
        """A workflow, of the backend where it made a call last.

        Raises:
            Problem: no backend knows it.
        """
        path = f"{_PATH}/{quote(name, safe='')}"
        answers = await self._ask(path, dict(request.rel_url.query), request)
        found = overview.latest(
            answer | {"engine": backend.name}
            for backend, (status, answer) in answers
            if status == 200 and "idle_s" in answer
        )
        if found is None:
            raise Problem(404, "not_found", f"no workflow has a session {name!r}")
        return found

    async def _parts(
        self, path: str, query: dict[str, str], request: web.BaseRequest, wanted: Set[str]
    ) -> list[dict[str, Any]]:
        """What each backend answers that has these fields and "engines"; else that it does not."""
        parts = []
        for backend, (status, answer) in await self._ask(path, query, request):
            if status == 200 and answer.keys() >= wanted | {"engines"}:
                parts.append(overview.renamed(answer, backend.name))
            else:
                parts.append(overview.silent(backend.name, _why(status, answer)))
        return parts

    async def _ask(
        self, path: str, query: dict[str, str], request: web.BaseRequest
    ) -> list[tuple[Backend, tuple[int, dict[str, Any]]]]:
        backends = list(self._backends)
        tenant = self.tenant(request)
        whose = {} if tenant is None else {self._settings.tenant_header: tenant}
        asked = (self._get(backend, path, query, whose) for backend in backends)
        return list(zip(backends, await asyncio.gather(*asked), strict=True))

    async def _get(
        self, backend: Backend, path: str, query: dict[str, str], whose: dict[str, str]
    ) -> tuple[int, dict[str, Any]]:
        """Status and answer; 0 if there is none."""
        url = URL(backend.address.url + path, encoded=True).with_query(query)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        try:
            async with self._http.get(
                url, headers=backend.headers | whose, timeout=timeout
            ) as response:
                return response.status, msgspec.json.decode(await response.read(), type=dict)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError):
            return 0, {}


def _read_query(request: web.BaseRequest) -> dict[str, str]:
    query = dict(request.rel_url.query)
    _check_limit(query, _DEFAULT_LIMIT, MAX_LIMIT)
    if query.get("state", "held") not in STATES:
        allowed = ", ".join(STATES)
        raise Problem(400, "bad_request", f"state = {query['state']!r}: there are {allowed}")
    return query


def _read_past_query(request: web.BaseRequest) -> dict[str, str]:
    query = dict(request.rel_url.query)
    _check_limit(query, _DEFAULT_EVENTS, MAX_EVENTS)
    within_s = query.get("within_s", "0")
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", within_s):
        raise Problem(400, "bad_request", f"within_s = {within_s!r}: seconds are wanted")
    return query


def _check_limit(query: dict[str, str], default: int, most: int) -> None:
    limit = query.setdefault("limit", str(default))
    if not re.fullmatch("[0-9]{1,4}", limit) or int(limit) > most:
        raise Problem(400, "bad_request", f"limit = {limit!r}: at most {most} is wanted")


def _why(status: int, answer: dict[str, Any]) -> str:
    if not status:
        return "it does not answer"
    error = answer.get("error")
    said = error.get("message") if isinstance(error, dict) else None
    return str(said or f"status {status}: it runs without saga, or without VLLM_PLUGINS=saga")
