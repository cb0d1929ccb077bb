"""The servers of one arm, and the router before them if it has one."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp

from benchmarks.live.arrangement import Arrangement
from benchmarks.live.process import free_port
from benchmarks.live.routers import Router, command
from benchmarks.live.server import Server, ServerOptions, scrape, worker_cores


class Fleet:
    """One server for each of `ports`: `async with` starts all, waits for them and stops them.

    With a router, each server has cores of its own and names itself in `system_fingerprint`, which
    every router passes on: so a client sees who has answered.
    """

    def __init__(
        self, arrangement: Arrangement, options: ServerOptions, ports: Sequence[int], log: Path
    ) -> None:
        self.arrangement = arrangement
        self.log = log
        executable = Path(sys.executable).with_name("vllm")
        if arrangement.router is None:
            each, logs = [options], [log]
        else:
            each = [
                as_replica(options, arrangement.scheduler, k, len(ports)) for k in range(len(ports))
            ]
            logs = [log.with_stem(f"{log.stem}-{replica_name(k)}") for k in range(len(ports))]
        self.servers = [
            Server(mine, arrangement.scheduler, file, executable, port)
            for mine, file, port in zip(each, logs, ports, strict=True)
        ]
        self.router: Router | None = None
        self._stack = contextlib.AsyncExitStack()

    @property
    def name(self) -> str:
        return self.arrangement.name

    @property
    def url(self) -> str:
        """Where clients send their calls."""
        return self.servers[0].url if self.router is None else self.router.url

    async def __aenter__(self) -> Fleet:
        try:
            for server in self.servers:
                self._stack.callback(server.stop)
                server.launch()
            for server in self.servers:
                await server.wait_until_ready()
            if self.arrangement.router is not None:
                self.router = await self._stack.enter_async_context(
                    await self._make_router(self.arrangement.router)
                )
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def _make_router(self, router: str) -> Router:
        port = free_port()
        backends = [server.url for server in self.servers]
        log = self.log.with_stem(f"{self.log.stem}-router")
        return Router(router, await command(router, backends, port), port, log)

    def cpu_s(self) -> float:
        """CPU seconds that the servers have used."""
        return sum(server.cpu_s() for server in self.servers)

    def router_cpu_s(self) -> float:
        return 0.0 if self.router is None else self.router.cpu_s()

    def check_alive(self) -> None:
        """Raise `ServerError` if a server or the router is gone."""
        for server in self.servers:
            server.check_alive()
        if self.router is not None:
            self.router.check_alive()

    async def metrics(self, http: aiohttp.ClientSession) -> dict[str, float]:
        """The servers' metrics, added up."""
        total: Counter[str] = Counter()
        for server in self.servers:
            total.update(await scrape(http, server.url))
        return dict(total)


def replica_name(index: int) -> str:
    return f"replica-{index + 1}"


def as_replica(options: ServerOptions, scheduler: str, index: int, replicas: int) -> ServerOptions:
    """The options of one of several servers."""
    named = ("--fingerprint-mode", "custom", "--fingerprint-value", replica_name(index))
    env = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, worker_cores(index, replicas)))}
    if scheduler != "stock":
        # Opens /v1/saga, which the router asks.
        env["VLLM_PLUGINS"] = "saga"
    return replace(options, extra=(*options.extra, *named), env={**options.env, **env})
