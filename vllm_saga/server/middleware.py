"""SessionHeaders: ASGI middleware that tells vLLM whose call it is, by what its client sends."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import cache
from typing import Any

from prometheus_client import Counter

from vllm_saga.config import SagaConfig, load_config
from vllm_saga.policy.clients import SESSION_HEADER, Caller, Rules, identify
from vllm_saga.server.body import JsonBody

logger = logging.getLogger("vllm.saga")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What takes `vllm_xargs`; vLLM's other calls are known by their headers alone.
_PATHS = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations")
)
# A body of more bytes is not read here: identity is then what the headers say.
_MAX_BODY_BYTES = 16 << 20


class SessionHeaders:
    """`vllm serve --middleware vllm_saga.server.SessionHeaders`.

    Whatever header or field names the session, X-Session-ID says it from here on; a parent and the
    end of a session go into the body's `vllm_xargs`, where saga reads them, and so does the tenant
    where `tenant_source` is "saga_tenant". What vLLM reads by itself stays as it is, and so does a
    request that makes no sense: to refuse it is vLLM's part. Answers pass untouched.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._settings: tuple[Rules, bool] | None = None
        self._callers, self._conflicts = _counters()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            rules, by_tenant = self._settings or self._load(scope)
            headers = _read_headers(scope)
            data, receive = await _read_body(scope, headers, receive, unlimited=by_tenant)
            body = _parse(data)
            caller = identify(headers, body.fields if body is not None else None, rules)
            self._count(caller)
            if caller.session is not None and not headers.get(SESSION_HEADER):
                _add_session(scope, caller.session)
            more = _extras(caller, body.xargs, by_tenant) if body is not None else {}
            if body is not None and more:
                receive = _replay(scope, body.with_xargs(more), receive)
            elif data is not None:
                receive = _replay(scope, data, receive)
        await self._app(scope, receive, send)

    def _load(self, scope: Scope) -> tuple[Rules, bool]:
        """The rules, and whether requests are to carry their tenant: as the engine reads them."""
        state = getattr(scope.get("app"), "state", None)
        vllm_config = getattr(state, "vllm_config", None)
        try:
            config = load_config(getattr(vllm_config, "additional_config", None))
        except ValueError:
            logger.exception("saga: identity follows the defaults")
            config = SagaConfig.model_validate({})
        rules = Rules(config.session_headers, config.tenant_header)
        self._settings = rules, config.tenant_source == "saga_tenant"
        return self._settings

    def _count(self, caller: Caller) -> None:
        self._callers.labels(caller.source).inc()
        if caller.conflict:
            self._conflicts.inc()


@cache
def _counters() -> tuple[Counter, Counter]:
    # Not before vLLM's own: it clears the registry of every name that begins like its.
    callers = Counter(
        "vllm:saga_callers", "Requests by what named their session.", labelnames=["source"]
    )
    conflicts = Counter(
        "vllm:saga_id_conflicts", "Requests in which two sources named different sessions."
    )
    return callers, conflicts


def _read_headers(scope: Scope) -> dict[str, str]:
    """By lower-case name; of equal names the first counts, as vLLM has it."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return headers


async def _read_body(
    scope: Scope, headers: Mapping[str, str], receive: Receive, unlimited: bool
) -> tuple[bytes | None, Receive]:
    """The whole body, if it is one to be read, and where the application receives from."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    limit = float("inf") if unlimited else _MAX_BODY_BYTES
    if path not in _PATHS or _announced_bytes(headers) > limit:
        return None, receive
    messages: list[Message] = []
    pieces: list[bytes] = []
    length = 0
    while length <= limit:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            break
        pieces.append(message.get("body", b""))
        length += len(pieces[-1])
        if not message.get("more_body", False):
            return b"".join(pieces), receive
    return None, _chained(messages, receive)


def _announced_bytes(headers: Mapping[str, str]) -> float:
    try:
        return float(headers.get("content-length", "0"))
    except ValueError:
        return 0.0


def _parse(data: bytes | None) -> JsonBody | None:
    try:
        return JsonBody(data) if data is not None else None
    except ValueError:
        return None


def _extras(caller: Caller, xargs: Mapping[str, Any], by_tenant: bool) -> dict[str, Any]:
    """What the engine is to know besides the session, as far as the body does not say it."""
    wanted: dict[str, Any] = {}
    if caller.parent is not None:
        wanted["saga_parent"] = caller.parent
    if caller.last:
        wanted["saga_last"] = 1
    if by_tenant:
        wanted["saga_tenant"] = caller.tenant
    return {name: value for name, value in wanted.items() if xargs.get(name) != value}


def _add_session(scope: Scope, session: str) -> None:
    if not (session.isascii() and session.isprintable()):
        return  # of vLLM's own fields, and so known to it
    name = SESSION_HEADER.encode()
    kept = [header for header in scope["headers"] if header[0].lower() != name]
    scope["headers"] = [*kept, (name, session.encode())]


def _replay(scope: Scope, data: bytes, receive: Receive) -> Receive:
    """`data` is the body from here on."""
    length = str(len(data)).encode()
    scope["headers"] = [
        (name, length if name.lower() == b"content-length" else value)
        for name, value in scope["headers"]
    ]
    return _chained([{"type": "http.request", "body": data, "more_body": False}], receive)


def _chained(messages: list[Message], receive: Receive) -> Receive:
    """`messages` once more, in order, and then what else is received."""
    left = iter(messages)

    async def receive_next() -> Message:
        for message in left:
            return message
        return await receive()

    return receive_next
