"""`vllm-saga router`: a process, its flags, and how much memory it takes of those who want much."""

from __future__ import annotations

import asyncio
import json
import re

import aiohttp
import pytest
from aiohttp import web
from engines import Engine, Held, Seen, answer_chat, until
from router_process import RouterProcess, router_process
from typer.testing import CliRunner

from vllm_saga.cli import app

MiB = 1 << 20


async def ready(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(20):
        while True:
            async with http.get(url + "/ready") as got:
                if got.status == 200:
                    return
            await asyncio.sleep(0.05)


async def test_it_serves_and_lets_calls_end_when_it_is_stopped():
    held = Held(headers_first=False)
    engine = await Engine(held).start()
    flags = ["--backends", engine.url, "--policy", "saga", "--session-headers", "x-task"]
    async with aiohttp.ClientSession() as http, router_process(*flags) as router:
        await ready(http, router.url)
        headers = {"X-Task": "t1"}
        waiting = asyncio.create_task(
            http.post(router.url + "/v1/completions", json={"prompt": "x"}, headers=headers)
        )
        await until(lambda: len(engine.seen) == 1)
        router.process.terminate()
        await asyncio.sleep(0.3)
        held.go.set()
        got = await waiting
        assert (got.status, got.headers["X-Session-ID"]) == (200, "t1")
        assert await got.text() == "data: done\n\n"
        got.close()
        async with asyncio.timeout(10):
            assert await router.process.wait() == 0
    await engine.stop()


async def test_large_bodies_take_little_memory():
    """Eight clients with 100 MB each; then ten JSON bodies of 20 MB, of which 64 MB may be kept."""
    engine = await Engine(answer_size, keeps_bodies=False).start()
    flags = ["--backends", engine.url, "--max-buffered-mib", "64"]
    async with aiohttp.ClientSession() as http, router_process(*flags) as router:
        await ready(http, router.url)
        before = router.memory()
        peak = Peak(router)

        async def upload() -> None:
            async def pieces():
                for _ in range(100):
                    yield b"x" * MiB

            headers = {"Content-Type": "application/octet-stream"}
            async with http.post(router.url + "/upload", data=pieces(), headers=headers) as got:
                assert await got.json() == {"bytes": 100 * MiB}

        async with peak:
            await asyncio.gather(*(upload() for _ in range(8)))
        assert peak.bytes - before < 64 * MiB

        body = json.dumps({"prompt": "word " * (4 * MiB)}).encode()

        async def complete() -> None:
            headers = {"Content-Type": "application/json"}
            async with http.post(router.url + "/v1/completions", data=body, headers=headers) as got:
                assert await got.json() == {"bytes": len(body)}

        async with peak:
            await asyncio.gather(*(complete() for _ in range(10)))
        assert peak.bytes - before < 400 * MiB
    await engine.stop()


async def answer_size(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
    return web.json_response({"bytes": seen.size})


class Peak:
    """The most memory that a router had meanwhile."""

    def __init__(self, router: RouterProcess) -> None:
        self.router = router
        self.bytes = 0

    async def __aenter__(self) -> None:
        self.task = asyncio.create_task(self._look())

    async def __aexit__(self, *error: object) -> None:
        self.task.cancel()

    async def _look(self) -> None:
        while True:
            self.bytes = max(self.bytes, self.router.memory())
            await asyncio.sleep(0.01)


async def test_slow_clients_in_thousands_do_not_keep_others_out():
    engine = await Engine(answer_chat).start()
    flags = ["--backends", engine.url, "--max-connections", "2500", "--body-timeout-secs", "5"]
    flags += ["--idle-timeout-secs", "5"]
    half = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writers = []
    async with aiohttp.ClientSession() as http, router_process(*flags) as router:
        await ready(http, router.url)
        before = router.memory()
        for number in range(2000):
            _, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writer.write(half if number % 2 else half + b'Content-Length: 99\r\n\r\n{"prompt')
            writers.append(writer)
        for _ in range(20):
            async with http.post(router.url + "/v1/completions", json={"prompt": "x"}) as got:
                assert got.status == 200
        used = router.memory() - before

        async def open_connections() -> float:
            async with http.get(router.url + "/metrics") as got:
                text = await got.text()
            found = re.search(r"^saga_router_connections (\S+)$", text, re.MULTILINE)
            assert found
            return float(found[1])

        async with asyncio.timeout(30):
            while await open_connections() > 10:
                await asyncio.sleep(0.5)
    for writer in writers:
        writer.close()
    await engine.stop()
    assert used < 2000 * 60_000


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--backends"),
        (["--backends", "localhost:8000"], "'localhost:8000' is no backend"),
        (["--backends", "http://x:1#first"], "data-parallel rank"),
        (["--backends", "http://x:1", "--policy", "best"], "'best' is none of saga"),
        (["--backends", "http://x:1", "--log-level", "loud"], "'loud' is none of debug"),
        (["--backends-file", "/nowhere/at/all"], "No such file"),
    ],
)
def test_mistakes_are_explained(flags, says):
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["router", "--port", "0", *flags])
    assert result.exit_code in (1, 2)
    assert says in result.output
