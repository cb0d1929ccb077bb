"""What happens on a server while it is under pressure: a comparison without it would say little."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import msgspec
import zmq
import zmq.asyncio

from benchmarks.equivalence.harness import SESSION, TENANT
from benchmarks.live.process import free_port
from benchmarks.live.server import counter_deltas, scrape

_LOOK_S = 0.2


@dataclass(frozen=True)
class Seen:
    """Counts of a watched time.

    evicted_blocks: cached blocks that were given to another (vLLM's KV events). holds: calls that
    saga held back; forced: holds that ended by their deadline. harness_held: workflows of the
    harness' own that were seen held, a lower bound; session_held: most calls of its one session
    that were seen held at once.
    """

    preemptions: int
    prefix_queries: int
    prefix_hits: int
    evicted_blocks: int
    holds: int = 0
    forced: int = 0
    harness_held: int = 0
    session_held: int = 0
    active: bool = False
    policy_failures: int = 0


def missing(seen: Seen, scheduler: str) -> list[str]:
    """What should have happened on this server under pressure, and did not."""
    wanted = {"preemptions": seen.preemptions, "evicted blocks": seen.evicted_blocks}
    if scheduler == "saga":
        wanted |= {"held calls": seen.holds, "held calls of the harness": seen.harness_held}
    found = [f"{scheduler}: no {what}" for what, count in wanted.items() if count < 1]
    if scheduler == "saga" and (not seen.active or seen.policy_failures):
        found.append("saga: it does not decide, or its policy has failed")
    return found


def event_port() -> tuple[int, str]:
    """A free port, and the `--kv-events-config` with which a server tells its evictions there.

    `Watch` listens at the port.
    """
    port = free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    return port, json.dumps(config)


def evictions(payload: bytes) -> int:
    """Cached blocks that were removed, of one message of vLLM's KV events."""
    events = msgspec.msgpack.decode(payload)[1]
    removed = (event for event in events if _field(event, "type", 0) == "BlockRemoved")
    return sum(len(_field(event, "block_hashes", 1)) for event in removed)


def _field(event: Any, name: str, index: int) -> Any:
    """Of an event, which vLLM writes as an array or, of late, as a map."""
    return event[name] if isinstance(event, Mapping) else event[index]


@dataclass
class Watch:
    """Watches a server between `async with` and its end; then `seen` is there."""

    http: aiohttp.ClientSession
    url: str
    events: int
    scheduler: str
    seen: Seen | None = None
    _evicted: int = 0
    _session_held: int = 0
    _held: set[str] = field(default_factory=set)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _before: dict[str, float] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        self._before = await scrape(self.http, self.url)
        self._tasks.append(asyncio.create_task(self._listen()))
        if self.scheduler == "saga":
            self._tasks.append(asyncio.create_task(self._look()))
        return self

    async def __aexit__(self, *error: object) -> None:
        # The last of what happened is told a second late.
        await asyncio.sleep(2.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(aiohttp.ClientError):
            after = await scrape(self.http, self.url)
            self.seen = self._count(after)

    def _count(self, after: Mapping[str, float]) -> Seen:
        def grown(name: str) -> int:
            name = f"vllm:saga_{name}_total"
            return round(after.get(name, 0.0) - self._before.get(name, 0.0))

        return Seen(
            **counter_deltas(self._before, after),
            evicted_blocks=self._evicted,
            holds=grown("holds"),
            forced=grown("holds_forced"),
            harness_held=len(self._held),
            session_held=self._session_held,
            active=after.get("vllm:saga_active") == 1,
            policy_failures=grown("policy_failures"),
        )

    async def _listen(self) -> None:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.SUB)
        try:
            # A server connects to an endpoint that names a host, and goes on trying.
            socket.bind(f"tcp://127.0.0.1:{self.events}")
            socket.subscribe(b"")
            while True:
                *_, payload = await socket.recv_multipart()
                self._evicted += evictions(payload)
        finally:
            socket.close(linger=0)
            context.term()

    async def _look(self) -> None:
        """Which of the harness' workflows wait for room, again and again."""
        query = {"state": "held", "tenant": TENANT, "limit": "200"}
        while True:
            async with self.http.get(f"{self.url}/v1/saga/workflows", params=query) as answer:
                answer.raise_for_status()
                told = await answer.json()
            for workflow in told["workflows"]:
                self._held.add(workflow["id"])
                if SESSION in workflow["sessions"]:
                    self._session_held = max(self._session_held, workflow["calls"]["held"])
            await asyncio.sleep(_LOOK_S)
