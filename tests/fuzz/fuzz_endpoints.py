"""Fuzzer of the router's own endpoints: any path, query, header and body, over its real HTTP.

The server's are told by OpenAPI, and driven from it (test_server_schema.py).
"""

from __future__ import annotations

import asyncio
import atexit
import json
import threading
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import quote

from engines import Client, Engine, fleet
from fuzz_registry import fuzzes
from fuzz_shapes import encoded, texts, values
from hypothesis import strategies as st

#: What it answers itself; 429 and 5xx are for calls that it passes on.
EXPECTED = {200, 308, 400, 401, 403, 404, 405, 413}
STATE = {
    "started": "1", "kv_tokens": 1000, "used_tokens": 0, "running": 0, "waiting": 0,
    "resident": 1, "prefill_tokens_per_s": 1.0, "held_calls": [], "sessions": [], "saga": {},
}  # fmt: skip

names = texts.map(lambda text: quote(text, safe="", errors="replace")) | st.sampled_from(
    ["a", "%00", "%ff", "..", "%2e%2e", "%2F", "a/b", "127.0.0.1:1", "http:%2F%2Fx", "%", "%zz"]
)
PATHS = (
    "sessions", "decisions", "backends", "backends/{}", "backends/{}/drain", "backends/{}/undrain",
    "sessions/{}/end", "past", "workflows", "workflows/{}", "{}", "state", "",
)  # fmt: skip
paths = st.builds(str.format, st.sampled_from(PATHS), names).map(lambda path: f"/v1/saga/{path}")
FIELDS = ("limit", "state", "tenant", "within_s", "x")
GOOD = ("10", "held", "t", "5.5", "0", "501", "-1", "nan", "1e9", "%31", "")
queries = st.lists(
    st.tuples(st.sampled_from(FIELDS), st.sampled_from(GOOD) | names).map("=".join), max_size=3
).map("&".join)
headers = st.dictionaries(
    st.sampled_from(["X-Tenant-Id", "Authorization", "Origin", "Sec-Fetch-Site", "Content-Type"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
    | st.sampled_from(["application/json", "Bearer key", "null", "cross-site", "same-origin"]),
    max_size=3,
)
URLS = ("http://127.0.0.1:9", "http://127.0.0.1:9#1", "ftp://x", "http://", "http://h:99999")
added = st.sampled_from(URLS).map(lambda url: {"url": url})
requests = st.tuples(
    st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "PATCH"]),
    paths, queries, headers, st.none() | encoded(added | values),
)  # fmt: skip


@fuzzes("router-endpoints", requests)
def check_router_endpoints(given: Any) -> None:
    """Every answer is one of those documented, in JSON; the router stays up, and knows its own."""
    method, path, query, sent, body = given
    reply = _router().do(_ask(method, f"{path}?{query}", sent, body))
    assert reply.status in EXPECTED, (reply.status, reply.body)
    if reply.status != 308 and method != "HEAD":
        told = json.loads(reply.body)
        assert reply.status == 200 or told["error"]["code"] == reply.status


async def _ask(method: str, path: str, sent: dict[str, str], body: bytes | None) -> Any:
    client = _router().client
    reply = await client.send(method, path, body, sent)
    # What was added or removed on the way must not pile up.
    for backend in list(client.router.backends):
        if backend.name != _router().engine.name:
            client.router.backends.remove(backend)
    if not len(client.router.backends):
        await client.router_adds(_router().engine.url)
    return reply


class _Running:
    """A router before a small engine, in a thread with a loop of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._stack = AsyncExitStack()
        self.engine = Engine(state=STATE)
        self.client: Client = self.do(self._start())
        atexit.register(lambda: self.do(self._stack.aclose()))

    async def _start(self) -> Client:
        return await self._stack.enter_async_context(fleet(self.engine, policy="saga"))

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


_running: list[_Running] = []


def _router() -> _Running:
    if not _running:
        _running.append(_Running())
    return _running[0]
