"""What a router adds to a call, and how many calls it can pass on at most.

    .venv/bin/python -m benchmarks.router_overhead [--rate 200] [--no-ids]
    .venv/bin/python -m benchmarks.router_overhead --arm NAME="COMMAND {port} {backends}" ...

Two trivial engines answer at once with a stream of events; the same requests go to them directly
and through each router, one router at a time. Requests come at a steady rate whatever becomes of
the earlier ones. `saga` and `round_robin` are ours; a further `--arm` is the URL of a running
router, or the command that starts one, in which {port} stands for where it is to listen and
{backends} for the engines' URLs, {comma} for the same between commas.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import multiprocessing
import random
import shlex
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

import psutil
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.live.server import free_port

EVENTS = 16
SESSIONS = 50
WARM_S = 2.0
_END = b"0\r\n\r\n"
_OWN = " router --log-level warning --port {port} --backends {comma} --policy "


# -- the engines ----------------------------------------------------------------------------------


class Engine(asyncio.Protocol):
    """An engine's side of a connection: a stream of events to every POST, {} to everything else."""

    gap_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._data = bytearray()

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._data[:end]).lower()
            _, _, after = head.partition(b"content-length:")
            length = int(after.split(b"\r\n")[0]) if after else 0
            if len(self._data) < end + 4 + length:
                return
            del self._data[: end + 4 + length]
            self._answer(stream=head.startswith(b"post"))

    def _answer(self, stream: bool) -> None:
        if not stream:
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            self._transport.write(head + b"Content-Length: 2\r\n\r\n{}")
            return
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        self._transport.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
        self._event(0)

    def _event(self, number: int) -> None:
        if self._transport.is_closing():
            return
        event = b'data: {"choices":[{"index":0,"delta":{"content":" token"}}]}\n\n'
        chunk = b"%x\r\n%b\r\n" % (len(event), event)
        if number == EVENTS - 1:
            self._transport.write(chunk + _END)
            return
        self._transport.write(chunk)
        if self.gap_s:
            asyncio.get_running_loop().call_later(self.gap_s, self._event, number + 1)
        else:
            self._event(number + 1)


def serve_engines(ports: list[int], gap_s: float) -> None:
    async def serve() -> None:
        Engine.gap_s = gap_s
        loop = asyncio.get_running_loop()
        for port in ports:
            await loop.create_server(Engine, "127.0.0.1", port)
        await asyncio.Event().wait()

    uvloop.run(serve())


# -- the client -----------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """A client's side: one request at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._done: asyncio.Future[None] | None = None

    async def ask(self, request: bytes) -> tuple[float, float]:
        """Seconds to the first event and to the end. Raises OSError if it goes wrong."""
        self._head = bytearray()
        self._first = 0.0
        self._tail = b""
        self._done = asyncio.get_running_loop().create_future()
        start = time.perf_counter()
        self._transport.write(request)
        async with asyncio.timeout(60):
            await self._done
        return self._first - start, time.perf_counter() - start

    def data_received(self, data: bytes) -> None:
        if not self._first:
            self._head += data
            if b"data:" in self._head:
                self._first = time.perf_counter()
                if not self._head.startswith(b"HTTP/1.1 200"):
                    self._fail(bytes(self._head[:100]).decode("latin1"))
            elif self._head and not b"HTTP/1.1 200".startswith(bytes(self._head[:12])):
                self._fail(bytes(self._head[:100]).decode("latin1"))
        self._tail = (self._tail + data)[-len(_END) :]
        if self._tail == _END and self._done and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the connection was lost")

    def _fail(self, why: str) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(OSError(why))

    def close(self) -> None:
        self._transport.close()


@dataclass
class Load:
    """Requests to one address, and what became of them."""

    port: int
    requests: list[bytes]
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    cpu_s: float = math.nan
    _idle: list[Connection] = field(default_factory=list)

    async def one(self, number: int) -> None:
        try:
            if self._idle:
                connection = self._idle.pop()
            else:
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
            first, whole = await connection.ask(self.requests[number % len(self.requests)])
        except (OSError, TimeoutError) as error:
            self.errors.append(str(error) or type(error).__name__)
            return
        self.first.append(first)
        self.whole.append(whole)
        self._idle.append(connection)

    async def at_rate(self, rate: float, seconds: float) -> None:
        """Open loop: the next one goes out when its time has come."""
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * seconds)):
                delay = start + number / rate - time.perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                group.create_task(self.one(number))

    async def at_most(self, lanes: int, seconds: float) -> float:
        """Closed loop; answers per second."""
        end = time.perf_counter() + seconds

        async def lane(number: int) -> None:
            while time.perf_counter() < end:
                await self.one(number)
                number += lanes

        async with asyncio.TaskGroup() as group:
            for number in range(lanes):
                group.create_task(lane(number))
        return len(self.whole) / seconds

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def make_requests(size: int, ids: bool) -> list[bytes]:
    """A chat request of each of some agents that share a system prompt."""
    words = random.Random(0)
    requests = []
    for number in range(SESSIONS):
        turns = [{"role": "system", "content": "You are an agent. " * (size // 100)}]
        while len(json.dumps(turns)) < size - 200:
            role = "assistant" if len(turns) % 2 == 0 else "user"
            turns.append({"role": role, "content": f"{number} {words.random()} " * 40})
        body = json.dumps({"model": "m", "stream": True, "messages": turns}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"X-Session-ID: agent-{number}\r\n" if ids else ""
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return requests


# -- arms -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def arm(command: str, engines: list[int]) -> AsyncIterator[tuple[int, int | None]]:
    """Port and process of a router that runs meanwhile, or that runs anyway (no process)."""
    if command.startswith("http"):
        yield int(command.rstrip("/").rpartition(":")[2]), None
        return
    port = free_port()
    urls = [f"http://127.0.0.1:{engine}" for engine in engines]
    filled = command.format(port=port, backends=" ".join(urls), comma=",".join(urls))
    process = await asyncio.create_subprocess_exec(
        *shlex.split(filled),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await answers(port)
        yield port, process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def answers(port: int) -> None:
    """Wait until calls get through there."""
    request = make_requests(1000, ids=True)[0]
    async with asyncio.timeout(60):
        while True:
            load = Load(port, [request])
            await load.one(0)
            load.close()
            if not load.errors:
                return
            await asyncio.sleep(0.2)


def quantiles(values: list[float]) -> tuple[float, float]:
    """p50 and p99, milliseconds."""
    cuts = statistics.quantiles(values, n=100) if len(values) > 1 else [0.0] * 99
    return cuts[49] * 1e3, cuts[98] * 1e3


def cpu_s(pid: int | None) -> float:
    """Seconds of processor time that a process and its children have taken."""
    if pid is None:
        return math.nan
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
    return sum(t.user + t.system for t in times)


async def measure(
    port: int, pid: int | None, requests: list[bytes], rate: float, seconds: float
) -> Load:
    load = Load(port, requests)
    # Connections are open then, as under a load that lasts.
    await load.at_rate(rate, WARM_S)
    load.first.clear()
    load.whole.clear()
    before = cpu_s(pid)
    await load.at_rate(rate, seconds)
    load.cpu_s = cpu_s(pid) - before
    load.close()
    return load


def main(
    rate: Annotated[list[float] | None, typer.Option(help="Requests/s; default: 200, 500.")] = None,
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 20.0,
    size: Annotated[int, typer.Option(help="Bytes of a request's body.")] = 30_000,
    gap_ms: Annotated[float, typer.Option(help="Between two of the 16 events.")] = 10.0,
    ids: Annotated[bool, typer.Option(help="Whether agents say who they are.")] = True,
    lanes: Annotated[int, typer.Option(help="Calls at a time for the maximum; 0 = skip.")] = 256,
    arm_: Annotated[
        list[str] | None, typer.Option("--arm", help="NAME=URL or NAME=COMMAND; repeatable.")
    ] = None,
) -> None:
    """Print p50 and p99 (ms) of each arm, what it adds to the first byte, its CPU, its maximum."""
    own = str(Path(sys.executable).with_name("vllm-saga")) + _OWN
    arms = {"saga": own + "saga", "round_robin": own + "round_robin"}
    arms |= dict(text.split("=", 1) for text in arm_ or [])
    rates = rate or [200.0, 500.0]
    uvloop.run(compare(arms, rates, seconds, gap_ms / 1e3, make_requests(size, ids), lanes))


async def compare(
    arms: dict[str, str],
    rates: list[float],
    seconds: float,
    gap_s: float,
    requests: list[bytes],
    lanes: int,
) -> None:
    ports = [free_port(), free_port()]
    # A full collection here takes 30 ms, which would count as some router's.
    gc.disable()
    spawn = multiprocessing.get_context("spawn")
    engines = spawn.Process(target=serve_engines, args=(ports, gap_s), daemon=True)
    engines.start()
    table = Table(
        "req/s", "arm", "errors", "first p50", "first p99", "whole p50", "whole p99",
        "adds p50", "adds p99", "CPU ms/req", "most req/s",
    )  # fmt: skip
    try:
        await answers(ports[0])
        for rate in rates:
            base = await measure(ports[0], None, requests, rate, seconds)
            row(table, rate, "direct", base, base, await most(ports[0], requests, lanes))
            for name, command in arms.items():
                async with arm(command, ports) as (port, pid):
                    load = await measure(port, pid, requests, rate, seconds)
                    row(table, rate, name, load, base, await most(port, requests, lanes))
    finally:
        engines.terminate()
    Console(width=140).print(table)


async def most(port: int, requests: list[bytes], lanes: int) -> str:
    if not lanes:
        return "-"
    load = Load(port, requests)
    found = await load.at_most(lanes, 5.0)
    load.close()
    return f"{found:.0f}" + (f" ({len(load.errors)} errors)" if load.errors else "")


def row(table: Table, rate: float, name: str, load: Load, base: Load, peak: str) -> None:
    first, whole, direct = quantiles(load.first), quantiles(load.whole), quantiles(base.first)
    adds = [mine - its for mine, its in zip(first, direct, strict=True)]
    cpu = load.cpu_s / max(len(load.first), 1) * 1e3
    figures = [f"{value:.2f}" for value in (*first, *whole, *adds, cpu)]
    errors = f"{len(load.errors)}" + (f": {load.errors[0][:60]}" if load.errors else "")
    table.add_row(f"{rate:g}", name, errors, *figures, peak)


if __name__ == "__main__":
    typer.run(main)
