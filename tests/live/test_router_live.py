"""Two real engines behind a real router: sessions stick, and come back when one of them dies."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from benchmarks.live.fleet import as_replica
from benchmarks.live.process import free_port
from benchmarks.live.routers import Router, command
from benchmarks.live.server import Server, ServerOptions, tiny_server

MODEL = Path(__file__).parents[2] / ".cache" / "tiny-model"
AGENTS = 24


@dataclass
class Call:
    """What became of one call. begun: something of its answer had come."""

    backend: str | None = None
    begun: bool = False
    error: str | None = None


@dataclass
class Agent:
    """A session whose every prompt extends the last one."""

    name: str
    prompt: list[int]
    calls: list[Call] = field(default_factory=list)

    async def step(self, cluster: Cluster, tokens: int = 8, stream: bool = False) -> Call:
        call = Call()
        body = {
            "model": "model", "prompt": self.prompt, "max_tokens": tokens, "ignore_eos": True,
            "stream": stream, "temperature": 0,
        }  # fmt: skip
        headers = {"X-Session-ID": self.name}
        try:
            async with cluster.http.post(
                f"{cluster.url}/v1/completions", json=body, headers=headers
            ) as answer:
                # The status is on its way to the client: no router could try again unseen.
                call.begun = stream and answer.status == 200
                call.backend = answer.headers.get("x-saga-backend")
                data = await answer.read()
            if answer.status != 200 or (stream and not data.rstrip().endswith(b"[DONE]")):
                call.error = f"{answer.status}: {data[-200:]!r}"
        except aiohttp.ClientError as error:
            call.error = repr(error)
        self.prompt = [*self.prompt, *range(20, 60)]
        self.calls.append(call)
        return call


class Cluster:
    """Two engines, and a router that may be killed, too.

    one_server: the engines are the ranks of one server; else each is a server of its own.
    """

    def __init__(self, http: aiohttp.ClientSession, folder: Path, one_server: bool) -> None:
        self.http = http
        self._folder = folder
        self._port = free_port()
        self._router: Router | None = None
        if one_server:
            env = {"VLLM_PLUGINS": "saga", "VLLM_CPU_OMP_THREADS_BIND": "auto"}
            self._options = tiny_server(MODEL, 600, "--data-parallel-size", "2", env=env)
            self.engines = [self._server(self._options, 0, free_port())]
            self.backends = [f"{self.engines[0].url}#{rank}" for rank in range(2)]
        else:
            self._options = tiny_server(MODEL, 600, max_num_seqs=32)
            self.engines = [self._engine(k, free_port()) for k in range(2)]
            self.backends = [engine.url for engine in self.engines]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _engine(self, index: int, port: int) -> Server:
        return self._server(as_replica(self._options, "saga", index, 2), index, port)

    def _server(self, options: ServerOptions, index: int, port: int) -> Server:
        executable = Path(sys.executable).with_name("vllm")
        return Server(options, "saga", self._folder / f"engine-{index}.log", executable, port)

    async def start(self) -> None:
        for engine in self.engines:
            engine.launch()
        for engine in self.engines:
            await engine.wait_until_ready()
        await self.start_router()

    async def start_router(self) -> None:
        made = await command("saga", self.backends, self._port)
        self._router = Router("saga", made, self._port, self._folder / "router.log")
        await self._router.__aenter__()
        await until(self._both_are_known)

    def kill_router(self) -> None:
        assert self._router is not None
        self._router.stop(signal.SIGKILL)

    async def revive(self, index: int) -> None:
        """Start a killed engine again where it was, and wait until the router knows."""
        port = self.engines[index].port
        self.engines[index] = self._engine(index, port)
        self.engines[index].launch()
        await self.engines[index].wait_until_ready()
        await until(self._both_are_known)

    async def _both_are_known(self) -> bool:
        async with self.http.get(f"{self.url}/v1/saga/backends") as answer:
            listed = json.loads(await answer.text())["backends"]
        return all(b["state"] == "up" and b["report"] for b in listed)

    def stop(self) -> None:
        if self._router is not None:
            self._router.stop()
        for engine in self.engines:
            engine.stop()


@asynccontextmanager
async def cluster(folder: Path, one_server: bool = False) -> AsyncIterator[Cluster]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=90)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
        AsyncExitStack() as stack,
    ):
        made = Cluster(http, folder, one_server)
        stack.callback(made.stop)
        await made.start()
        yield made


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await true():
            await asyncio.sleep(0.1)


def make_agents(label: str, count: int = AGENTS) -> list[Agent]:
    return [
        Agent(f"{label}-{n}", [(n * 31 + i) % 400 + 20 for i in range(150)]) for n in range(count)
    ]


async def all_step(agents: list[Agent], cluster: Cluster) -> None:
    for call in await asyncio.gather(*(agent.step(cluster) for agent in agents)):
        assert call.error is None, call.error


def homes(agents: list[Agent], turn: int = -1) -> list[str | None]:
    return [agent.calls[turn].backend for agent in agents]


async def test_sessions_stick_and_outlive_engines_and_routers(tmp_path):
    async with cluster(tmp_path) as made:
        agents = make_agents("agent")
        await check_sessions_stick(made, agents)
        await check_a_restarted_router_finds_them_again(made, agents)
        await check_an_engine_that_is_killed_takes_only_what_it_had_begun(made, agents)
        await made.revive(0)
        await check_affinity_forms_again(made, agents)


@pytest.mark.switch("SAGA_TEST_RANKS", "minutes")
async def test_sessions_stay_on_their_rank_of_one_server(tmp_path):
    async with cluster(tmp_path, one_server=True) as made:
        agents = make_agents("agent")
        await check_sessions_stick(made, agents)
        # Each engine knows those that the router says it has, and no other.
        for rank, backend in enumerate(sorted(set(homes(agents)))):
            assert backend.endswith(f"-dp{rank}")
            url = f"{made.engines[0].url}/v1/saga/state"
            async with made.http.get(url, headers={"x-data-parallel-rank": str(rank)}) as answer:
                state = json.loads(await answer.text())
            there = {agent.name for agent in agents if agent.calls[-1].backend == backend}
            known = {name for _, name in state["sessions"] if name.startswith("agent-")}
            assert known == there
        await check_a_restarted_router_finds_them_again(made, agents)


async def check_sessions_stick(made: Cluster, agents: list[Agent]) -> None:
    for _ in range(3):
        await all_step(agents, made)
    assert homes(agents, 0) == homes(agents, 1) == homes(agents, 2)
    shares = Counter(homes(agents))
    assert len(shares) == 2 and min(shares.values()) >= AGENTS // 4, shares


async def check_a_restarted_router_finds_them_again(made: Cluster, agents: list[Agent]) -> None:
    before = homes(agents)
    made.kill_router()
    await made.start_router()
    await all_step(agents, made)
    kept = sum(a == b for a, b in zip(before, homes(agents), strict=True))
    assert kept >= 0.95 * AGENTS


async def check_an_engine_that_is_killed_takes_only_what_it_had_begun(
    made: Cluster, agents: list[Agent]
) -> None:
    """Half of the agents stream, so that some calls have begun; the others cannot have."""
    dying = made.engines[0].url.removeprefix("http://")
    stop = asyncio.Event()

    async def work(agent: Agent, stream: bool) -> list[Call]:
        calls = []
        while not stop.is_set():
            calls.append(await agent.step(made, 60, stream))
        return calls

    lanes = [asyncio.create_task(work(agent, n % 2 == 0)) for n, agent in enumerate(agents)]
    await asyncio.sleep(2)
    made.engines[0].stop(signal.SIGKILL)
    await asyncio.sleep(6)
    stop.set()
    async with asyncio.timeout(60):
        done = await asyncio.gather(*lanes)
    calls = [call for lane in done for call in lane]
    failed = [call for call in calls if call.error is not None]
    assert all(call.begun and call.backend == dying for call in failed), failed
    assert len(failed) <= AGENTS // 2
    assert all(lane[-1].error is None and lane[-1].backend != dying for lane in done)


async def check_affinity_forms_again(made: Cluster, agents: list[Agent]) -> None:
    newcomers = make_agents("newcomer")
    for _ in range(3):
        await all_step([*agents, *newcomers], made)
    both = [*agents, *newcomers]
    assert homes(both, -1) == homes(both, -2)
    back = made.engines[0].url.removeprefix("http://")
    assert homes(newcomers).count(back) >= AGENTS // 4
