"""`python -m benchmarks.soak [--minutes 60] [--router]`: agents on a real server, for long.

Agents of every kind (linear, compacting, with sub-agents, bursts of tenants, aborted mid-stream,
malformed hints, nameless; sessions that are ended, or never) call `vllm serve --scheduler-cls saga`
with a tiny random model and a KV pool too small for them. Every ten seconds the memory of all
processes, the sizes of saga's tables and the counters are noted. In the end all agents stop, what
they left expires, and it is checked that memory was flat, that every table is empty, and that the
counters add up (benchmarks/soak/record.py). Exit status 1 if something does not hold.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from benchmarks.live.process import Process, ServerError, free_port
from benchmarks.live.routers import Router, command
from benchmarks.live.server import Server, scrape, tiny_server
from benchmarks.soak import record
from benchmarks.soak.agents import Agents, Caller, Pace

ROOT = Path(__file__).parents[2]
IDLE_S = 20.0
SETTINGS = {
    "session_idle_s": IDLE_S, "max_hold_s": 30.0, "max_step_hold_s": 30.0, "log_interval_s": 0,
    "tenant_source": "saga_tenant", "slo_factor": 3.0,
}  # fmt: skip


#: oneDNN, below torch, keeps code for the last 1,024 shapes of a step: tens of MB more each minute,
#: until it has seen them all. That is not what is looked for.
_FEW_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}


@dataclass(frozen=True)
class Plan:
    """calls_per_s: calls that may begin in a second, of all `lanes` agents together."""

    minutes: float
    lanes: int
    calls_per_s: float
    every_s: float
    seed: int
    output: Path


class Soak:
    """Looks at the processes and at what the server tells while the agents call `url`."""

    def __init__(
        self, plan: Plan, server: Server, router: Router | None, http: aiohttp.ClientSession
    ) -> None:
        self._plan, self._http = plan, http
        self._server = server
        self._processes: list[Process] = [server, *([router] if router else [])]
        self._began = time.monotonic()
        self._front = router or server
        self.caller = Caller(http, self._front.url, Pace(plan.calls_per_s))
        self.agents = Agents(self.caller, plan.seed)
        self.samples: list[record.Sample] = []
        self.cpu_cores = 0.0

    async def run(self) -> record.Sample:
        """The last sample: after all agents have stopped, and all that they left has expired."""
        stop = asyncio.Event()
        working = asyncio.create_task(self.agents.run(self._plan.lanes, stop))
        self._began = time.monotonic()
        used_s = sum(process.cpu_s() for process in self._processes)
        while time.monotonic() - self._began < 60.0 * self._plan.minutes:
            await asyncio.sleep(self._plan.every_s)
            self.samples.append(await self._look())
            for process in self._processes:
                process.check_alive()
            if len(self.samples) % 6 == 0:
                self._tell(self.samples[-1])
        used_s = sum(process.cpu_s() for process in self._processes) - used_s
        self.cpu_cores = used_s / (time.monotonic() - self._began)
        stop.set()
        await working
        await asyncio.sleep(IDLE_S + 2.0)
        # An engine without requests does not look at the time; its reports come once a second.
        for _ in range(3):
            await self._probe()
            await asyncio.sleep(1.5)
        return await self._look()

    async def _probe(self) -> None:
        """A call whose session ends with it."""
        self.caller.counts["probes"] += 1
        body = {"model": "model", "prompt": [5, 6, 7], "max_tokens": 2}
        extra = {"vllm_xargs": {"saga_last": 1}}
        url = f"{self._front.url}/v1/completions"
        async with self._http.post(url, json=body | extra) as answer:
            answer.raise_for_status()
        self.caller.counts["last"] += 1

    async def _look(self) -> record.Sample:
        async with self._http.get(f"{self._server.url}/v1/saga/state") as answer:
            state = await answer.json()
        rss: dict[str, int] = {}
        metrics: dict[str, float] = {}
        for process in self._processes:
            rss |= process.rss_bytes()
            metrics |= record.wanted(await scrape(self._http, process.url))
        client = dict.fromkeys(
            ("begun", "answered", "aborted", "refused", "failed", "ended", "last", "probes"), 0
        ) | dict(self.caller.counts)
        at_s = time.monotonic() - self._began
        return record.Sample(round(at_s, 1), rss, state["saga"], metrics, client)

    def _tell(self, sample: record.Sample) -> None:
        total = sum(sample.rss_bytes.values()) / 2**20
        shown = " ".join(f"{name}={sample.tables.get(name)}" for name in record.TABLES)
        begun = sample.client["begun"]
        print(f"{sample.at_s / 60:6.1f} min  {total:7.0f} MiB  {begun} calls  {shown}", flush=True)


def server_of(model: Path, blocks: int, log: Path) -> Server:
    options = tiny_server(
        model, blocks, "--middleware", "vllm_saga.server.SessionHeaders",
        "--additional-config", json.dumps({"saga": SETTINGS}),
        env={"VLLM_PLUGINS": "saga", **_FEW_SHAPES},
    )  # fmt: skip
    return Server(options, "saga", log, Path(sys.executable).parent / "vllm")


async def soak(plan: Plan, model: Path, blocks: int, with_router: bool) -> list[str]:
    """Runs it all, writes soak.json and soak.png; what does not hold."""
    async with AsyncExitStack() as stack:
        server = server_of(model, blocks, plan.output / "server.log")
        await stack.enter_async_context(server)
        router = None
        if with_router:
            port = free_port()
            line = [*await command("saga", [server.url], port), "--session-idle-secs", str(IDLE_S)]
            router = Router("saga", line, port, plan.output / "router.log")
            await stack.enter_async_context(router)
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        http = aiohttp.ClientSession(timeout=timeout, connector=connector)
        await stack.enter_async_context(http)
        running = Soak(plan, server, router, http)
        last = await running.run()
    wrong = record.problems(running.samples, last, running.caller.errors)
    about: dict[str, Any] = {
        "minutes": plan.minutes, "calls_per_s": plan.calls_per_s, "lanes": plan.lanes,
        "seed": plan.seed, "blocks": blocks, "router": with_router, "settings": SETTINGS,
        "agents": dict(running.agents.kinds), "cpu_cores": running.cpu_cores,
    }  # fmt: skip
    told = record.document(running.samples, last, wrong, **about)
    (plan.output / "soak.json").write_text(json.dumps(told, indent=1) + "\n")
    record.plot(running.samples, last, plan.output / "soak.png")
    print(f"agents: {about['agents']}\ncalls: {last.client}")
    print(f"CPU: {running.cpu_cores:.2f} cores on average")
    for name, each in record.growth(running.samples).items():
        before, after = each["second_quarter"] / 2**20, each["last_quarter"] / 2**20
        print(f"memory of {name}: {before:.1f} -> {after:.1f} MiB")
    print(f"tables in the end: { {name: last.tables[name] for name in record.TABLES} }")
    return wrong


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="For how long agents call.")] = 60.0,
    router: Annotated[bool, typer.Option(help="Behind `vllm-saga router`.")] = False,
    calls_per_s: Annotated[
        float, typer.Option(min=0.01, help="Calls that begin in a second: sets the CPU it takes.")
    ] = 3.0,
    lanes: Annotated[int, typer.Option(min=1, help="Agents at a time.")] = 12,
    blocks: Annotated[int, typer.Option(min=20, help="KV pool, in blocks of 32 tokens.")] = 110,
    model: Annotated[Path, typer.Option(help="Model to serve; its weights are random.")] = ROOT
    / ".cache"
    / "tiny-model",
    sample_s: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the agents.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of soak.json, soak.png and logs.")] = Path(
        "soak-report"
    ),
) -> None:
    """Agents on a real server for long: is memory flat, do tables empty, do counters add up?"""
    output.mkdir(parents=True, exist_ok=True)
    plan = Plan(minutes, lanes, calls_per_s, sample_s, seed, output)
    try:
        wrong = asyncio.run(soak(plan, model, blocks, router))
    except ServerError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print("\n".join(wrong) if wrong else "all of it holds")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
