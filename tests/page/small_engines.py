"""Engines without a model behind the real HTTP of a server or a router: the policy is real.

Agents call, wait for their tools and call again; what the policy holds back waits. Calls take the
seconds that they are told to take, on the engine's own clock.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_saga.config import SagaConfig
from vllm_saga.engine import control
from vllm_saga.policy.report import end_session, report
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.stepfit import Step
from vllm_saga.policy.workflow import Arrival
from vllm_saga.router.app import Router
from vllm_saga.router.backends import Address
from vllm_saga.router.settings import RouterSettings
from vllm_saga.server.endpoints import SagaEndpoints

BLOCK = 16
_TOOLS = ("read_file", "bash", "grep", "edit")


@dataclass
class Agent:
    """Makes `calls` calls of `call_s`, each with `grows` blocks more, with gaps between them."""

    session: str
    tenant: str = ""
    starts: float = 0.0
    calls: int = 1000
    blocks: int = 200
    grows: int = 6
    call_s: float = 4.0
    gap_s: float = 3.0
    parent: str | None = None
    made: int = 0


class SmallEngine:
    """`engine_core` of vLLM's client. Its past begins `age_s` before now, and is played at once."""

    def __init__(self, blocks: int = 2000, age_s: float = 240.0, **knobs: object) -> None:
        config = SagaConfig.model_validate({"tenant_source": "saga_tenant", **knobs})
        self.policy: SagaPolicy | None = SagaPolicy(config, blocks, BLOCK)
        self.error: str | None = None
        self._began = time.monotonic() - age_s
        self._events: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()
        self._calls: dict[str, Agent] = {}
        self._running: set[str] = set()
        self._lock = threading.Lock()
        for _ in range(64):
            self.policy.cost.observe(Step(1000, 500_000, 0, 8), 0.1, 0.1)

    def add(self, *agents: Agent) -> SmallEngine:
        with self._lock:
            for agent in agents:
                self._push(agent.starts, ("call", agent))
        return self

    def add_now(self, agent: Agent) -> None:
        agent.starts = time.monotonic() - self._began
        self.add(agent)

    async def call_utility_all_async(self, method: str, op: str, payload: dict[str, Any]):
        if self.error is not None:
            raise Exception(self.error)
        with self._lock:
            if self.policy is not None:
                self._play(time.monotonic())
            return [self._answer(op, payload, time.monotonic())]

    def _answer(self, op: str, payload: dict[str, Any], now: float) -> dict[str, Any]:
        if op == control.STATE:
            counts = {"started": "once", "running": len(self._running), "waiting": 0}
            return counts | report(self.policy, now)
        if op == control.END:
            tenant, session = control.read_end(op, payload)
            for agent in self._calls.values():
                if agent.session == session:
                    agent.calls = 0
            return {"ended": end_session(self.policy, tenant, session, now)}
        waiting = len(self._calls) - len(self._running)
        return control.explain(self.policy, op, payload, now, self._running, waiting)

    # -- the agents -------------------------------------------------------------------------------

    def _play(self, until: float) -> None:
        """What has come about since."""
        while self._events and self._events[0][0] <= until:
            at, _, (what, subject) = heapq.heappop(self._events)
            if what == "call":
                self._arrive(subject, at)
            else:
                self._finish(subject, at)
            self._step(at)
        self._step(until)

    def _arrive(self, agent: Agent, at: float) -> None:
        if agent.made >= agent.calls:
            return
        call_id = f"{agent.session}#{next(self._numbers)}"
        blocks = agent.blocks + agent.made * agent.grows
        chain = [hash((agent.tenant, agent.session, block)) for block in range(blocks)]
        self._calls[call_id] = agent
        self.policy.on_arrival(
            Arrival(
                call_id, chain, blocks * BLOCK, session_id=agent.session, tenant=agent.tenant,
                parent_id=agent.parent,
            ),
            at,
        )  # fmt: skip
        if not self.policy.is_held(call_id):
            self._run(call_id, at)

    def _run(self, call_id: str, at: float) -> None:
        agent = self._calls[call_id]
        known = agent.blocks + (agent.made - 1) * agent.grows if agent.made else 0
        self.policy.on_scheduled(call_id, known * BLOCK)
        self._running.add(call_id)
        self._push_at(at + agent.call_s, ("end", call_id))

    def _finish(self, call_id: str, at: float) -> None:
        agent = self._calls.pop(call_id)
        self._running.discard(call_id)
        agent.made += 1
        tokens = (agent.blocks + agent.made * agent.grows) * BLOCK - BLOCK // 2
        self.policy.on_finish(call_id, tokens, at, (_TOOLS[agent.made % len(_TOOLS)],))
        if agent.made < agent.calls:
            self._push_at(at + agent.gap_s, ("call", agent))
        else:
            end_session(self.policy, agent.tenant, agent.session, at)

    def _step(self, at: float) -> None:
        for call_id in self.policy.on_step(at):
            self._run(call_id, at)

    def _push(self, at: float, event: Any) -> None:
        self._push_at(self._began + at, event)

    def _push_at(self, at: float, event: Any) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), event))


@contextmanager
def serving(*engines: Any, api_key: str | None = None, router: dict | None = None) -> Iterator[str]:
    """The URL of a server with this engine; with `router` (its settings), of a router before one
    server for each engine.
    """
    with _Loop() as loop:
        stack = AsyncExitStack()
        url = loop.run(_start(stack, engines, api_key, router))
        try:
            yield url
        finally:
            loop.run(stack.aclose())


async def _start(
    stack: AsyncExitStack, engines: tuple[Any, ...], api_key: str | None, router: dict | None
) -> str:
    urls = [await _serve(stack, engine, api_key) for engine in engines]
    if router is None:
        return urls[0]
    settings = RouterSettings(port=0, health_interval=0.2, backend_api_key=api_key, **router)
    started = Router(settings, [Address.parse(url) for url in urls])
    await stack.enter_async_context(started)
    async with asyncio.timeout(10):
        while not all(backend.accepting for backend in started.backends):
            await asyncio.sleep(0.02)
    return f"http://127.0.0.1:{started.port}"


async def _serve(stack: AsyncExitStack, engine: Any, api_key: str | None) -> str:
    """A server's URL: vLLM's guard of keys, and our endpoints."""
    app = FastAPI()
    app.add_api_route("/health", _nothing)
    app.add_api_route("/v1/completions", _nothing, methods=["POST"])
    plugin = SagaEndpoints()
    plugin.attach_router(app)
    state = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=None))
    await plugin.init_state(SimpleNamespace(engine_core=engine), state, None)
    if api_key is not None:
        app.add_middleware(AuthenticationMiddleware, tokens=[api_key])
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="critical"))
    task = asyncio.create_task(server.serve())

    async def stop() -> None:
        server.should_exit = True
        await task

    stack.push_async_callback(stop)
    async with asyncio.timeout(10):
        while not server.started:
            await asyncio.sleep(0.02)
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


async def _nothing() -> dict[str, str]:
    return {}


class _Loop:
    """An event loop in a thread of its own: the browser is driven from this one."""

    def __enter__(self) -> _Loop:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
