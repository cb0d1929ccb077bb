"""A router in a process of its own, as `vllm-saga router` starts it."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

_SAYS_WHERE = re.compile(rb"router on (http://[0-9.:]+),")


@dataclass
class RouterProcess:
    process: asyncio.subprocess.Process
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def memory(self) -> int:
        """Bytes of it that are in memory."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@asynccontextmanager
async def router_process(*flags: str) -> AsyncIterator[RouterProcess]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from vllm_saga.cli import app; app()", "router", "--port", "0",
        *flags, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    log = b""
    try:
        async with asyncio.timeout(60):
            while not (found := _SAYS_WHERE.search(log)):
                line = await process.stderr.readline()
                assert line, log.decode()
                log += line
        draining = asyncio.create_task(process.stderr.read())
        yield RouterProcess(process, found[1].decode())
        draining.cancel()
    finally:
        if process.returncode is None:
            process.terminate()
            async with asyncio.timeout(60):
                await process.wait()
