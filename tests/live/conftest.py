from __future__ import annotations

import asyncio
import json
import re
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from benchmarks.live.server import Server, tiny_server

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "tiny-model"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.live)
            # Two servers, each with START_TIMEOUT_S, and the calls.
            item.add_marker(pytest.mark.timeout(600))


class Client:
    """Calls one running server; `state()` is the last state line of its log."""

    def __init__(self, server: Server, http: aiohttp.ClientSession) -> None:
        self.server, self.http = server, http

    async def complete(self, prompt: list[int], tokens: int, **body: Any) -> aiohttp.ClientResponse:
        headers = body.pop("headers", None)
        request = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "return_token_ids": True,
            **body,
        }
        url = f"{self.server.url}/v1/completions"
        return await self.http.post(url, json=request, headers=headers)

    async def generate(self, prompt: list[int], tokens: int, **body: Any) -> list[int]:
        async with await self.complete(prompt, tokens, **body) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            return json.loads(text)["choices"][0]["token_ids"]

    def log(self) -> str:
        return self.server.log.read_text(errors="replace")

    async def state(self) -> dict[str, int]:
        """The engine's tables, as logged by a call made now."""
        lines = len(self.log().splitlines())
        for _ in range(50):
            await self.generate([1, 2, 3], 2)
            await asyncio.sleep(0.1)
            for line in self.log().splitlines()[lines:][::-1]:
                if "saga: resident=" in line:
                    return {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", line)}
        raise AssertionError("the server logs no state line")


@pytest.fixture
def serve(tmp_path):
    """`async with serve("saga", "--flag") as client`: a server of its own, stopped at the end."""

    @asynccontextmanager
    async def start(
        scheduler: str,
        *extra: str,
        blocks: int = 300,
        env: dict[str, str] | None = None,
        **settings: Any,
    ):
        config = json.dumps({"saga": {"log_interval_s": 0.2, **settings}})
        options = tiny_server(MODEL, blocks, "--additional-config", config, *extra, env=env or {})
        executable = Path(sys.executable).parent / "vllm"
        log = tmp_path / f"{scheduler}.log"
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=480)
        async with (
            Server(options, scheduler, log, executable) as server,
            aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
        ):
            yield Client(server, http)

    return start
