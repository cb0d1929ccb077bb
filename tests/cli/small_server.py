"""A server with a few fixed answers, in a thread: for commands that run their own event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from aiohttp import web

Answer = tuple[int, object]
"""A status, and JSON or a text."""


@contextmanager
def serving(
    answers: Mapping[str, Answer], seen: list[tuple[str, dict[str, str]]] | None = None
) -> Iterator[str]:
    """Its URL. Paths without an answer get FastAPI's 404; `seen` gets path and headers of each."""

    async def handle(request: web.BaseRequest) -> web.Response:
        if seen is not None:
            headers = {name.lower(): value for name, value in request.headers.items()}
            seen.append((request.path_qs, headers))
        status, body = answers.get(request.path, (404, {"detail": "Not Found"}))
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(status=status, text=text)

    async def start() -> web.ServerRunner:
        runner = web.ServerRunner(web.Server(handle))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    loop = asyncio.new_event_loop()
    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
